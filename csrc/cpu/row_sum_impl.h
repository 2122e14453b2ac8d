// Sums of rows of features named by a list, the same text compiled for each instruction set: what the products with graphs share.
// CELLATTN_VECTOR_BYTES is the widest vector of the instruction set.

// Features side by side; memory they are read from is aligned to an element only.
template <class T, int Bytes = CELLATTN_VECTOR_BYTES>
struct Vector {
  typedef T Aligned __attribute__((vector_size(Bytes)));
  typedef T Type __attribute__((vector_size(Bytes), aligned(sizeof(T)), may_alias));
  static constexpr int kLanes = Bytes / sizeof(T);
};

// out[0 .. Vectors * lanes) = scale * sum_n value_n x[col_n], or added to what is there; the sums in registers, of few vectors in
// several that do not wait for each other.
template <int Vectors, int Bytes, class T, bool HasValue, bool Add>
inline void sum_tile(const int32_t* col, const T* value, int64_t n, const T* x, int64_t stride, T scale, T* out) {
  constexpr int kParts = Vectors < 4 ? 4 / Vectors : 1;
  using V = typename Vector<T, Bytes>::Type;
  typename Vector<T, Bytes>::Aligned sum[kParts][Vectors] = {};
  const auto add = [&](int64_t k, int part) {
    const V* from = reinterpret_cast<const V*>(x + static_cast<int64_t>(col[k]) * stride);
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) sum[part][v] += HasValue ? value[k] * from[v] : from[v];
  };
  int64_t k = 0;
  for (; k + kParts <= n; k += kParts) {
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) add(k + part, part);
  }
  for (; k < n; ++k) add(k, 0);
  V* to = reinterpret_cast<V*>(out);
#pragma GCC unroll 8
  for (int v = 0; v < Vectors; ++v) {
#pragma GCC unroll 4
    for (int part = 1; part < kParts; ++part) sum[0][v] += sum[part][v];
    to[v] = Add ? to[v] + scale * sum[0][v] : scale * sum[0][v];
  }
}

// One feature, in four sums that do not wait for each other.
template <class T, bool HasValue, bool Add>
inline void sum_one(const int32_t* col, const T* value, int64_t n, const T* x, int64_t stride, T scale, T* out) {
  T part[4] = {};
  int64_t k = 0;
  for (; k + 4 <= n; k += 4) {
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p) {
      const T from = x[static_cast<int64_t>(col[k + p]) * stride];
      part[p] += HasValue ? value[k + p] * from : from;
    }
  }
  for (; k < n; ++k) {
    const T from = x[static_cast<int64_t>(col[k]) * stride];
    part[0] += HasValue ? value[k] * from : from;
  }
  const T sum = (part[0] + part[1]) + (part[2] + part[3]);
  *out = Add ? *out + scale * sum : scale * sum;
}

// What is left of the features when vectors of twice Bytes no longer fit, at most one of each narrower kind.
template <int Bytes, class T, bool HasValue, bool Add>
inline void sum_rest(
    const int32_t* col, const T* value, int64_t n, const T* x, int64_t stride, int64_t width, T scale, T* out) {
  if constexpr (Bytes < 2 * static_cast<int>(sizeof(T))) {
    if (width > 0) sum_one<T, HasValue, Add>(col, value, n, x, stride, scale, out);
  } else {
    constexpr int kLanes = Vector<T, Bytes>::kLanes;
    const bool fits = width >= kLanes;
    if (fits) sum_tile<1, Bytes, T, HasValue, Add>(col, value, n, x, stride, scale, out);
    const int64_t done = fits ? kLanes : 0;
    sum_rest<Bytes / 2, T, HasValue, Add>(col, value, n, x + done, stride, width - done, scale, out + done);
  }
}

template <class T, bool HasValue, bool Add>
void sum_features(const int32_t* col, const T* value, int64_t n, const T* x, int64_t stride, int64_t width, T scale, T* out) {
  constexpr int kBytes = CELLATTN_VECTOR_BYTES, kLanes = Vector<T>::kLanes;
  constexpr int kMany = kTileBytes / kBytes < 8 ? kTileBytes / kBytes : 8;  // half of the registers, at least
  int64_t f = 0;
  for (; f + kMany * kLanes <= width; f += kMany * kLanes) {
    sum_tile<kMany, kBytes, T, HasValue, Add>(col, value, n, x + f, stride, scale, out + f);
  }
  for (; f + 2 * kLanes <= width; f += 2 * kLanes) {
    sum_tile<2, kBytes, T, HasValue, Add>(col, value, n, x + f, stride, scale, out + f);
  }
  if (f < width) sum_rest<kBytes, T, HasValue, Add>(col, value, n, x + f, stride, width - f, scale, out + f);
}

template <class T>
inline void zero_row(int64_t n, T* out) {
  for (int64_t f = 0; f < n; ++f) out[f] = T{0};
}

template <class T>
inline void copy_row(const T* in, int64_t n, T* out) {
  for (int64_t f = 0; f < n; ++f) out[f] = in[f];
}
