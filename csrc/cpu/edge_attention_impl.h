// The body of edge_attention_{portable,avx2,avx512}.cpp: the same text, compiled for each instruction set.

#include "exp_impl.h"
#include "philox_impl.h"
#include "row_sum_impl.h"

// dot_n = a . x[index_n]: each sum in the same order whichever of the two is gathered, so that a score is the same number in the
// passes by rows and by columns.
template <class T>
inline void dots(const T* a, const T* x, const int32_t* index, int64_t n, int64_t width, T* dot) {
  using V = typename Lanes<T>::Value;
  constexpr int64_t kLanes = Lanes<T>::kCount;
  for (int64_t e = 0; e < n; ++e) {
    const T* b = x + index[e] * width;
    V sum = {};
    for (int64_t c = 0; c < width; c += kLanes) {
      sum += *reinterpret_cast<const V*>(a + c) * *reinterpret_cast<const V*>(b + c);
    }
    // in steps of 16 bytes, then lane by lane
    typedef T Quarter __attribute__((vector_size(16), may_alias));
    Quarter part = {};
    for (int64_t p = 0; p < CELLATTN_VECTOR_BYTES / 16; ++p) part += reinterpret_cast<const Quarter*>(&sum)[p];
    T total = part[0];
    for (int64_t lane = 1; lane < static_cast<int64_t>(16 / sizeof(T)); ++lane) total += part[lane];
    dot[e] = total;
  }
}

// What a gene sees (its row) or is seen by (its column): tokens `first` on, `count` of them, itself, and its neighbours. Scores
// get what is added to them.
template <class T>
inline int64_t list_entries(
    const EdgeHead<T>& head, const EdgeTie* ties, const int32_t* neighbour, const T* log_weight, int64_t gene, int64_t prefix,
    int32_t* index, T* added) {
  int64_t n = 0;
  for (; n < prefix; ++n) index[n] = static_cast<int32_t>(n), added[n] = 0;
  if (head.self_loops) index[n] = static_cast<int32_t>(prefix + gene), added[n] = 0, ++n;
  for (int64_t t = 0; t < head.num_ties; ++t) {
    const T bias = head.bias ? head.bias[ties[t].tie] : T{0};
    for (int64_t e = ties[t].ptr[gene]; e < ties[t].ptr[gene + 1]; ++e, ++n) {
      index[n] = static_cast<int32_t>(prefix + neighbour[e]);
      added[n] = log_weight ? log_weight[e] + bias : bias;
    }
  }
  return n;
}

// Whether the listed entries of a token's row (ByRow) or column stay: `near` ones, and those by ties.
template <bool ByRow, class T>
inline void list_kept(
    const EdgeHead<T>& head, const EdgeTie* ties, int64_t num_ties, int64_t token, int64_t near, const int32_t* index, T* keep) {
  const int64_t first = ByRow ? 0 : head.num_prefix, gene = token - head.num_prefix;
  keep_entries<ByRow>(head.bits, head.number, token, first, index, near, keep);
  int64_t e = near;
  for (int64_t t = 0; t < num_ties; ++t) {
    const int64_t n = ties[t].ptr[gene + 1] - ties[t].ptr[gene];
    keep_entries<ByRow>(head.bits.copy(1 + ties[t].tie), head.number, token, first, index + e, n, keep + e);
    e += n;
  }
}

template <class T>
void forward(const EdgeHead<T>& head, int64_t begin, int64_t end, const EdgeRoom<T>& room) {
  using V = typename Lanes<T>::Load;
  constexpr int64_t kLanes = Lanes<T>::kCount;
  const T infinity = static_cast<T>(__builtin_inf());
  const T largest = sizeof(T) == 4 ? static_cast<T>(__FLT_MAX__) : static_cast<T>(__DBL_MAX__);
  T *s = room.score, *added = room.slope;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = list_entries(head, head.by_row, head.col, head.log_weight, i, head.num_prefix, room.index, added);
    dots(head.q + i * head.width, head.k, room.index, n, head.width, s);
    T most = -infinity;
    for (int64_t e = 0; e < n; ++e) {
      s[e] = head.scale * s[e] + added[e];
      most = s[e] > most ? s[e] : most;
    }
    for (int64_t e = n; e < n + kLanes; ++e) s[e] = -infinity;
    // held finite, so that a score of inf makes the sum inf, and a row of -inf alone leaves it at 0
    const T pivot = most > largest ? largest : most < -largest ? -largest : most;
    T total = 0;
    for (int64_t e = 0; e < n; e += kLanes) {
      const typename Lanes<T>::Value p = exp_of(*reinterpret_cast<const V*>(s + e) - pivot);
      *reinterpret_cast<V*>(s + e) = p;
      for (int64_t lane = 0; lane < kLanes; ++lane) total += p[lane];
    }
    head.lse[i] = pivot + log_of(total);
    if (head.bits.threshold) {
      const int64_t near = head.num_prefix + head.self_loops;
      list_kept<true>(head, head.by_row, head.num_ties, head.num_prefix + i, near, room.index, room.keep);
      for (int64_t e = 0; e < n; ++e) s[e] *= room.keep[e];
    }
    if (n == 0) {
      zero_row(head.width_v, head.out + i * head.width_v);
    } else {
      sum_features<T, true, false>(
          room.index, s, n, head.v, head.width_v, head.width_v, head.rescale / total, head.out + i * head.width_v);
    }
  }
}

