// Attention on the CPU: what the instruction sets share. Rows of the map are made block by block, forward and backward, by the
// same sums in the same order, and nothing of size T x T is kept. Where the map is dropped, the bits that say which entries stay
// are made anew each time (Philox4x32-10).

#pragma once

#include <cstdint>

#include "dropout.h"

namespace cellattn {

constexpr int64_t kMapRows = 32;  // of a block of the map
constexpr int64_t kMapKeys = 64;  // of a block of the map; a group of Philox counters, see fill_keep

// T is float or double; heads stand one after another. Rows are padded with zeros to whole vectors, and keys to whole vectors
// and a multiple of 4.
template <class T>
struct AttentionRows {
  const T* q;            // [L, Tq, D]
  const T* k;            // [L, Tk, D]
  const T* v;            // [L, Tk, DV]
  const bool* key_mask;  // [L, Tk], null for all keys
  int64_t num_heads, num_queries, num_keys, dim, dim_v;
  int64_t padded_keys, width, width_v;  // of dim and dim_v
  T scale, rescale;                     // of the scores; 1 / (1 - p)
  DropoutBits bits;
  // copies, [L, ...]
  T* k_columns;  // [D, padded_keys]
  T* v_columns;  // [DV, padded_keys]; backward
  T* k_rows;     // [padded_keys, width]; backward
  T* v_rows;     // [padded_keys, width_v]; forward
  // forward
  T* out;  // [L, Tq, DV]
  T* lse;  // [L, Tq]; as the next an input of the backward
  // backward
  const T* dout;  // [L, Tq, DV]
  const T* dlse;  // [L, Tq], null for zeros
  T* dq;          // [L, Tq, D]
};

// Numbers that a call needs as room of its own, zeros on a boundary of 64 bytes.
template <class T>
inline int64_t attention_room(const AttentionRows<T>& task) {
  return kMapRows * (2 * kMapKeys + 2 * task.width + task.width_v);
}

#define CELLATTN_ATTENTION_FUNCTIONS(T)                                                                          \
  /* the largest absolute value, NaN if there is one */                                                          \
  T attention_largest(const T* x, int64_t n);                                                                    \
  /* the copies of one head's keys and values */                                                                 \
  void attention_pack(const AttentionRows<T>& task, int64_t head);                                               \
  /* out and lse of the queries [begin, end) of a head */                                                        \
  void attention_forward(const AttentionRows<T>& task, int64_t head, int64_t begin, int64_t end, T* room);       \
  /* dq of the queries [begin, end); what they add to dk [padded_keys, width] and dv [padded_keys, width_v] */   \
  void attention_backward(                                                                                       \
      const AttentionRows<T>& task, int64_t head, int64_t begin, int64_t end, T* dk, T* dv, T* room);

namespace portable {
CELLATTN_ATTENTION_FUNCTIONS(float)
CELLATTN_ATTENTION_FUNCTIONS(double)
}  // namespace portable
#if defined(__x86_64__)
namespace avx2 {
CELLATTN_ATTENTION_FUNCTIONS(float)
CELLATTN_ATTENTION_FUNCTIONS(double)
}  // namespace avx2
namespace avx512 {
CELLATTN_ATTENTION_FUNCTIONS(float)
CELLATTN_ATTENTION_FUNCTIONS(double)
}  // namespace avx512
#endif

}  // namespace cellattn
