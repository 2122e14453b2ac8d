// Induced edges on processors with AVX-512: 16 edges by 16 samples at a time.

#include "induced.h"

#if defined(__x86_64__)

#include <immintrin.h>

// GCC 12 takes the undefined vectors inside its own intrinsics for a fault of ours.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

// After every include: what a shared header defines must not be compiled for this instruction set.
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,popcnt,bmi,bmi2")

namespace cellattn::avx512 {
namespace {

typedef Word Word8 __attribute__((vector_size(64)));

inline bool any(const Word8& words) {
  const __m512i v = reinterpret_cast<const __m512i&>(words);
  return _mm512_test_epi64_mask(v, v) != 0;
}

inline unsigned members(const int32_t* rank) {
  return static_cast<unsigned>(static_cast<uint16_t>(~_mm512_movepi32_mask(_mm512_load_si512(rank))));
}

inline void finish_stores() { _mm_sfence(); }

// In the cache's own lines past the cache; the parts of a line at both ends, which others may share, through it.
inline void store(int32_t* out, const int32_t* in, int64_t n, int64_t base) {
  const __m512i add = _mm512_set1_epi32(static_cast<int32_t>(base));
  int64_t k = 0;
  int64_t head = static_cast<int64_t>(((64 - (reinterpret_cast<uintptr_t>(out) & 63)) & 63) / 4);
  if (head > n) head = n;
  if (head) {
    const __mmask16 m = static_cast<__mmask16>((1u << head) - 1);
    _mm512_mask_storeu_epi32(out, m, _mm512_add_epi32(_mm512_loadu_si512(in), add));
    k = head;
  }
  for (; k + 16 <= n; k += 16) {
    _mm512_stream_si512(
        reinterpret_cast<__m512i*>(out + k), _mm512_add_epi32(_mm512_loadu_si512(in + k), add));
  }
  if (k < n) {
    const __mmask16 m = static_cast<__mmask16>((1u << (n - k)) - 1);
    _mm512_mask_storeu_epi32(out + k, m, _mm512_add_epi32(_mm512_maskz_loadu_epi32(m, in + k), add));
  }
}

inline __m512i widened(const int32_t* in, __m512i add) {
  const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in));
  return _mm512_add_epi64(_mm512_cvtepi32_epi64(narrow), add);
}

inline void store(int64_t* out, const int32_t* in, int64_t n, int64_t base) {
  const __m512i add = _mm512_set1_epi64(base);
  int64_t k = 0;
  int64_t head = static_cast<int64_t>(((64 - (reinterpret_cast<uintptr_t>(out) & 63)) & 63) / 8);
  if (head > n) head = n;
  if (head) {
    _mm512_mask_storeu_epi64(out, static_cast<__mmask8>((1u << head) - 1), widened(in, add));
    k = head;
  }
  for (; k + 8 <= n; k += 8) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out + k), widened(in + k, add));
  }
  if (k < n) {
    const __mmask8 m = static_cast<__mmask8>((1u << (n - k)) - 1);
    const __m256i narrow = _mm256_maskz_loadu_epi32(m, in + k);
    _mm512_mask_storeu_epi64(out + k, m, _mm512_add_epi64(_mm512_cvtepi32_epi64(narrow), add));
  }
}

