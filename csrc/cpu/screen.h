// Scores of many sets of genes on the CPU: what the instruction sets share. A block of sets at a time goes through all of its steps,
// so that what is made between two products stays in the cache; weights are packed once a call.

#pragma once

#include <cstdint>

namespace cellattn {

constexpr int64_t kRowBlock = 192;  // rows of a block: a multiple of the rows of every instruction set's tile
constexpr int64_t kDepth = 256;     // of a product at a time: 16 columns of a factor stay in the first cache
constexpr int64_t kMaxSet = 4;      // genes of a set
constexpr int64_t kWidest = 16;     // floats of the widest vector: rows that are written begin at multiples of it
constexpr int64_t kLine = 64;         // bytes of a line of the cache
constexpr int kSlots = 16;          // sets that cross-attention takes side by side: a multiple of every vector
constexpr int64_t kSetBlock = 384;  // of them at a time, whose weights of kDepth genes stay in the second cache

inline int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A factor [depth, cols] as `pack` leaves it. Where a task is in bfloat16, both operands of its products are rounded to that, and
// what they add up to is not; a float of an operand may then hold two neighbours along the depth.
struct Packed {
  const float* data;
  int64_t depth, cols;
};

// y_e = norm_1(x_e + sum_{f, h} p_efh v_fh),  p = softmax over f of the set;  out = mean_e norm_2(y_e + W_2 gelu(W_1 y_e + b_1) + b_2)
struct Readout {
  bool bfloat16;
  const int64_t* sets;                        // [B, k], entries
  int64_t num_sets, size, heads, head_dim, dim;
  int64_t width;                              // of rows of dim in memory, zeros behind dim: a multiple of 16
  const float *query, *key;                   // [M, head_dim, weights_width], query times its scale, zeros behind the heads
  const float* value;                         // [M, heads, width], through the output projection
  const float* x;                             // [M, width]
  const float *weight1, *bias1, *weight2, *bias2;  // of the norms, [width]
  float eps1, eps2;
  Packed up, down;                            // of the FFN: [dim, hidden], [hidden, dim]
  const float *up_bias, *down_bias;           // [hidden], [width]
  float* out;                                 // [B, dim]

  int64_t weights_width() const { return padded(heads, kWidest); }
  int64_t scratch() const { return kRowBlock * (3 * width + kDepth) + size * size * weights_width(); }
};

// z = sum_e a_e + (sum_n prod_e w_en v_n + sum_e prod_f w_f,g(e) (change_e)) / total, by head, total = sum_n prod_e w_en bias_n
struct CrossAttention {
  bool bfloat16;
  const int64_t *sets, *rows, *genes;  // [B, k]: entries, rows of w, genes
  const int64_t* slots;                // sets in the order in which they are taken, kSlots side by side; ~set where one only fills up
  int64_t num_sets, size, heads, num_genes, head_dim;
  const float* w;       // [R, heads, N]
  const float* bias;    // [heads, N]
  const float* packed;  // of each head, [N, head_dim + 1] as `pack_strips` leaves it
  const float* add;     // [M, heads * head_dim]
  const float* change;  // [M, heads * head_dim]
  float *out, *total;   // [B, heads * head_dim], [B, heads]

  int64_t packed_size() const { return num_genes * (head_dim + 1); }  // floats of a head, at most
  int64_t scratch() const { return kSetBlock * (kDepth + head_dim + 1) + kDepth * (2 * kSlots + 1); }
};

// w_2 . gelu(W_1 x + b_1)
struct Mlp {
  bool bfloat16;
  int64_t num_rows, dim, hidden;
  const float* x;  // [B, dim]
  Packed up;
  const float *up_bias, *down;  // [hidden], padded with zeros to a multiple of 16
  float* out;                   // [B]

  int64_t width() const { return padded(hidden, kWidest); }
  int64_t x_width() const { return padded(dim, kWidest); }
  int64_t scratch() const { return kRowBlock * (x_width() + width()); }
};

#define CELLATTN_SCREEN_FUNCTIONS                                                                                      \
  /* floats that `pack` writes */                                                                                      \
  int64_t packed_size(int64_t depth, int64_t cols);                                                                    \
  /* element (d, c) is at from[d * by_depth + c * by_col] */                                                           \
  void pack(                                                                                                           \
      bool bfloat16, const float* from, int64_t by_depth, int64_t by_col, int64_t depth, int64_t cols, float* to);     \
  /* of cross-attention: from [depth, cols] */                                                                         \
  void pack_strips(bool bfloat16, const float* from, int64_t depth, int64_t cols, float* to);                          \
  /* sets [begin, end) of at most kRowBlock rows, or slots of at most kSetBlock, with `task.scratch()` floats to work in */ \
  void readout_block(const Readout& task, int64_t begin, int64_t end, float* scratch);                                 \
  void cross_block(const CrossAttention& task, int64_t begin, int64_t end, float* scratch);                            \
  void mlp_block(const Mlp& task, int64_t begin, int64_t end, float* scratch);

namespace portable {
CELLATTN_SCREEN_FUNCTIONS
}  // namespace portable
#if defined(__x86_64__)
namespace avx2 {
CELLATTN_SCREEN_FUNCTIONS
}  // namespace avx2
namespace avx512 {
CELLATTN_SCREEN_FUNCTIONS
}  // namespace avx512
namespace avx512_bf16 {
CELLATTN_SCREEN_FUNCTIONS
}  // namespace avx512_bf16
#endif

}  // namespace cellattn
