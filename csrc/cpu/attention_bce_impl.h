// The body of attention_bce_{portable,avx2,avx512}.cpp: the same text, compiled for each instruction set.

#include "exp_impl.h"

inline float log1p_of(float x) { return __builtin_log1pf(x); }
inline double log1p_of(double x) { return __builtin_log1p(x); }

inline typename Lanes<double>::Value log1p_of(typename Lanes<double>::Value x) {
  for (int64_t i = 0; i < Lanes<double>::kCount; ++i) x[i] = __builtin_log1p(x[i]);
  return x;
}

// log(1 + x) = 2 artanh(x / (2 + x)): a series of odd powers of at most 1/2 for x from -2/3 to 1, whose next term is 2e-8 of
// the sum. Whatever is not there, which takes a log-sum-exp of other scores than these, the standard library's.
inline typename Lanes<float>::Value log1p_of(typename Lanes<float>::Value x) {
  using V = typename Lanes<float>::Value;
  typedef int32_t I __attribute__((vector_size(CELLATTN_VECTOR_BYTES)));
  const I outside = ~((x >= -0.68f) & (x <= 1.0f));
  bool any = false;
  for (int64_t i = 0; i < Lanes<float>::kCount; ++i) any |= outside[i] != 0;
  if (__builtin_expect(any, false)) {
    for (int64_t i = 0; i < Lanes<float>::kCount; ++i) x[i] = __builtin_log1pf(x[i]);
    return x;
  }
  const V u = x / (x + 2.0f), w = u * u;
  V p = w * (1.0f / 21) + 1.0f / 19;
#pragma GCC unroll 9
  for (int k = 8; k >= 0; --k) p = p * w + 1.0f / static_cast<float>(2 * k + 1);
  return 2.0f * u * p;
}

template <class V>
inline V size_of(V x) {
  return x < V{} ? -x : x;
}

// x, no more than most
template <class X, class T>
inline X held(X x, T most) {
  return x > most ? X{} + most : x;
}

// softplus(x), to the last digits
template <class V>
inline V softplus(V x) {
  return (x > V{} ? x : V{}) + log1p_of(exp_of(-size_of(x)));
}
inline float softplus(float x) { return (x > 0 ? x : 0) + log1p_of(exp_of(-__builtin_fabsf(x))); }
inline double softplus(double x) { return (x > 0 ? x : 0) + log1p_of(exp_of(-__builtin_fabs(x))); }

// What a pair with the target 0 adds to the loss, of its log a (softmax) or its score (sigmoid); and the slope of that.
template <bool Sigmoid, class V>
inline V apart(V x) {
  if constexpr (Sigmoid) return softplus(x);
  else return -log1p_of(-exp_of(x));
}

template <bool Sigmoid, class V>
inline V apart_slope(V x) {
  if constexpr (Sigmoid) {
    const V e = exp_of(-size_of(x));
    return (x < V{} ? e : V{} + 1) / (e + 1);
  } else {
    const V a = exp_of(x);
    return a / (1 - a);
  }
}

// Takes the scores of the row's edges, and leaves -inf there and where genes are unknown.
template <class T>
inline void take_out(const BceRows<T>& task, int64_t row, T* s, T* edge) {
  const T nothing = -static_cast<T>(__builtin_inf());
  const int64_t first = task.rowptr[row], last = task.rowptr[row + 1];
  for (int64_t e = first; e < last; ++e) edge[e - first] = s[task.col[e]];
  for (int64_t e = first; e < last; ++e) s[task.col[e]] = nothing;
  for (int64_t u = 0; u < task.num_unknown; ++u) s[task.unknown[u]] = nothing;
}

