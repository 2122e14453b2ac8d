// Sums of rows of features named by a list, the same text compiled for each instruction set: what the products with graphs share.

// 64 bytes of features; memory they are read from is aligned to an element only.
template <class T>
struct Vector {
  typedef T Aligned __attribute__((vector_size(64)));
  typedef T Type __attribute__((vector_size(64), aligned(sizeof(T)), may_alias));
  static constexpr int kLanes = 64 / sizeof(T);
};

// out[0 .. Vectors * lanes) = scale * sum_n value_n x[col_n], or added to what is there; the sums in registers.
template <int Vectors, class T, bool HasValue, bool Add>
inline void sum_tile(const int32_t* col, const T* value, int64_t n, const T* x, int64_t stride, T scale, T* out) {
  using V = typename Vector<T>::Type;
  typename Vector<T>::Aligned sum[Vectors] = {};
  for (int64_t k = 0; k < n; ++k) {
    const V* from = reinterpret_cast<const V*>(x + static_cast<int64_t>(col[k]) * stride);
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) sum[v] += HasValue ? value[k] * from[v] : from[v];
  }
  V* to = reinterpret_cast<V*>(out);
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) to[v] = Add ? to[v] + scale * sum[v] : scale * sum[v];
}

template <class T, bool HasValue, bool Add>
inline void sum_one(const int32_t* col, const T* value, int64_t n, const T* x, int64_t stride, T scale, T* out) {
  T sum = 0;
  for (int64_t k = 0; k < n; ++k) {
    const T from = x[static_cast<int64_t>(col[k]) * stride];
    sum += HasValue ? value[k] * from : from;
  }
  *out = Add ? *out + scale * sum : scale * sum;
}

template <class T, bool HasValue, bool Add>
void sum_features(const int32_t* col, const T* value, int64_t n, const T* x, int64_t stride, int64_t width, T scale, T* out) {
  constexpr int kLanes = Vector<T>::kLanes;
  int64_t f = 0;
  for (; f + 4 * kLanes <= width; f += 4 * kLanes) {
    sum_tile<4, T, HasValue, Add>(col, value, n, x + f, stride, scale, out + f);
  }
  for (; f + kLanes <= width; f += kLanes) sum_tile<1, T, HasValue, Add>(col, value, n, x + f, stride, scale, out + f);
  for (; f < width; ++f) sum_one<T, HasValue, Add>(col, value, n, x + f, stride, scale, out + f);
}

template <class T>
inline void zero_row(int64_t n, T* out) {
  for (int64_t f = 0; f < n; ++f) out[f] = T{0};
}

template <class T>
inline void copy_row(const T* in, int64_t n, T* out) {
  for (int64_t f = 0; f < n; ++f) out[f] = in[f];
}
