// The body of attention_rows_{portable,avx2,avx512}.cpp: the same text, compiled for each instruction set.
// CELLATTN_VECTOR_BYTES is the widest vector of the instruction set.

#include "exp_impl.h"
#include "philox_impl.h"

// ------------------------------------------------------------------------------------------------------------ products

// c[m, n] = sum_k a[m, k] b[k, n], or added to what is there, for M rows and N vectors of columns; the sums in registers.
template <int M, int N, bool Add, class T>
inline void multiply_tile(
    int64_t depth, const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t b_row, T* c, int64_t c_row) {
  using Load = typename Lanes<T>::Load;
  constexpr int64_t kLanes = Lanes<T>::kCount;
  typename Lanes<T>::Value sum[M][N] = {};
  for (int64_t k = 0; k < depth; ++k) {
    typename Lanes<T>::Value from[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) from[n] = *reinterpret_cast<const Load*>(b + k * b_row + n * kLanes);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[m][n] += a[m * a_row + k * a_col] * from[n];
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      Load* to = reinterpret_cast<Load*>(c + m * c_row + n * kLanes);
      *to = Add ? *to + sum[m][n] : sum[m][n];
    }
  }
}

// The whole product: `rows` a multiple of 4, `cols` of a vector.
template <bool Add, class T>
inline void multiply(
    int64_t rows, int64_t cols, int64_t depth, const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t b_row, T* c,
    int64_t c_row) {
  constexpr int64_t kLanes = Lanes<T>::kCount;
  for (int64_t n = 0; n < cols;) {
    const int64_t left = (cols - n) / kLanes;
    for (int64_t m = 0; m < rows; m += 4) {
      const T* am = a + m * a_row;
      T* cm = c + m * c_row + n;
      if (left >= 3) {
        multiply_tile<4, 3, Add>(depth, am, a_row, a_col, b + n, b_row, cm, c_row);
      } else if (left == 2) {
        multiply_tile<4, 2, Add>(depth, am, a_row, a_col, b + n, b_row, cm, c_row);
      } else {
        multiply_tile<4, 1, Add>(depth, am, a_row, a_col, b + n, b_row, cm, c_row);
      }
    }
    n += (left >= 3 ? 3 : left) * kLanes;
  }
}

// ----------------------------------------------------------------------------------------------------------- functions

// x where the entry stays, else 0.
inline typename Lanes<float>::Value kept(typename Lanes<float>::Value x, const int32_t* keep) {
  typedef int32_t I __attribute__((vector_size(CELLATTN_VECTOR_BYTES)));
  typedef int32_t L __attribute__((vector_size(CELLATTN_VECTOR_BYTES), aligned(4), may_alias));
  return reinterpret_cast<typename Lanes<float>::Value>(reinterpret_cast<I>(x) & *reinterpret_cast<const L*>(keep));
}

inline typename Lanes<double>::Value kept(typename Lanes<double>::Value x, const int32_t* keep) {
  for (int64_t i = 0; i < Lanes<double>::kCount; ++i) x[i] = keep[i] ? x[i] : 0;
  return x;
}

// The largest of a vector's numbers, which is halved until one is left.
template <class T>
inline T largest_lane(typename Lanes<T>::Value x) {
  alignas(64) T lane[Lanes<T>::kCount];
  *reinterpret_cast<typename Lanes<T>::Load*>(lane) = x;
#pragma GCC unroll 5
  for (int64_t half = Lanes<T>::kCount / 2; half > 0; half /= 2) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < half; ++i) lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
  }
  return lane[0];
}

template <class T>
inline void zero(T* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = T{0};
}

// `count` rows of x [.., n], times `factor`, into rows of `width`; the others of the block stay as they are.
template <class T>
inline void copy_rows(const T* x, int64_t count, int64_t n, T factor, T* to, int64_t width) {
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t d = 0; d < n; ++d) to[r * width + d] = factor * x[r * n + d];
  }
}

template <class T>
inline void copy_columns(const T* x, int64_t count, int64_t n, T* to, int64_t width) {
  for (int64_t d = 0; d < n; ++d) {
    for (int64_t r = 0; r < count; ++r) to[d * width + r] = x[r * n + d];
  }
}

// -------------------------------------------------------------------------------------------------------------- passes

template <class T>
T largest(const T* x, int64_t n) {
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> I;
  const I without_sign = static_cast<I>(~(I{1} << (8 * sizeof(T) - 1)));
  I most = 0;  // as numbers are, so are their bits in order, and NaN's lie above infinity's
  for (int64_t i = 0; i < n; ++i) {
    I bits;
    __builtin_memcpy(&bits, x + i, sizeof(T));
    bits &= without_sign;
    most = bits > most ? bits : most;
  }
  T result;
  __builtin_memcpy(&result, &most, sizeof(T));
  return result;
}

