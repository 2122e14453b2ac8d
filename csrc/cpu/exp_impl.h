// Vectors, and exponentials of them, compiled for each instruction set. CELLATTN_VECTOR_BYTES is the widest vector of it.

template <class T>
struct Lanes {
  typedef T Value __attribute__((vector_size(CELLATTN_VECTOR_BYTES)));
  typedef T Load __attribute__((vector_size(CELLATTN_VECTOR_BYTES), aligned(sizeof(T)), may_alias));
  static constexpr int64_t kCount = CELLATTN_VECTOR_BYTES / sizeof(T);
};

// Not those of the standard library: what they are inlined from is shared with other instruction sets.
inline float exp_of(float x) { return __builtin_expf(x); }
inline double exp_of(double x) { return __builtin_exp(x); }
inline float log_of(float x) { return __builtin_logf(x); }
inline double log_of(double x) { return __builtin_log(x); }

// e^x; 0 below -87.3, where float has no normal number left, infinity above 88.7, NaN of NaN.
inline typename Lanes<float>::Value exp_of(typename Lanes<float>::Value x) {
  using V = typename Lanes<float>::Value;
  typedef int32_t I __attribute__((vector_size(CELLATTN_VECTOR_BYTES)));
  const V least = V{} - 87.3f, most = V{} + 88.7f, above = V{} + __builtin_inff();
  const I gone = x < least;
  V in = x < least ? least : x;
  in = x > most ? most : in;
  // 2^n e^r with n the nearest integer to x / log 2, found by adding what leaves no digit behind the point, and |r| <= log(2) / 2
  const V magic = V{} + 12582912.0f;
  const V n = (in * 1.44269504f + magic) - magic;
  const V r = (in - n * 0.693359375f) - n * -2.12194440e-4f;  // log 2 in two parts, the first times n exact
  // Taylor's series, whose next term is below 6e-9
  V e = r * (1.0f / 5040) + 1.0f / 720;
  e = e * r + 1.0f / 120;
  e = e * r + 1.0f / 24;
  e = e * r + 1.0f / 6;
  e = e * r + 0.5f;
  e = (e * (r * r) + r) + 1.0f;
  const I power = __builtin_convertvector(n, I) << 23;
  const V y = reinterpret_cast<V>((reinterpret_cast<I>(e) + power) & ~gone);
  return x <= most ? y : x > most ? above : x;
}

inline typename Lanes<double>::Value exp_of(typename Lanes<double>::Value x) {
  for (int64_t i = 0; i < Lanes<double>::kCount; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}
