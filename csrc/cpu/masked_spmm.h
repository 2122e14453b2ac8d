// Products of one relation's CSR matrix with features, over B masked copies of the graph, on the CPU: what the instruction
// sets share. No copy of an edge is made: a row's kept neighbours are listed once a sample, then gathered.

#pragma once

#include <cstdint>

#include "../bits.h"
#include "kept_row.h"

namespace cellattn {

// out[b, i] = keep_bi sum_j value_ij keep_bj x[b, j]. T is float or double.
template <class T>
struct Spmm {
  const int64_t* rowptr;
  const int32_t* col;
  const T* value;      // [E] or null for ones
  const T* x;          // sample b's features are at x + b * x_stride
  int64_t x_stride;    // 0 where the samples share them
  const uint8_t* keep; // [B, N]
  const Word* words;   // [N, W], the same sets
  int64_t num_words, num_nodes, num_features, num_sets;
  bool mean;
  T* out;  // [B, N, F]
};

// dvalue_ij = sum_b keep_bi keep_bj g[b, i] . x[b, j]
template <class T>
struct Sddmm {
  const int64_t* rowptr;
  const int32_t* col;
  const T* g;  // [B, N, F]
  const T* x;
  int64_t x_stride;
  const Word* words;
  int64_t num_words, num_nodes, num_features, num_sets;
  T* out;  // [E]
};

#define CELLATTN_SPMM_FUNCTIONS(T)                                                                            \
  /* rows [begin, end) of every sample, which share x */                                                      \
  void spmm_shared(const Spmm<T>& task, const KeptRow<T>& kept, int64_t begin, int64_t end);                  \
  /* rows [begin, end) of sample b, features [first, first + kTile) */                                        \
  void spmm_sample(                                                                                           \
      const Spmm<T>& task, const KeptRow<T>& kept, int64_t b, int64_t begin, int64_t end, int64_t first);     \
  void sddmm_rows(const Sddmm<T>& task, int64_t begin, int64_t end);

namespace portable {
CELLATTN_SPMM_FUNCTIONS(float)
CELLATTN_SPMM_FUNCTIONS(double)
}  // namespace portable
#if defined(__x86_64__)
namespace avx2 {
CELLATTN_SPMM_FUNCTIONS(float)
CELLATTN_SPMM_FUNCTIONS(double)
}  // namespace avx2
namespace avx512 {
CELLATTN_SPMM_FUNCTIONS(float)
CELLATTN_SPMM_FUNCTIONS(double)
}  // namespace avx512
#endif

}  // namespace cellattn
