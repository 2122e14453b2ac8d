// The body of edge_blocks_{portable,avx2,avx512}.cpp: the same text, compiled for each instruction set.

#include "attention_rows_impl.h"

// -1 or 0 for each bit of a word.
inline void spread_bits(uint64_t word, int32_t* keep) {
  for (int half = 0; half < 2; ++half) {
    const uint32_t bits = static_cast<uint32_t>(word >> 32 * half);
    for (int c = 0; c < 32; ++c) keep[32 * half + c] = -static_cast<int32_t>(bits >> c & 1);
  }
}

// Which of the keys from j on query i sees; scores of what it sees twice gain log 2. False where it sees none.
template <class T>
inline bool see(const EdgeBlocks<T>& task, int64_t head, int64_t i, int64_t j, T* score, int32_t* keep) {
  const uint64_t word = task.seen[head][i * (task.rows.padded_keys / kMapKeys) + j / kMapKeys];
  if (!word) return false;
  spread_bits(word, keep);
  const int64_t own = task.num_prefix + i - j;
  if (own >= 0 && own < kMapKeys && task.twice[head][i]) score[own] += static_cast<T>(0.69314718055994530942);
  return true;
}

// Which of the keys from j on stay, if seen. Returns what of its own entry does, in its block: of two, one may.
template <class T>
inline T fill_stay(const EdgeBlocks<T>& task, int64_t head, int64_t i, int64_t j, int32_t* stay) {
  const DropoutBits& bits = task.rows.bits;
  const int64_t row = task.num_prefix + i, own = row - j;
  const bool sees_itself = task.self_loops && own >= 0 && own < kMapKeys;
  fill_keep(bits.copy(1 + task.tie[head]), head, row, j / kMapKeys, stay);
  if (!sees_itself && j >= task.num_prefix) return T{1};
  alignas(64) int32_t near[kMapKeys];
  fill_keep(bits, head, row, j / kMapKeys, near);
  for (int64_t c = 0; c < kMapKeys && j + c < task.num_prefix; ++c) stay[c] = near[c];
  if (!sees_itself) return T{1};
  const bool by_edge = task.twice[head][i] && stay[own], by_itself = near[own];
  stay[own] = by_edge || by_itself ? -1 : 0;
  return task.twice[head][i] && by_edge != by_itself ? static_cast<T>(0.5) : T{1};
}

// A row's entries of a block, 0 where they do not stay.
template <class T>
inline void drop(const EdgeBlocks<T>& task, int64_t i, int64_t j, const int32_t* stay, T part, T* row) {
  using V = typename Lanes<T>::Value;
  constexpr int64_t kLanes = Lanes<T>::kCount;
  V* entry = reinterpret_cast<V*>(row);
  for (int64_t c = 0; c < kMapKeys / kLanes; ++c) entry[c] = kept(entry[c], stay + c * kLanes);
  if (part != T{1}) row[task.num_prefix + i - j] *= part;
}

template <class T>
void masked_forward(const EdgeBlocks<T>& blocks, int64_t head, int64_t begin, int64_t end, T* room) {
  using V = typename Lanes<T>::Value;
  constexpr int64_t kLanes = Lanes<T>::kCount, kKeys = kMapKeys, kRows = kMapRows;
  const AttentionRows<T>& task = blocks.rows;
  const T nothing = -static_cast<T>(__builtin_inf());
  const int64_t d = task.dim, w = task.width, dv = task.dim_v, wv = task.width_v, padded = task.padded_keys;
  T* s = room;
  T* q = s + kRows * kKeys;
  T* o = q + kRows * w;
  alignas(64) int32_t keep[kKeys];
  const T* k = task.k_columns + head * d * padded;
  const T* v = task.v_rows + head * padded * wv;
  for (int64_t first = begin; first < end; first += kRows) {
    const int64_t rows = end - first < kRows ? end - first : kRows;
    T largest[kRows], total[kRows];
    for (int64_t r = 0; r < rows; ++r) largest[r] = nothing, total[r] = 0;
    zero(q, kRows * w);
    zero(o, kRows * wv);
    copy_rows(task.q + (head * task.num_queries + first) * d, rows, d, task.scale, q, w);
    for (int64_t j = 0; j < padded; j += kKeys) {
      multiply<false>(kRows, kKeys, d, q, w, 1, k + j, padded, s, kKeys);
      for (int64_t r = 0; r < rows; ++r) {
        T* row = s + r * kKeys;
        V* entry = reinterpret_cast<V*>(row);
        if (!see(blocks, head, first + r, j, row, keep)) {
          zero(row, kKeys);
          continue;
        }
        for (int64_t c = 0; c < kKeys; ++c) row[c] = keep[c] ? row[c] : nothing;
        V top = entry[0];
        for (int64_t c = 1; c < kKeys / kLanes; ++c) top = top > entry[c] ? top : entry[c];
        T most = largest[r];
        for (int64_t c = 0; c < kLanes; ++c) most = top[c] > most ? top[c] : most;
        if (most > largest[r]) {
          const T factor = exp_of(largest[r] - most);
          total[r] *= factor;
          for (int64_t c = 0; c < wv; ++c) o[r * wv + c] *= factor;
          largest[r] = most;
        }
        V sum = {};
        for (int64_t c = 0; c < kKeys / kLanes; ++c) {
          const V p = exp_of(entry[c] - most);
          sum += p;
          entry[c] = p;
        }
        for (int64_t c = 0; c < kLanes; ++c) total[r] += sum[c];
        if (task.bits.threshold) {
          const T part = fill_stay(blocks, head, first + r, j, keep);
          drop(blocks, first + r, j, keep, part, row);
        }
      }
      multiply<true>(kRows, wv, kKeys, s, kKeys, 1, v + j * wv, wv, o, wv);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = head * task.num_queries + first + r;
      const bool none = !(total[r] > 0);
      task.lse[i] = none ? nothing : largest[r] + log_of(total[r]);
      const T factor = none ? T{0} : task.rescale / total[r];
      for (int64_t c = 0; c < dv; ++c) task.out[i * dv + c] = o[r * wv + c] * factor;
    }
  }
}

