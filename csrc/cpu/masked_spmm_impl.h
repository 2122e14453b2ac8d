// The body of masked_spmm_portable.cpp and masked_spmm_avx512.cpp: the same text, compiled for each instruction set.

#include "row_sum_impl.h"

// A row's kept neighbours, in order; how many.
template <class T>
inline int64_t list_kept(const Spmm<T>& task, const KeptRow<T>& kept, const uint8_t* keep, int64_t begin, int64_t end) {
  int64_t n = 0;
  for (int64_t e = begin; e < end; ++e) {
    kept.col[n] = task.col[e];
    if (task.value != nullptr) kept.value[n] = task.value[e];
    n += keep[task.col[e]];
  }
  return n;
}

template <class T>
inline void sum_row(
    const Spmm<T>& task, const int32_t* col, const T* value, int64_t n, const T* x, int64_t width, T* out) {
  const T scale = task.mean && n > 0 ? T{1} / static_cast<T>(n) : T{1};
  if (task.value != nullptr) {
    sum_features<T, true, false>(col, value, n, x, task.num_features, width, scale, out);
  } else {
    sum_features<T, false, false>(col, nullptr, n, x, task.num_features, width, scale, out);
  }
}

// Samples that keep all of a row's neighbours have the same sum. A perturbation removes a few genes, so for most rows that is
// the whole batch: the sum is made once and copied, bit for bit what each sample would have got.
template <class T>
void shared_rows(const Spmm<T>& task, const KeptRow<T>& kept, int64_t begin, int64_t end) {
  const int64_t f = task.num_features, n = task.num_nodes;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = task.rowptr[i], last = task.rowptr[i + 1];
    int64_t made = -1;  // a sample with the whole row's sum
    for (int64_t w = 0; w < task.num_words; ++w) {
      const Word mine = task.words[i * task.num_words + w];
      Word whole = mine;
      for (int64_t e = first; e < last && whole != 0; ++e) whole &= task.words[task.col[e] * task.num_words + w];
      const int64_t from = w * kWordBits, to = from + kWordBits < task.num_sets ? from + kWordBits : task.num_sets;
      for (int64_t b = from; b < to; ++b) {
        T* out = task.out + (b * n + i) * f;
        const Word bit = Word{1} << (b - from);
        if ((mine & bit) == 0) {
          zero_row(f, out);
        } else if ((whole & bit) != 0 && made >= 0) {
          copy_row(task.out + (made * n + i) * f, f, out);
        } else if ((whole & bit) != 0) {
          const T* value = task.value == nullptr ? nullptr : task.value + first;
          sum_row(task, task.col + first, value, last - first, task.x, f, out);
          made = b;
        } else {
          const int64_t num_kept = list_kept(task, kept, task.keep + b * n, first, last);
          sum_row(task, kept.col, kept.value, num_kept, task.x, f, out);
        }
      }
    }
  }
}

template <class T>
void sample_rows(const Spmm<T>& task, const KeptRow<T>& kept, int64_t b, int64_t begin, int64_t end, int64_t first) {
  constexpr int64_t kTile = kTileBytes / sizeof(T);
  const int64_t f = task.num_features, n = task.num_nodes;
  const int64_t width = f - first < kTile ? f - first : kTile;
  const uint8_t* keep = task.keep + b * n;
  const T* x = task.x + b * task.x_stride + first;
  for (int64_t i = begin; i < end; ++i) {
    T* out = task.out + (b * n + i) * f + first;
    if (!keep[i]) {
      zero_row(width, out);
      continue;
    }
    const int64_t num_kept = list_kept(task, kept, keep, task.rowptr[i], task.rowptr[i + 1]);
    sum_row(task, kept.col, kept.value, num_kept, x, width, out);
  }
}

template <class T>
inline T dot(const T* a, const T* b, int64_t n) {
  using V = typename Vector<T>::Type;
  constexpr int kLanes = Vector<T>::kLanes;
  typename Vector<T>::Aligned sum = {};
  int64_t f = 0;
  for (; f + kLanes <= n; f += kLanes) sum += *reinterpret_cast<const V*>(a + f) * *reinterpret_cast<const V*>(b + f);
  T total = 0;
  for (; f < n; ++f) total += a[f] * b[f];
  for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
  return total;
}

// Sample by sample, so that one sample's features stay in the cache for all of the rows.
template <class T>
void sddmm(const Sddmm<T>& task, int64_t begin, int64_t end) {
  const int64_t f = task.num_features, n = task.num_nodes;
  zero_row(task.rowptr[end] - task.rowptr[begin], task.out + task.rowptr[begin]);
  for (int64_t b = 0; b < task.num_sets; ++b) {
    const Word* words = task.words + b / kWordBits;
    const int shift = static_cast<int>(b % kWordBits);
    const T* x = task.x + b * task.x_stride;
    for (int64_t i = begin; i < end; ++i) {
      if (((words[i * task.num_words] >> shift) & 1) == 0) continue;
      const T* g = task.g + (b * n + i) * f;
      for (int64_t e = task.rowptr[i]; e < task.rowptr[i + 1]; ++e) {
        const int64_t j = task.col[e];
        if ((words[j * task.num_words] >> shift) & 1) task.out[e] += dot(g, x + j * f, f);
      }
    }
  }
}

#define CELLATTN_DEFINE_SPMM(T)                                                                                        \
  void spmm_shared(const Spmm<T>& task, const KeptRow<T>& kept, int64_t begin, int64_t end) {                          \
    shared_rows(task, kept, begin, end);                                                                               \
  }                                                                                                                    \
  void spmm_sample(                                                                                                    \
      const Spmm<T>& task, const KeptRow<T>& kept, int64_t b, int64_t begin, int64_t end, int64_t first) {             \
    sample_rows(task, kept, b, begin, end, first);                                                                     \
  }                                                                                                                    \
  void sddmm_rows(const Sddmm<T>& task, int64_t begin, int64_t end) { sddmm(task, begin, end); }
