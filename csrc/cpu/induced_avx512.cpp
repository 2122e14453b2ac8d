// Induced edges on processors with AVX-512: 16 edges by 32 samples at a time, in 16-bit ranks.

#include "induced.h"

#if defined(__x86_64__)

#include <immintrin.h>

// GCC 12 takes the undefined vectors inside its own intrinsics for a fault of ours.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

// After every include: what a shared header defines must not be compiled for this instruction set.
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx512vbmi2,popcnt,bmi,bmi2")

namespace cellattn::avx512 {
namespace {

using Rank = int16_t;
constexpr int64_t kGroup = 32;
constexpr int64_t kLineBytes = 64, kCarry = 16;

typedef Word Word8 __attribute__((vector_size(64)));

inline bool any(const Word8& words) {
  const __m512i v = reinterpret_cast<const __m512i&>(words);
  return _mm512_test_epi64_mask(v, v) != 0;
}

inline unsigned members(const Rank* rank) { return ~_mm512_movepi16_mask(_mm512_load_si512(rank)); }

inline void finish_stores() { _mm_sfence(); }

// As many numbers as a vector of T holds, widened; or the first of them.
template <class T>
struct Widened;

template <>
struct Widened<int64_t> {
  static constexpr int kLanes = 8;
  using Mask = __mmask8;
  static __m512i all(const int16_t* in) { return _mm512_cvtepi16_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in))); }
  static __m512i all(const int32_t* in) {
    return _mm512_cvtepi32_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in)));
  }
  static __m512i some(Mask m, const int16_t* in) { return _mm512_cvtepi16_epi64(_mm_maskz_loadu_epi16(m, in)); }
  static __m512i some(Mask m, const int32_t* in) { return _mm512_cvtepi32_epi64(_mm256_maskz_loadu_epi32(m, in)); }
  static __m512i constant(int64_t x) { return _mm512_set1_epi64(x); }
  static __m512i sum(__m512i a, __m512i b) { return _mm512_add_epi64(a, b); }
  static void put(int64_t* out, Mask m, __m512i x) { _mm512_mask_storeu_epi64(out, m, x); }
};

template <>
struct Widened<int32_t> {
  static constexpr int kLanes = 16;
  using Mask = __mmask16;
  static __m512i all(const int16_t* in) {
    return _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in)));
  }
  static __m512i all(const int32_t* in) { return _mm512_loadu_si512(in); }
  static __m512i some(Mask m, const int16_t* in) { return _mm512_cvtepi16_epi32(_mm256_maskz_loadu_epi16(m, in)); }
  static __m512i some(Mask m, const int32_t* in) { return _mm512_maskz_loadu_epi32(m, in); }
  static __m512i constant(int64_t x) { return _mm512_set1_epi32(static_cast<int32_t>(x)); }
  static __m512i sum(__m512i a, __m512i b) { return _mm512_add_epi32(a, b); }
  static void put(int32_t* out, Mask m, __m512i x) { _mm512_mask_storeu_epi32(out, m, x); }
};

// Whole cache lines past the caches; the parts of a line at both ends, which others may share, through them. With
// `whole_lines` the part at the end is left.
template <class T, class In>
inline void store(T* out, const In* in, int64_t n, int64_t base, bool whole_lines) {
  using W = Widened<T>;
  constexpr int64_t kLanes = W::kLanes;
  const __m512i add = W::constant(base);
  const auto first = [](int64_t lanes) { return static_cast<typename W::Mask>((1u << lanes) - 1); };
  int64_t k = static_cast<int64_t>(((64 - (reinterpret_cast<uintptr_t>(out) & 63)) & 63) / sizeof(T));
  if (k > n) k = n;
  if (k) W::put(out, first(k), W::sum(W::some(first(k), in), add));
  for (; k + kLanes <= n; k += kLanes) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out + k), W::sum(W::all(in + k), add));
  }
  if (k < n && !whole_lines) W::put(out + k, first(n - k), W::sum(W::some(first(n - k), in + k), add));
}

// f(s, the 16 ranks of sample s) for all 32 samples, of the ranks of 16 edges.
template <class F>
inline void for_each_sample(const __m512i* rank, const F& f) {
  __m512i half[2][8];  // [edges 0 to 7, 8 to 15][sample mod 8], a 128-bit lane for each of samples 0, 8, 16, 24 and on
  for (int h = 0; h < 2; ++h) {
    const __m512i* e = rank + 8 * h;
    __m512i a[8], b[8];
    for (int k = 0; k < 8; k += 2) {
      a[k] = _mm512_unpacklo_epi16(e[k], e[k + 1]);
      a[k + 1] = _mm512_unpackhi_epi16(e[k], e[k + 1]);
    }
    for (int k = 0; k < 8; k += 4) {
      b[k] = _mm512_unpacklo_epi32(a[k], a[k + 2]);
      b[k + 1] = _mm512_unpackhi_epi32(a[k], a[k + 2]);
      b[k + 2] = _mm512_unpacklo_epi32(a[k + 1], a[k + 3]);
      b[k + 3] = _mm512_unpackhi_epi32(a[k + 1], a[k + 3]);
    }
    for (int k = 0; k < 4; ++k) {
      half[h][2 * k] = _mm512_unpacklo_epi64(b[k], b[k + 4]);
      half[h][2 * k + 1] = _mm512_unpackhi_epi64(b[k], b[k + 4]);
    }
  }
  const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
#pragma GCC unroll 8
  for (int m = 0; m < 8; ++m) {
    const __m512i first = _mm512_permutex2var_epi64(half[0][m], low, half[1][m]);
    const __m512i second = _mm512_permutex2var_epi64(half[0][m], high, half[1][m]);
    f(m, _mm512_castsi512_si256(first));
    f(m + 8, _mm512_extracti64x4_epi64(first, 1));
    f(m + 16, _mm512_castsi512_si256(second));
    f(m + 24, _mm512_extracti64x4_epi64(second, 1));
  }
}

