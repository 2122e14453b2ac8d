// Attention along the edges of graphs on the CPU: what the instruction sets share. A row's entries are listed, scored, and summed:
// O(E d), and room for the longest row alone.

#pragma once

#include <cstdint>

#include "dropout.h"
#include "kept_row.h"

namespace cellattn {

// Relations joined by one head: their part of the stack, and their number among all ties.
struct EdgeTie {
  const int64_t* ptr;  // [N + 1]
  int64_t tie;
};

// One head. Rows of features have `width` (`width_v`) numbers, whole vectors with zeros behind the features. T is float or double.
template <class T>
struct EdgeHead {
  const T *q, *k, *v;  // q [N, width], k [P + N, width], v [P + N, width_v]
  const EdgeTie *by_row, *by_column;
  int64_t num_ties, num_nodes, num_prefix, width, width_v;
  const int32_t *col, *row;
  const T *log_weight, *log_weight_by_column;  // null for zeros
  const T* bias;                               // by tie; null for zeros
  bool self_loops;
  T scale, rescale;  // of the scores; 1 / (1 - p)
  DropoutBits bits;  // copy 0 is of prefix and own entries, copy 1 + t of those of tie t
  int64_t number;    // of the head, over all leading dimensions
  // forward
  T* out;  // [N, width_v]
  T* lse;  // [N]; an input of the backward, NaN where it is not finite
  // backward
  const T *dout, *delta;  // [N, width_v], [N]
  T *dq, *dk, *dv;        // [N, width], [P + N, width], [P + N, width_v]
  T* dbias;               // [N, num_ties of all heads], row i's part
  int64_t dbias_stride;
};

// Room of a task for as many entries as the longest row or column has, and a vector more.
template <class T>
struct EdgeRoom {
  int32_t* index;
  T *score, *slope;
  T* keep;  // where the map is dropped
};

#define CELLATTN_EDGE_FUNCTIONS(T)                                                                             \
  void edge_forward(const EdgeHead<T>& head, int64_t begin, int64_t end, const EdgeRoom<T>& room);             \
  void edge_backward_rows(const EdgeHead<T>& head, int64_t begin, int64_t end, const EdgeRoom<T>& room);       \
  void edge_backward_columns(const EdgeHead<T>& head, int64_t begin, int64_t end, const EdgeRoom<T>& room);

namespace portable {
CELLATTN_EDGE_FUNCTIONS(float)
CELLATTN_EDGE_FUNCTIONS(double)
}  // namespace portable
#if defined(__x86_64__)
namespace avx2 {
CELLATTN_EDGE_FUNCTIONS(float)
CELLATTN_EDGE_FUNCTIONS(double)
}  // namespace avx2
namespace avx512 {
CELLATTN_EDGE_FUNCTIONS(float)
CELLATTN_EDGE_FUNCTIONS(double)
}  // namespace avx512
#endif

}  // namespace cellattn
