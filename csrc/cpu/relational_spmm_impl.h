// The body of relational_spmm_portable.cpp and relational_spmm_avx512.cpp: the same text, compiled for each instruction set, each
// with a `list_senders` of its own.

#include "row_sum_impl.h"

// Relation by relation and a tile of features at a time, so that what is gathered from stays in the cache while `out`, written in
// order, streams past. Rows of x that lie far apart are packed first where they are gathered often: there are more pages of them
// than the processor has addresses of at hand.
template <class T>
void sum_relational_rows(
    const Relational<T>& task, const Senders<T>& from, const KeptRow<T>& kept, int64_t begin, int64_t end) {
  constexpr int64_t kTile = kTileBytes / sizeof(T);
  const int64_t k = task.num_relations, f = task.num_features;
  const int64_t stride = task.x_per_relation ? k * f : f, out_stride = task.out_per_relation ? k * f : f;
  for (int64_t r = 0; r < k; ++r) {
    const int64_t* rowptr = task.rowptr + task.relation[r] * task.num_nodes;
    const bool add = task.sum_samples || (r > 0 && !task.out_per_relation);
    int64_t entries = 0;
    for (int64_t t = begin; t < end; ++t) entries += rowptr[task.target[t] + 1] - rowptr[task.target[t]];
    for (int64_t first = 0; first < f; first += kTile) {
      const int64_t width = f - first < kTile ? f - first : kTile;
      const T* x = from.x + (task.x_per_relation ? r * f : 0) + first;
      int64_t x_stride = stride;
      if (stride > width && entries >= kPackFrom * from.num_places) {
        for (int64_t p = 0; p < from.num_places; ++p) copy_row(x + p * stride, width, from.packed + p * width);
        x = from.packed;
        x_stride = width;
      }
      for (int64_t t = begin; t < end; ++t) {
        const int64_t i = task.target[t], e = rowptr[i];
        const int64_t n = list_senders(task.col + e, task.value + e, rowptr[i + 1] - e, from.place, kept);
        if (n == 0 && add) continue;
        if (from.source_scale != nullptr) {
          for (int64_t m = 0; m < n; ++m) kept.value[m] *= from.source_scale[kept.col[m] * k + r];
        }
        const T scale = task.target_scale == nullptr ? T{1} : task.target_scale[t * k + r];
        T* out = task.out + (task.sum_samples ? i : t) * out_stride + (task.out_per_relation ? r * f : 0) + first;
        if (add) {
          sum_features<T, true, true>(kept.col, kept.value, n, x, x_stride, width, scale, out);
        } else {
          sum_features<T, true, false>(kept.col, kept.value, n, x, x_stride, width, scale, out);
        }
      }
    }
  }
}

#define CELLATTN_DEFINE_RELATIONAL(T)                                                                             \
  void relational_rows(                                                                                           \
      const Relational<T>& task, const Senders<T>& from, const KeptRow<T>& kept, int64_t begin, int64_t end) {    \
    sum_relational_rows(task, from, kept, begin, end);                                                            \
  }