// With Z = keep / (1 - p):  dV = (P Z)' dOut,  dS = P (Z dOut V' - delta),  dQ = scale dS K,  dK = scale dS' Q.
template <class T>
void masked_backward(const EdgeBlocks<T>& blocks, int64_t head, int64_t begin, int64_t end, T* dk, T* dv, T* room) {
  using V = typename Lanes<T>::Value;
  constexpr int64_t kLanes = Lanes<T>::kCount, kKeys = kMapKeys, kRows = kMapRows;
  const AttentionRows<T>& task = blocks.rows;
  const int64_t d = task.dim, w = task.width, e = task.dim_v, wv = task.width_v, padded = task.padded_keys;
  T* s = room;
  T* ds = s + kRows * kKeys;
  T* q = ds + kRows * kKeys;
  T* dq = q + kRows * w;
  T* g = dq + kRows * w;
  alignas(64) int32_t keep[kKeys], stay[kKeys];
  const T* k_columns = task.k_columns + head * d * padded;
  const T* v_columns = task.v_columns + head * e * padded;
  const T* k_rows = task.k_rows + head * padded * w;
  for (int64_t first = begin; first < end; first += kRows) {
    const int64_t rows = end - first < kRows ? end - first : kRows, at = head * task.num_queries + first;
    zero(q, 2 * kRows * w);  // and dq; rows past the end add nothing
    zero(g, kRows * wv);
    copy_rows(task.q + at * d, rows, d, task.scale, q, w);
    copy_rows(task.dout + at * e, rows, e, task.rescale, g, wv);
    for (int64_t j = 0; j < padded; j += kKeys) {
      multiply<false>(kRows, kKeys, d, q, w, 1, k_columns + j, padded, s, kKeys);
      multiply<false>(kRows, kKeys, e, g, wv, 1, v_columns + j, padded, ds, kKeys);
      for (int64_t r = 0; r < kRows; ++r) {
        V* entry = reinterpret_cast<V*>(s + r * kKeys);
        V* slope = reinterpret_cast<V*>(ds + r * kKeys);
        const bool some = r < rows && see(blocks, head, first + r, j, s + r * kKeys, keep);
        const T lse = some ? task.lse[at + r] : T{0}, delta = some ? blocks.delta[at + r] : T{0};
        const bool dropped = some && task.bits.threshold;
        const T part = dropped ? fill_stay(blocks, head, first + r, j, stay) : T{1};
        if (dropped) drop(blocks, first + r, j, stay, part, ds + r * kKeys);
        for (int64_t c = 0; c < kKeys / kLanes; ++c) {
          entry[c] = some ? kept(exp_of(entry[c] - lse), keep + c * kLanes) : V{};
          slope[c] = some ? entry[c] * (slope[c] - delta) : V{};
        }
        if (dropped) drop(blocks, first + r, j, stay, part, s + r * kKeys);
      }
      multiply<true>(kRows, w, kKeys, ds, kKeys, 1, k_rows + j * w, w, dq, w);
      multiply<true>(kKeys, w, kRows, ds, 1, kKeys, q, w, dk + j * w, w);
      multiply<true>(kKeys, wv, kRows, s, 1, kKeys, g, wv, dv + j * wv, wv);
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < d; ++c) task.dq[(at + r) * d + c] = task.scale * dq[r * w + c];
    }
  }
}

#define CELLATTN_DEFINE_BLOCKS(T)                                                                                \
  void blocks_pack(const EdgeBlocks<T>& task, int64_t head) { pack(task.rows, head); }                           \
  void blocks_forward(const EdgeBlocks<T>& task, int64_t head, int64_t begin, int64_t end, T* room) {            \
    masked_forward(task, head, begin, end, room);                                                                \
  }                                                                                                              \
  void blocks_backward(                                                                                          \
      const EdgeBlocks<T>& task, int64_t head, int64_t begin, int64_t end, T* dk, T* dv, T* room) {              \
    masked_backward(task, head, begin, end, dk, dv, room);                                                       \
  }