template <class T>
void pack(const AttentionRows<T>& task, int64_t head) {
  const int64_t n = task.num_keys;
  const T* k = task.k + head * n * task.dim;
  const T* v = task.v + head * n * task.dim_v;
  copy_columns(k, n, task.dim, task.k_columns + head * task.dim * task.padded_keys, task.padded_keys);
  if (task.v_rows) copy_rows(v, n, task.dim_v, T{1}, task.v_rows + head * task.padded_keys * task.width_v, task.width_v);
  if (task.k_rows) copy_rows(k, n, task.dim, T{1}, task.k_rows + head * task.padded_keys * task.width, task.width);
  if (task.v_columns) copy_columns(v, n, task.dim_v, task.v_columns + head * task.dim_v * task.padded_keys, task.padded_keys);
}

// -inf for the keys of a block that are none or left out, 0 for the others; whether there is such a key.
template <class T>
inline bool fill_bias(const AttentionRows<T>& task, int64_t head, int64_t j, int64_t keys, T* bias) {
  const T nothing = -static_cast<T>(__builtin_inf());
  if (!task.key_mask && j + keys <= task.num_keys) return false;
  const bool* mask = task.key_mask ? task.key_mask + head * task.num_keys + j : nullptr;
  for (int64_t c = 0; c < keys; ++c) bias[c] = j + c < task.num_keys && (!mask || mask[c]) ? T{0} : nothing;
  return true;
}

template <bool Dropped, class T>
void forward(const AttentionRows<T>& task, int64_t head, int64_t begin, int64_t end, T* room) {
  using V = typename Lanes<T>::Value;
  constexpr int64_t kLanes = Lanes<T>::kCount, kKeys = kMapKeys, kRows = kMapRows;
  const T nothing = -static_cast<T>(__builtin_inf());
  const int64_t d = task.dim, w = task.width, dv = task.dim_v, wv = task.width_v, padded = task.padded_keys;
  T* s = room;
  T* q = s + kRows * kKeys;
  T* o = q + kRows * w;
  alignas(64) int32_t keep[kKeys];
  alignas(64) T bias[kKeys];
  const T* k = task.k_columns + head * d * padded;
  const T* v = task.v_rows + head * padded * wv;
  for (int64_t first = begin; first < end; first += kRows) {
    const int64_t rows = end - first < kRows ? end - first : kRows, whole = (rows + 3) / 4 * 4;
    T largest[kRows];
    V total[kRows];  // lane by lane
    for (int64_t r = 0; r < rows; ++r) largest[r] = nothing, total[r] = V{};
    zero(o, whole * wv);
    copy_rows(task.q + (head * task.num_queries + first) * d, rows, d, task.scale, q, w);
    for (int64_t j = 0; j < padded; j += kKeys) {
      const int64_t keys = padded - j < kKeys ? padded - j : kKeys;
      const bool partial = fill_bias(task, head, j, keys, bias);
      multiply<false>(whole, keys, d, q, w, 1, k + j, padded, s, kKeys);
      for (int64_t r = 0; r < rows; ++r) {
        V* entry = reinterpret_cast<V*>(s + r * kKeys);
        if (partial) {
          for (int64_t c = 0; c < keys / kLanes; ++c) entry[c] += reinterpret_cast<V*>(bias)[c];
        }
        V top = entry[0];
        for (int64_t c = 1; c < keys / kLanes; ++c) top = top > entry[c] ? top : entry[c];
        const T here = largest_lane<T>(top), most = here > largest[r] ? here : largest[r];
        if (most > largest[r]) {
          const T factor = exp_of(largest[r] - most);
          total[r] *= factor;
          for (int64_t c = 0; c < wv; ++c) o[r * wv + c] *= factor;
          largest[r] = most;
        }
        if (Dropped) fill_keep(task.bits, head, first + r, j / kKeys, keep);
        const T pivot = most == nothing ? T{0} : most;  // no key so far
        V sum = total[r];
        for (int64_t c = 0; c < keys / kLanes; ++c) {
          const V p = exp_of(entry[c] - pivot);
          sum += p;
          entry[c] = Dropped ? kept(p, keep + c * kLanes) : p;
        }
        total[r] = sum;
      }
      multiply<true>(whole, wv, keys, s, kKeys, 1, v + j * wv, wv, o, wv);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = head * task.num_queries + first + r;
      T sum = 0;
      for (int64_t c = 0; c < kLanes; ++c) sum += total[r][c];
      task.lse[i] = largest[r] + log_of(sum);
      for (int64_t c = 0; c < dv; ++c) task.out[i * dv + c] = o[r * wv + c] * (task.rescale / sum);
    }
  }
}

