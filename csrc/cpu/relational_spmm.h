// Products of several relations' CSR matrices with features of a batch of gene subsets, on the CPU: what the instruction sets
// share. Features are stored for the genes of a subset alone, so a sample's table says which place in it a gene has.

#pragma once

#include <cstdint>

#include "kept_row.h"

namespace cellattn {

// out[t, r] = target_scale[t, r] sum_j value_ij source_scale[p, r] x[p, r], over the neighbours j of gene i = target[t] that send,
// p the place of j; either r may be missing: one x for all relations, the sum over relations. T is float or double.
template <class T>
struct Relational {
  const int64_t* rowptr;  // of the stack
  const int32_t* col;
  const T* value;           // [E]
  const int64_t* relation;  // [K], of the stack
  int64_t num_relations, num_nodes, num_features;
  const int64_t* target;
  const T* target_scale;  // [Vt, K] or null for ones
  bool x_per_relation, out_per_relation;
  bool sum_samples;  // added to out[i], not written to out[t]
  T* out;
};

// What one sample sends.
template <class T>
struct Senders {
  const int32_t* place;   // [N]: -1 where a gene does not send
  const T* x;             // of place 0
  const T* source_scale;  // [., K] or null for ones, of place 0
  int64_t num_places;
  T* packed;  // room for kTileBytes of each place
};

constexpr int64_t kPackFrom = 4;   // entries for each place: fewer do not repay the copy
constexpr int64_t kListRoom = 16;  // past the longest row: the list is written in whole vectors

#define CELLATTN_RELATIONAL_FUNCTIONS                                                                                   \
  /* targets [begin, end), all of one sample */                                                                         \
  void relational_rows(                                                                                                 \
      const Relational<float>& task, const Senders<float>& from, const KeptRow<float>& kept, int64_t begin, int64_t end);  \
  void relational_rows(                                                                                                 \
      const Relational<double>& task, const Senders<double>& from, const KeptRow<double>& kept, int64_t begin,          \
      int64_t end);                                                                                                     \
  /* how many of n neighbours send */                                                                                   \
  int64_t count_senders(const int32_t* col, int64_t n, const int32_t* place);

namespace portable {
CELLATTN_RELATIONAL_FUNCTIONS
}  // namespace portable
#if defined(__x86_64__)
namespace avx2 {
CELLATTN_RELATIONAL_FUNCTIONS
}  // namespace avx2
namespace avx512 {
CELLATTN_RELATIONAL_FUNCTIONS
}  // namespace avx512
#endif

}  // namespace cellattn