// With P_e = exp(s_e - LSE_i) of an entry e = (i, j) and Z_e = keep / (1 - p):  dS_e = P_e (Z_e dOut_i . v_j - delta_i),
// dQ_i = scale sum_e dS_e k_j.
template <class T>
void backward_rows(const EdgeHead<T>& head, int64_t begin, int64_t end, const EdgeRoom<T>& room) {
  using V = typename Lanes<T>::Load;
  constexpr int64_t kLanes = Lanes<T>::kCount;
  T *s = room.score, *slope = room.slope;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = list_entries(head, head.by_row, head.col, head.log_weight, i, head.num_prefix, room.index, slope);
    dots(head.q + i * head.width, head.k, room.index, n, head.width, s);
    for (int64_t e = 0; e < n; ++e) s[e] = head.scale * s[e] + slope[e];
    dots(head.dout + i * head.width_v, head.v, room.index, n, head.width_v, slope);
    if (head.bits.threshold) {
      const int64_t near = head.num_prefix + head.self_loops;
      list_kept<true>(head, head.by_row, head.num_ties, head.num_prefix + i, near, room.index, room.keep);
      for (int64_t e = 0; e < n; ++e) slope[e] *= head.rescale * room.keep[e];
    }
    for (int64_t e = 0; e < n; e += kLanes) {
      const auto p = exp_of(*reinterpret_cast<const V*>(s + e) - head.lse[i]);
      *reinterpret_cast<V*>(slope + e) = p * (*reinterpret_cast<const V*>(slope + e) - head.delta[i]);
    }
    sum_features<T, true, false>(room.index, slope, n, head.k, head.width, head.width, head.scale, head.dq + i * head.width);
    if (head.dbias) {
      int64_t e = head.num_prefix + head.self_loops;
      for (int64_t t = 0; t < head.num_ties; ++t) {
        T sum = 0;
        const int64_t last = e + head.by_row[t].ptr[i + 1] - head.by_row[t].ptr[i];
        for (; e < last; ++e) sum += slope[e];
        head.dbias[i * head.dbias_stride + head.by_row[t].tie] = sum;
      }
    }
  }
}

// dV_j = sum_e Z_e P_e dOut_i,  dK_j = scale sum_e dS_e q_i over what sees token j: genes, and of a prefix token all of them.
template <class T>
void backward_columns(const EdgeHead<T>& head, int64_t begin, int64_t end, const EdgeRoom<T>& room) {
  T *s = room.score, *slope = room.slope;
  for (int64_t j = begin; j < end; ++j) {
    int64_t n, near = head.self_loops;
    if (j < head.num_prefix) {
      for (n = 0; n < head.num_nodes; ++n) room.index[n] = static_cast<int32_t>(n), slope[n] = 0;
      near = n;
    } else {
      n = list_entries(
          head, head.by_column, head.row, head.log_weight_by_column, j - head.num_prefix, 0, room.index, slope);
    }
    dots(head.k + j * head.width, head.q, room.index, n, head.width, s);
    for (int64_t e = 0; e < n; ++e) s[e] = head.scale * s[e] + slope[e] - head.lse[room.index[e]];
    dots(head.v + j * head.width_v, head.dout, room.index, n, head.width_v, slope);
    constexpr int64_t kLanes = Lanes<T>::kCount;
    for (int64_t e = 0; e < n; e += kLanes) {
      auto* p = reinterpret_cast<typename Lanes<T>::Load*>(s + e);
      *p = exp_of(*p);
    }
    if (head.bits.threshold) {
      list_kept<false>(
          head, head.by_column, j < head.num_prefix ? 0 : head.num_ties, j, near, room.index, room.keep);
      for (int64_t e = 0; e < n; ++e) slope[e] *= head.rescale * room.keep[e];
    }
    for (int64_t e = 0; e < n; ++e) slope[e] = s[e] * (slope[e] - head.delta[room.index[e]]);
    if (head.bits.threshold) {
      for (int64_t e = 0; e < n; ++e) s[e] *= room.keep[e];
    }
    sum_features<T, true, false>(
        room.index, s, n, head.dout, head.width_v, head.width_v, head.rescale, head.dv + j * head.width_v);
    sum_features<T, true, false>(room.index, slope, n, head.q, head.width, head.width, head.scale, head.dk + j * head.width);
  }
}

#define CELLATTN_DEFINE_EDGES(T)                                                                               \
  void edge_forward(const EdgeHead<T>& head, int64_t begin, int64_t end, const EdgeRoom<T>& room) {            \
    forward(head, begin, end, room);                                                                           \
  }                                                                                                            \
  void edge_backward_rows(const EdgeHead<T>& head, int64_t begin, int64_t end, const EdgeRoom<T>& room) {      \
    backward_rows(head, begin, end, room);                                                                     \
  }                                                                                                            \
  void edge_backward_columns(const EdgeHead<T>& head, int64_t begin, int64_t end, const EdgeRoom<T>& room) {   \
    backward_columns(head, begin, end, room);                                                                  \
  }
