// Products of a matrix of bits with features on the CPU: what the instruction sets share.
//
// Features are summed by the method of four Russians (Arlazarov et al. 1970): for each four columns the sixteen sums of their
// subsets are made once, so that 64 columns of a row are sixteen additions whatever is set. A column whose bit is not set enters
// no sum: nothing is multiplied by zero, and its features are never seen, not even a NaN.

#pragma once

#include <cstdint>

#include "../bits.h"

namespace cellattn {

// out[r] = sum over the bits j of words[rows[r]] of x[j]. T is float or double.
template <class T>
struct BitSpmm {
  const Word* words;    // [M, W]
  const int64_t* rows;  // [R] or null for all M
  const T* x;           // [C, F]
  int64_t num_words, num_cols, num_features;
  T* out;  // [R, F]
};

#define CELLATTN_BIT_SPMM_FUNCTIONS(T)                                           \
  /* rows [begin, end), features from `first` on: how many features were done */ \
  int64_t bit_spmm_tile(const BitSpmm<T>& task, int64_t begin, int64_t end, int64_t first);

namespace portable {
CELLATTN_BIT_SPMM_FUNCTIONS(float)
CELLATTN_BIT_SPMM_FUNCTIONS(double)
}  // namespace portable
#if defined(__x86_64__)
namespace avx2 {
CELLATTN_BIT_SPMM_FUNCTIONS(float)
CELLATTN_BIT_SPMM_FUNCTIONS(double)
}  // namespace avx2
namespace avx512 {
CELLATTN_BIT_SPMM_FUNCTIONS(float)
CELLATTN_BIT_SPMM_FUNCTIONS(double)
}  // namespace avx512
#endif

constexpr int64_t kBitRows = 512;  // rows that share the tables of subset sums

}  // namespace cellattn