template <bool Sigmoid, class T>
void forward(const BceRows<T>& task, int64_t begin, int64_t end, T* edge) {
  using V = typename Lanes<T>::Value;
  using Load = typename Lanes<T>::Load;
  constexpr int64_t kLanes = Lanes<T>::kCount;
  const T nothing = -static_cast<T>(__builtin_inf());
  const int64_t n = task.num_genes;
  for (int64_t i = begin; i < end; ++i) {
    T* s = task.scores + i * n;
    const int64_t row = task.rows[i], first = task.rowptr[row], degree = task.rowptr[row + 1] - first;
    const T total = Sigmoid ? T{0} : task.total[i];
    take_out(task, row, s, edge);
    int64_t sharp_gene = -1, sharp_edge = -1;
    if constexpr (!Sigmoid) {
      T top = nothing;
      for (int64_t e = 0; e < degree; ++e) {
        if (edge[e] > top) top = edge[e], sharp_edge = e;
      }
      V most = V{} + top;
      int64_t j = 0;
      for (; j + kLanes <= n; j += kLanes) {
        const V x = *reinterpret_cast<const Load*>(s + j);
        most = x > most ? x : most;
      }
      T rest = top;
      for (int64_t lane = 0; lane < kLanes; ++lane) rest = most[lane] > rest ? most[lane] : rest;
      for (; j < n; ++j) rest = s[j] > rest ? s[j] : rest;
      T positive = 0, negative = 0;
      if (rest > top) {
        sharp_edge = -1;
        if (rest - total > task.least) {
          for (sharp_gene = 0; s[sharp_gene] != rest;) ++sharp_gene;
          s[sharp_gene] = nothing;
          negative = 1;
        }
      } else if (sharp_edge >= 0 && top - total > task.least) {
        sharp_gene = task.col[first + sharp_edge];
        positive = task.target(first + sharp_edge, degree, task.inv_mass[row]);
        negative = 1 - positive;
      } else {
        sharp_edge = -1;
      }
      task.sharp[i] = sharp_gene;
      task.sharp_positive[i] = positive;
      task.sharp_negative[i] = negative;
    }
    V sum = {}, other = {};
    int64_t j = 0;
    for (; j + 2 * kLanes <= n; j += 2 * kLanes) {
      sum += apart<Sigmoid>(held<V>(*reinterpret_cast<const Load*>(s + j) - total, task.most));
      other += apart<Sigmoid>(held<V>(*reinterpret_cast<const Load*>(s + j + kLanes) - total, task.most));
    }
    sum += other;
    T loss = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) loss += sum[lane];
    for (; j < n; ++j) loss += apart<Sigmoid>(held<T>(s[j] - total, task.most));
    T edges = 0;
    for (int64_t e = 0; e < degree; ++e) {
      if (e == sharp_edge) continue;
      const T t = task.target(first + e, degree, task.inv_mass[row]), x = held<T>(edge[e] - total, task.most);
      // what weighs nothing adds nothing, however large
      if (t != 0) edges += t * (Sigmoid ? softplus(-x) : -x);
      if (t != 1) edges += (1 - t) * apart<Sigmoid>(x);
    }
    task.loss[i] = loss + edges;
  }
}

// scores become d loss / d score, but for what goes through the log-sum-exp
template <bool Sigmoid, class T>
void backward(const BceRows<T>& task, int64_t begin, int64_t end, T* edge) {
  using V = typename Lanes<T>::Value;
  using Load = typename Lanes<T>::Load;
  constexpr int64_t kLanes = Lanes<T>::kCount;
  const int64_t n = task.num_genes;
  for (int64_t i = begin; i < end; ++i) {
    T* s = task.scores + i * n;
    const int64_t row = task.rows[i], first = task.rowptr[row], degree = task.rowptr[row + 1] - first;
    const T total = Sigmoid ? T{0} : task.total[i], dloss = task.dloss[i];
    const int64_t sharp = Sigmoid ? -1 : task.sharp[i];
    take_out(task, row, s, edge);
    if (sharp >= 0) s[sharp] = -static_cast<T>(__builtin_inf());
    V sum = {};
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) {
      auto* at = reinterpret_cast<Load*>(s + j);
      const V slope = dloss * apart_slope<Sigmoid>(held<V>(*at - total, task.most));
      *at = slope;
      sum += slope;
    }
    T all = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) all += sum[lane];
    for (; j < n; ++j) {
      s[j] = dloss * apart_slope<Sigmoid>(held<T>(s[j] - total, task.most));
      all += s[j];
    }
    T edges = 0;
    for (int64_t e = 0; e < degree; ++e) {
      const int64_t gene = task.col[first + e];
      const T t = task.target(first + e, degree, task.inv_mass[row]), x = held<T>(edge[e] - total, task.most);
      T slope = x == x ? T{0} : x;  // NaN, whatever weighs it
      if (t != 1) slope += (1 - t) * apart_slope<Sigmoid>(x);
      if (t != 0) slope -= t * (Sigmoid ? apart_slope<true>(-x) : T{1});
      s[gene] = gene == sharp ? T{0} : dloss * slope;
      edges += s[gene];
    }
    if constexpr (!Sigmoid) task.dtotal[i] = -(all + edges);
  }
}

#define CELLATTN_DEFINE_BCE(T)                                                                    \
  void bce_forward(const BceRows<T>& task, int64_t begin, int64_t end, T* edge) {                 \
    (task.total ? forward<false, T> : forward<true, T>)(task, begin, end, edge);                  \
  }                                                                                               \
  void bce_backward(const BceRows<T>& task, int64_t begin, int64_t end, T* edge) {                \
    (task.total ? backward<false, T> : backward<true, T>)(task, begin, end, edge);                \
  }
