// Attention along the edges of a dense relation, on the CPU: blocks of the map with a bit a pair. What the instruction sets share.

#pragma once

#include "attention_rows.h"

namespace cellattn {

// Heads stand one after another; `rows` holds sizes, widths, inputs and outputs, keys padded to whole blocks of kMapKeys. Of each
// head, bit j % 64 of word i * (padded_keys / 64) + j / 64 of `seen` says whether query i sees key j, and `twice` whether it sees
// key num_prefix + i twice: by an edge and by itself. Of rows.bits copy 0 is of prefix and own entries, copy 1 + tie[head] of edges.
template <class T>
struct EdgeBlocks {
  AttentionRows<T> rows;
  const uint64_t* const* seen;
  const uint8_t* const* twice;
  const int64_t* tie;
  int64_t num_prefix;
  bool self_loops;
  const T* delta;  // [L, Tq]: dout . out - dlse
};

#define CELLATTN_BLOCK_FUNCTIONS(T)                                                                              \
  /* the copies of one head's keys and values */                                                                 \
  void blocks_pack(const EdgeBlocks<T>& task, int64_t head);                                                     \
  /* out and lse of the queries [begin, end) of a head */                                                        \
  void blocks_forward(const EdgeBlocks<T>& task, int64_t head, int64_t begin, int64_t end, T* room);             \
  /* dq of the queries [begin, end); what they add to dk [padded_keys, width] and dv [padded_keys, width_v] */   \
  void blocks_backward(                                                                                          \
      const EdgeBlocks<T>& task, int64_t head, int64_t begin, int64_t end, T* dk, T* dv, T* room);

namespace portable {
CELLATTN_BLOCK_FUNCTIONS(float)
CELLATTN_BLOCK_FUNCTIONS(double)
}  // namespace portable
#if defined(__x86_64__)
namespace avx2 {
CELLATTN_BLOCK_FUNCTIONS(float)
CELLATTN_BLOCK_FUNCTIONS(double)
}  // namespace avx2
namespace avx512 {
CELLATTN_BLOCK_FUNCTIONS(float)
CELLATTN_BLOCK_FUNCTIONS(double)
}  // namespace avx512
#endif

}  // namespace cellattn
