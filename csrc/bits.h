// Sets of genes for a batch as bits: what one element means, for the C++ and the CUDA compiler alike.
//
// words [N, W] has a row for each gene and a bit for each sample: bit b % 64 of words[i, b / 64] says that gene i is in the
// set of sample b. One AND or OR of two words answers for 64 samples at once.

#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define CELLATTN_HD __host__ __device__ __forceinline__
#else
#define CELLATTN_HD inline
#endif

namespace cellattn {

using Word = uint64_t;
constexpr int64_t kWordBits = 64;

CELLATTN_HD int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b > 0); }  // a >= 0, b > 0

CELLATTN_HD int64_t num_words(int64_t num_sets) { return ceil_div(num_sets, kWordBits); }

// The bits of word w that belong to samples of the batch.
CELLATTN_HD Word valid_bits(int64_t num_sets, int64_t w) {
  const int64_t left = num_sets - w * kWordBits;
  return left >= kWordBits ? ~Word{0} : left <= 0 ? Word{0} : (Word{1} << left) - 1;
}

// The set that entry `position` of a ragged batch belongs to: the last b with ptr[b] <= position.
CELLATTN_HD int64_t set_of(const int64_t* ptr, int64_t num_sets, int64_t position) {
  int64_t low = 0, high = num_sets;  // ptr[low] <= position < ptr[high]
  while (high - low > 1) {
    const int64_t mid = low + (high - low) / 2;
    if (ptr[mid] <= position) {
      low = mid;
    } else {
      high = mid;
    }
  }
  return low;
}

}  // namespace cellattn