// rows[k] lane s <-> rows[s] lane k
inline void transpose(__m512i* r) {
  __m512i t[16];
  for (int k = 0; k < 16; k += 2) {
    t[k] = _mm512_unpacklo_epi32(r[k], r[k + 1]);
    t[k + 1] = _mm512_unpackhi_epi32(r[k], r[k + 1]);
  }
  for (int k = 0; k < 16; k += 4) {
    r[k] = _mm512_unpacklo_epi64(t[k], t[k + 2]);
    r[k + 1] = _mm512_unpackhi_epi64(t[k], t[k + 2]);
    r[k + 2] = _mm512_unpacklo_epi64(t[k + 1], t[k + 3]);
    r[k + 3] = _mm512_unpackhi_epi64(t[k + 1], t[k + 3]);
  }
  for (int k = 0; k < 4; ++k) {
    t[k] = _mm512_shuffle_i32x4(r[k], r[k + 4], 0x88);
    t[k + 4] = _mm512_shuffle_i32x4(r[k], r[k + 4], 0xDD);
    t[k + 8] = _mm512_shuffle_i32x4(r[k + 8], r[k + 12], 0x88);
    t[k + 12] = _mm512_shuffle_i32x4(r[k + 8], r[k + 12], 0xDD);
  }
  for (int k = 0; k < 8; ++k) {
    r[k] = _mm512_shuffle_i32x4(t[k], t[k + 8], 0x88);
    r[k + 8] = _mm512_shuffle_i32x4(t[k], t[k + 8], 0xDD);
  }
}

#include "induced_impl.h"

// Up to 16 edges of a row for one sample: `rank` holds their targets' ranks, -1 where the sample has no such gene.
template <class T, bool HasSource, bool HasId>
inline void append_block(
    Stage<T, HasSource, HasId>& stage, const WriteTask& task, int s, int32_t source, __m512i rank, __m512i edges) {
  const __mmask16 kept = static_cast<__mmask16>(~_mm512_movepi32_mask(rank));
  const int64_t at = stage.fill[s];
  _mm512_storeu_si512(stage.target[s] + at, _mm512_maskz_compress_epi32(kept, rank));
  if (HasSource) _mm512_storeu_si512(stage.source[s] + at, _mm512_set1_epi32(source));
  if (HasId) _mm512_storeu_si512(stage.edge[s] + at, _mm512_maskz_compress_epi32(kept, edges));
  stage.fill[s] = at + __builtin_popcount(kept);
  if (stage.fill[s] >= kStaged) stage.flush(task, s);
}

template <class T, bool HasSource, bool HasId>
inline void append_row(
    Stage<T, HasSource, HasId>& stage, const WriteTask& task, const int32_t* rank_i, unsigned samples, int64_t begin,
    int64_t end, int64_t relation_begin) {
  constexpr int kFewEdges = 3, kFewSamples = 2;  // below, a block would be mostly empty
  const __m512i none = _mm512_set1_epi32(-1);
  const __m512i iota = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const bool few_samples = __builtin_popcount(samples) <= kFewSamples;
  for (int64_t e = begin; e < end; e += 16) {
    const int64_t n = end - e < 16 ? end - e : 16;
    if (n <= kFewEdges) {
      for (int64_t k = e; k < end; ++k) {
        append_one(stage, task, rank_i, samples, k, static_cast<int32_t>(k - relation_begin));
      }
      return;
    }
    const __m512i edges = _mm512_add_epi32(iota, _mm512_set1_epi32(static_cast<int32_t>(e - relation_begin)));
    const __mmask16 there = static_cast<__mmask16>((1u << n) - 1);
    if (few_samples) {
      const __m512i cols = _mm512_maskz_loadu_epi32(there, task.col + e);
      for (unsigned left = samples; left != 0; left &= left - 1) {
        const int s = __builtin_ctz(left);
        const __m512i rank = _mm512_mask_i32gather_epi32(none, there, _mm512_slli_epi32(cols, 4), task.rank + s, 4);
        append_block(stage, task, s, rank_i[s], rank, edges);
      }
      continue;
    }
    __m512i rank[16];
    const int32_t* col = task.col + e;
    if (n == 16) {
      for (int k = 0; k < 16; ++k) rank[k] = _mm512_load_si512(task.rank + static_cast<int64_t>(col[k]) * kGroup);
    } else {
      for (int k = 0; k < 16; ++k) {
        rank[k] = k < n ? _mm512_load_si512(task.rank + static_cast<int64_t>(col[k]) * kGroup) : none;
      }
    }
    transpose(rank);
    for (unsigned left = samples; left != 0; left &= left - 1) {
      const int s = __builtin_ctz(left);
      append_block(stage, task, s, rank_i[s], rank[s], edges);
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