// With Z = keep / (1 - p) and D = rowsum(dOut Out) - dLSE:  dV = (P Z)' dOut,  dS = P (Z dOut V' - D),  dQ = scale dS K,
// dK = scale dS' Q.
template <bool Dropped, class T>
void backward(const AttentionRows<T>& task, int64_t head, int64_t begin, int64_t end, T* dk, T* dv, T* room) {
  using V = typename Lanes<T>::Value;
  constexpr int64_t kLanes = Lanes<T>::kCount, kKeys = kMapKeys, kRows = kMapRows;
  const T infinity = static_cast<T>(__builtin_inf());
  const int64_t d = task.dim, w = task.width, e = task.dim_v, wv = task.width_v, padded = task.padded_keys;
  T* s = room;
  T* ds = s + kRows * kKeys;
  T* q = ds + kRows * kKeys;
  T* dq = q + kRows * w;
  T* g = dq + kRows * w;
  alignas(64) int32_t keep[kKeys];
  alignas(64) T bias[kKeys];
  const T* k_columns = task.k_columns + head * d * padded;
  const T* v_columns = task.v_columns + head * e * padded;
  const T* k_rows = task.k_rows + head * padded * w;
  for (int64_t first = begin; first < end; first += kRows) {
    const int64_t rows = end - first < kRows ? end - first : kRows, whole = (rows + 3) / 4 * 4;
    const int64_t at = head * task.num_queries + first;
    T delta[kRows], total[kRows];
    for (int64_t r = 0; r < rows; ++r) {
      T sum = task.dlse ? -task.dlse[at + r] : T{0};
      for (int64_t c = 0; c < e; ++c) sum += task.dout[(at + r) * e + c] * task.out[(at + r) * e + c];
      delta[r] = sum;
      total[r] = task.lse[at + r] == -infinity ? infinity : task.lse[at + r];  // P is 0 in a row without keys
    }
    zero(dq, whole * w);
    copy_rows(task.q + at * d, rows, d, task.scale, q, w);
    copy_rows(task.dout + at * e, rows, e, task.rescale, g, wv);
    for (int64_t j = 0; j < padded; j += kKeys) {
      const int64_t keys = padded - j < kKeys ? padded - j : kKeys;
      const bool partial = fill_bias(task, head, j, keys, bias);
      multiply<false>(whole, keys, d, q, w, 1, k_columns + j, padded, s, kKeys);
      multiply<false>(whole, keys, e, g, wv, 1, v_columns + j, padded, ds, kKeys);
      for (int64_t r = 0; r < rows; ++r) {
        V* entry = reinterpret_cast<V*>(s + r * kKeys);
        V* slope = reinterpret_cast<V*>(ds + r * kKeys);
        if (partial) {
          for (int64_t c = 0; c < keys / kLanes; ++c) entry[c] += reinterpret_cast<V*>(bias)[c];
        }
        if (Dropped) fill_keep(task.bits, head, first + r, j / kKeys, keep);
        for (int64_t c = 0; c < keys / kLanes; ++c) {
          const V p = exp_of(entry[c] - total[r]);
          slope[c] = p * ((Dropped ? kept(slope[c], keep + c * kLanes) : slope[c]) - delta[r]);
          entry[c] = Dropped ? kept(p, keep + c * kLanes) : p;
        }
      }
      multiply<true>(whole, w, keys, ds, kKeys, 1, k_rows + j * w, w, dq, w);
      multiply<true>(keys, w, rows, ds, 1, kKeys, q, w, dk + j * w, w);
      multiply<true>(keys, wv, rows, s, 1, kKeys, g, wv, dv + j * wv, wv);
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < d; ++c) task.dq[(at + r) * d + c] = task.scale * dq[r * w + c];
    }
  }
}

#define CELLATTN_DEFINE_ATTENTION(T)                                                                             \
  T attention_largest(const T* x, int64_t n) { return largest(x, n); }                                           \
  void attention_pack(const AttentionRows<T>& task, int64_t head) { pack(task, head); }                          \
  void attention_forward(const AttentionRows<T>& task, int64_t head, int64_t begin, int64_t end, T* room) {      \
    (task.bits.threshold ? forward<true, T> : forward<false, T>)(task, head, begin, end, room);                  \
  }                                                                                                              \
  void attention_backward(                                                                                       \
      const AttentionRows<T>& task, int64_t head, int64_t begin, int64_t end, T* dk, T* dv, T* room) {           \
    (task.bits.threshold ? backward<true, T> : backward<false, T>)(task, head, begin, end, dk, dv, room);        \
  }
