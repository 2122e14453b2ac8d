// Products with several relations on processors with AVX-512: 16 neighbours are looked up at a time.

#include "relational_spmm.h"

#if defined(__x86_64__)

#include <immintrin.h>

// GCC 12 takes the undefined vectors inside its own intrinsics for a fault of ours.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

// After every include: what a shared header defines must not be compiled for this instruction set.
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,fma,popcnt,bmi,bmi2,prefer-vector-width=512")

namespace cellattn::avx512 {
namespace {

inline __mmask16 first_lanes(int64_t n) { return n >= 16 ? 0xffff : static_cast<__mmask16>((1u << n) - 1); }

// Places of the neighbours in `lanes`, -1 elsewhere.
inline __m512i places(__mmask16 lanes, const int32_t* col, const int32_t* place) {
  return _mm512_mask_i32gather_epi32(_mm512_set1_epi32(-1), lanes, _mm512_maskz_loadu_epi32(lanes, col), place, 4);
}

inline __mmask16 that_send(__m512i p) { return static_cast<__mmask16>(~_mm512_movepi32_mask(p)); }

// The weights in `sends` of those in `lanes`, side by side.
inline void pack(__mmask16 lanes, __mmask16 sends, const float* value, float* out) {
  _mm512_storeu_ps(out, _mm512_maskz_compress_ps(sends, _mm512_maskz_loadu_ps(lanes, value)));
}

inline void pack(__mmask16 lanes, __mmask16 sends, const double* value, double* out) {
  const __mmask8 low = static_cast<__mmask8>(sends), high = static_cast<__mmask8>(sends >> 8);
  const __m512d right = _mm512_maskz_loadu_pd(static_cast<__mmask8>(lanes >> 8), value + 8);
  _mm512_storeu_pd(out, _mm512_maskz_compress_pd(low, _mm512_maskz_loadu_pd(static_cast<__mmask8>(lanes), value)));
  _mm512_storeu_pd(out + __builtin_popcount(low), _mm512_maskz_compress_pd(high, right));
}

// Places and weights of a row's neighbours that send, in order; how many. Whole vectors are stored: compressing into memory is slow
// on some processors.
template <class T>
inline int64_t list_senders(
    const int32_t* col, const T* value, int64_t n, const int32_t* place, const KeptRow<T>& kept) {
  int64_t count = 0;
  for (int64_t e = 0; e < n; e += 16) {
    const __mmask16 lanes = first_lanes(n - e);
    const __m512i p = places(lanes, col + e, place);
    const __mmask16 sends = that_send(p);
    _mm512_storeu_si512(kept.col + count, _mm512_maskz_compress_epi32(sends, p));
    pack(lanes, sends, value + e, kept.value + count);
    count += __builtin_popcount(sends);
  }
  return count;
}

#define CELLATTN_VECTOR_BYTES 64
#include "relational_spmm_impl.h"

}  // namespace

CELLATTN_DEFINE_RELATIONAL(float)
CELLATTN_DEFINE_RELATIONAL(double)

int64_t count_senders(const int32_t* col, int64_t n, const int32_t* place) {
  int64_t count = 0;
  for (int64_t e = 0; e < n; e += 16) count += __builtin_popcount(that_send(places(first_lanes(n - e), col + e, place)));
  return count;
}

}  // namespace cellattn::avx512

#pragma GCC pop_options

#endif