#include "induced_impl.h"

// Up to 16 edges of a row for one sample: `rank` holds their targets' ranks, -1 where the sample has no such gene.
template <class T, bool HasSource, bool HasId>
inline void append_block(Stage<T, HasSource, HasId>& stage, int s, Rank source, __m256i rank, __m512i edges) {
  const __mmask16 kept = static_cast<__mmask16>(~_mm256_movepi16_mask(rank));
  const int64_t at = stage.end[s];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(stage.target[s] + at), _mm256_maskz_compress_epi16(kept, rank));
  if (HasSource) _mm256_storeu_si256(reinterpret_cast<__m256i*>(stage.source[s] + at), _mm256_set1_epi16(source));
  if (HasId) _mm512_storeu_si512(stage.edge[s] + at, _mm512_maskz_compress_epi32(kept, edges));
  stage.end[s] = at + __builtin_popcount(kept);
}

template <class T, bool HasSource, bool HasId>
inline void append_row(
    Stage<T, HasSource, HasId>& stage, const WriteTask& task, const Rank* rank_i, unsigned samples, int64_t begin,
    int64_t end, int64_t relation_begin) {
  constexpr int kFewEdges = 3, kFewSamples = 5;  // below, a block would be mostly empty
  const __m512i none = _mm512_set1_epi32(-1);
  const __m512i iota = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i absent = _mm512_srai_epi16(_mm512_load_si512(rank_i), 15);  // -1 in samples without the row's own gene
  const int64_t last_edge = task.rowptr[task.last_row];
  const bool few_samples = __builtin_popcount(samples) <= kFewSamples;
  for (int64_t e = begin; e < end; e += 16) {
    const int64_t n = end - e < 16 ? end - e : 16;
    if (n <= kFewEdges) {
      for (int64_t k = e; k < end; ++k) {
        append_one(stage, task, rank_i, samples, k, static_cast<int32_t>(k - relation_begin));
      }
      return;
    }
    stage.reserve(task, n);
    const __m512i edges = _mm512_add_epi32(iota, _mm512_set1_epi32(static_cast<int32_t>(e - relation_begin)));
    const int32_t* col = task.col + e;
    if (few_samples) {
      const __mmask16 there = static_cast<__mmask16>((1u << n) - 1);
      const __m512i place = _mm512_slli_epi32(_mm512_maskz_loadu_epi32(there, col), 5);
      for (unsigned left = samples; left != 0; left &= left - 1) {
        const int s = __builtin_ctz(left);
        // 32 bits a rank are read; the sign of the lower 16 is that of all after the conversion
        const __m512i wide = _mm512_mask_i32gather_epi32(none, there, place, ranks_of(task, 0) + s, sizeof(Rank));
        append_block(stage, s, rank_i[s], _mm512_cvtepi32_epi16(wide), edges);
      }
    } else {
      if (e + 2 * 16 <= last_edge) {  // of this row or of those after it
        for (int k = 16; k < 32; ++k) _mm_prefetch(reinterpret_cast<const char*>(ranks_of(task, col[k])), _MM_HINT_T0);
      }
      __m512i rank[16];
      if (n == 16) {
        for (int k = 0; k < 16; ++k) rank[k] = _mm512_or_si512(absent, _mm512_load_si512(ranks_of(task, col[k])));
      } else {
        for (int k = 0; k < 16; ++k) {
          rank[k] = k < n ? _mm512_or_si512(absent, _mm512_load_si512(ranks_of(task, col[k]))) : none;
        }
      }
      for_each_sample(rank, [&](int s, __m256i mine) { append_block(stage, s, rank_i[s], mine, edges); });
    }
  }
}

}  // namespace

void count_edges(
    const int64_t* rowptr, const int32_t* col, const Word* words, int64_t begin, int64_t end, int64_t* counts) {
  BitCounter<Word8> counter;
  Word8 pending[8] = {};
  int num_pending = 0;
  for (int64_t i = begin; i < end; ++i) {
    if (words[i] == 0) continue;
    const __m512i word = _mm512_set1_epi64(static_cast<int64_t>(words[i]));
    for (int64_t e = rowptr[i]; e < rowptr[i + 1]; e += 8) {
      const int64_t n = rowptr[i + 1] - e < 8 ? rowptr[i + 1] - e : 8;
      const __mmask8 there = static_cast<__mmask8>((1u << n) - 1);
      const __m256i cols = _mm256_maskz_loadu_epi32(there, col + e);
      const __m512i at = _mm512_mask_i32gather_epi64(_mm512_setzero_si512(), there, cols, words, 8);
      pending[num_pending++] = reinterpret_cast<Word8>(_mm512_and_si512(at, word));
      if (num_pending == 8) {
        counter.add(pending);
        num_pending = 0;
      }
    }
  }
  for (int k = num_pending; k < 8; ++k) pending[k] = Word8{};
  counter.add(pending);
  alignas(64) Word planes[kPlanes][8];
  for (int k = 0; k < kPlanes; ++k) _mm512_store_si512(planes[k], reinterpret_cast<__m512i>(counter.plane[k]));
  for (int lane = 0; lane < 8; ++lane) add_counts(&planes[0][lane], 8, counts);
}

void write_edges32(const WriteTask& task) { write_edges<int32_t>(task); }
void write_edges64(const WriteTask& task) { write_edges<int64_t>(task); }

}  // namespace cellattn::avx512

#pragma GCC pop_options

#endif
