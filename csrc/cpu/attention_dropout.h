// Attention whose map is dropped, on the CPU: what the instruction sets share. Rows of the map are made block by block, forward
// and backward, and the bits that say which entries stay are made anew each time (Philox4x32-10): nothing of size T x T is kept.

#pragma once

#include <cstdint>

namespace cellattn {

constexpr int64_t kDropoutRows = 32;  // of a block of the map
constexpr int64_t kDropoutKeys = 64;  // of a block of the map; a group of Philox counters, see fill_keep

// Philox counts 64 keys of a row in 8 calls of 128 bits: key j is 16 bits of counter (j / 64 * 8 + j % 8, row, head, offset), half
// j / 8 % 2 of word j / 16 % 4. An entry stays where its 16 bits are at least `threshold`.
struct DropoutBits {
  uint32_t seed[2];
  uint32_t offset;
  int32_t threshold;  // in [1, 65535]
};

// T is float or double; heads stand one after another. Widths of rows are padded with zeros to whole vectors, and the keys to
// whole blocks.
template <class T>
struct DropoutAttention {
  const T* q;  // [L, Tq, D]
  const T* k;  // [L, Tk, D]
  const T* v;  // [L, Tk, DV]
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
  T* lse;  // [L, Tq]; an input of the backward
  // backward
  const T* dout;   // [L, Tq, DV]
  const T* delta;  // [L, Tq]: dout . out - dlse
  T* dq;           // [L, Tq, D]
};

// Numbers that a call needs as room of its own, on a boundary of 64 bytes.
template <class T>
inline int64_t dropout_room(const DropoutAttention<T>& task) {
  return kDropoutRows * (2 * kDropoutKeys + 2 * task.width + task.width_v);
}

#define CELLATTN_DROPOUT_FUNCTIONS(T)                                                                               \
  /* the copies of one head's keys and values */                                                                    \
  void dropout_pack(const DropoutAttention<T>& task, int64_t head);                                                 \
  /* out and lse of the queries [begin, end) of a head */                                                           \
  void dropout_forward(const DropoutAttention<T>& task, int64_t head, int64_t begin, int64_t end, T* room);         \
  /* dq of the queries [begin, end); what they add to dk [padded_keys, width] and dv [padded_keys, width_v] */      \
  void dropout_backward(                                                                                            \
      const DropoutAttention<T>& task, int64_t head, int64_t begin, int64_t end, T* dk, T* dv, T* room);

namespace portable {
CELLATTN_DROPOUT_FUNCTIONS(float)
CELLATTN_DROPOUT_FUNCTIONS(double)
}  // namespace portable
#if defined(__x86_64__)
namespace avx2 {
CELLATTN_DROPOUT_FUNCTIONS(float)
CELLATTN_DROPOUT_FUNCTIONS(double)
}  // namespace avx2
namespace avx512 {
CELLATTN_DROPOUT_FUNCTIONS(float)
CELLATTN_DROPOUT_FUNCTIONS(double)
}  // namespace avx512
#endif

}  // namespace cellattn
