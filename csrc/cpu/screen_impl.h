// The body of screen_portable.cpp, screen_avx2.cpp, screen_avx512.cpp and screen_avx512_bf16.cpp: the same text, compiled for each
// instruction set. CELLATTN_VECTOR_BYTES is its widest vector, CELLATTN_BF16_PAIRS defined where it multiplies bfloat16.

namespace {

constexpr int kLanes = CELLATTN_VECTOR_BYTES / sizeof(float);
constexpr int kTileSums = CELLATTN_VECTOR_BYTES == 64 ? 24 : 12;  // vectors that a tile adds up: as many as the registers hold
constexpr int kTileCols = 2 * kLanes;

typedef float Floats __attribute__((vector_size(CELLATTN_VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(CELLATTN_VECTOR_BYTES)));
#if defined(CELLATTN_BF16_PAIRS)
typedef int16_t Shorts __attribute__((vector_size(CELLATTN_VECTOR_BYTES)));
#endif
typedef float Unaligned __attribute__((vector_size(CELLATTN_VECTOR_BYTES), aligned(4), may_alias));

inline Floats load(const float* x) { return *reinterpret_cast<const Unaligned*>(x); }
inline void store(float* to, Floats x) { *reinterpret_cast<Unaligned*>(to) = x; }
inline Floats all(float x) { return x - Floats{}; }
inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

inline float total(Floats x) {
  float sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += x[lane];
  return sum;
}

// ---------------------------------------------------------------------------------------------------------- functions

// exp(x) for -87 <= x <= 0. 2^n by its exponent, and Taylor's series of what is left, at most log(2) / 2.
inline Floats exp_in_range(Floats x) {
  const Floats magic = all(12582912.0f);  // 1.5 * 2^23: added and taken off, it rounds to an integer
  const Floats n = (x * 1.44269504f + magic) - magic;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // log(2) in two parts, the first of which n times is exact
  Floats p = all(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Ints exponent = (__builtin_convertvector(n, Ints) + 127) << 23;
  Floats scale;
  std::memcpy(&scale, &exponent, sizeof scale);
  return p * scale;
}

// exp(x) for x <= 0; 0 below -87, where it is no normal number.
inline Floats exp_negative(Floats x) {
  const Floats low = all(-87.0f);
  return x < low ? Floats{} : exp_in_range(larger(x, low));
}

// x Phi(x) = max(x, 0) - |x| Phi(-|x|), whose second term is small wherever it is added to a large one. Phi(-a) = exp(-a^2 / 2) R(a)
// with R a minimax fit, the product within 6e-10 / a up to a = 5.6, from where on it is 0.
inline Floats gelu(Floats x) {
  const Floats zero = {}, positive = larger(x, zero), size = positive + larger(-x, zero), a = smaller(size, all(5.6f));
  Floats p = all(1.092857796e-2f);
  p = p * a + 9.151839150e-2f;
  p = p * a + 3.087348651e-1f;
  p = p * a + 0.5f;
  Floats q = all(2.744898720e-2f);
  q = q * a + 2.282673361e-1f;
  q = q * a + 8.123297260e-1f;
  q = q * a + 1.415354003f;
  q = q * a + 1.0f;
  return positive - a * exp_in_range(a * a * -0.5f) * p / q;
}

// --------------------------------------------------------------------------------------------------------- arithmetic

// What products are made of. An operand is `floats` of which each holds kPer neighbours along the depth.
struct Float32 {
  static constexpr int kPer = 1;
  static Floats each(const float* x) { return all(*x); }
  static Floats multiply_add(Floats sum, Floats a, Floats b) { return sum + a * b; }
  static Floats round(Floats x) { return x; }
};

// To the nearest bfloat16, ties to even; a NaN stays one.
inline Floats nearest_bfloat16(Floats x) {
  Ints bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) & ~0xffff;
  Floats rounded;
  std::memcpy(&rounded, &bits, sizeof rounded);
  return x == x ? rounded : x;
}

struct BFloat16 : Float32 {
#if defined(CELLATTN_BF16_PAIRS)
  static constexpr int kPer = 2;
  static Floats each(const float* x) {
    int32_t pair;
    std::memcpy(&pair, x, sizeof pair);
    return (Floats)_mm512_set1_epi32(pair);
  }
  static Floats multiply_add(Floats sum, Floats a, Floats b) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
#endif
  static Floats round(Floats x) { return nearest_bfloat16(x); }
};

template <class Product>
inline int64_t units(int64_t depth) {
  return (depth + Product::kPer - 1) / Product::kPer;
}

// One float of an operand: of two neighbours where it holds two.
template <class Product>
inline float unit(float first, float second) {
  if constexpr (Product::kPer == 1) return Product::round(all(first))[0];
  uint32_t low, high;
  const float a = Product::round(all(first))[0], b = Product::round(all(second))[0];
  std::memcpy(&low, &a, sizeof low);
  std::memcpy(&high, &b, sizeof high);
  const uint32_t pair = (low >> 16) | (high & 0xffff0000u);
  float both;
  std::memcpy(&both, &pair, sizeof both);
  return both;
}

// A row of n floats as an operand along the depth; `to` may be where the row is, from a multiple of kWidest to one of both.
template <class Product>
inline void operand(const float* x, int64_t n, float* to) {
  int64_t i = 0;
#if defined(CELLATTN_BF16_PAIRS)
  if constexpr (Product::kPer == 2) {
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
      store(to + i / 2, (Floats)_mm512_cvtne2ps_pbh((__m512)load(x + i + kLanes), (__m512)load(x + i)));
    }
  }
#endif
  if constexpr (Product::kPer == 1) {
    for (; i + kLanes <= n; i += kLanes) store(to + i, Product::round(load(x + i)));
  }
  for (; i < n; i += Product::kPer) to[i / Product::kPer] = unit<Product>(x[i], i + 1 < n ? x[i + 1] : 0.0f);
}

// ----------------------------------------------------------------------------------------------------------- products

inline int64_t packed_cols(int64_t cols) { return padded(cols, kLanes); }

// Vectors of the tile that begins at a column, of columns up to `end`: two, or at the end three or one, since one alone takes as long
// as two. No tile lies across a multiple of kDepth.
inline int tile_vectors(int64_t col, int64_t end) {
  const int64_t left = (end - col) / kLanes;
  if (left == 3 && (col + kTileCols) % kDepth != 0) return 3;
  return left < 2 ? 1 : 2;
}

// What is done with a product, by its first column. Types and not lambdas, which are not compiled for the instruction set.
struct AsItIs {
  Floats operator()(Floats x, int64_t) const { return x; }
};

struct GeluPlusBias {
  const float* bias;
  Floats operator()(Floats x, int64_t col) const { return gelu(x + load(bias + col)); }
};

template <class Product, int Rows, int Vectors>
inline void tile(const float* a, int64_t lda, const float* b, int64_t depth, Floats (&sum)[Rows][Vectors]) {
  for (int64_t d = 0; d < depth; ++d) {
    Floats column[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) column[v] = load(b + (d * Vectors + v) * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
      const Floats row = Product::each(a + r * lda + d);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sum[r][v] = Product::multiply_add(sum[r][v], row, column[v]);
    }
  }
}

template <class Product, int Vectors, class Finish>
inline void tile_column(
    const float* a, int64_t lda, int64_t rows, const float* b, int64_t depth, float* c, int64_t ldc, int64_t col, bool add,
    const Finish& finish) {
  constexpr int kRows = Vectors == 3 ? kTileSums / 3 : kTileSums / 2;
  for (int64_t row = 0; row < rows; row += kRows) {
    Floats sum[kRows][Vectors] = {};
    float* to = c + row * ldc + col;
    if (add) {
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) sum[r][v] = load(to + r * ldc + v * kLanes);
      }
    }
    tile<Product, kRows, Vectors>(a + row * lda, lda, b, depth, sum);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) store(to + r * ldc + v * kLanes, finish(sum[r][v], col + v * kLanes));
    }
  }
}

// c [rows, cols] = finish(a [rows, depth] b, first column of the vector), added to what is there where `add`; depth in units, of at
// most kDepth. Rows up to a multiple of a tile's and columns up to one of kLanes are read and written.
template <class Product, class Finish>
inline void product_block(
    const float* a, int64_t lda, int64_t rows, const float* b, int64_t depth, int64_t cols, float* c, int64_t ldc, bool add,
    const Finish& finish) {
  const int64_t end = packed_cols(cols);
  for (int64_t col = 0; col < end;) {
    const int vectors = tile_vectors(col, end);
    const float* from = b + col * depth;
    switch (vectors) {
      case 1: tile_column<Product, 1>(a, lda, rows, from, depth, c, ldc, col, add, finish); break;
      case 2: tile_column<Product, 2>(a, lda, rows, from, depth, c, ldc, col, add, finish); break;
      case 3: tile_column<Product, 3>(a, lda, rows, from, depth, c, ldc, col, add, finish); break;
    }
    col += vectors * kLanes;
  }
}

// c = finish(a b) for columns [first, last) of b: both multiples of kDepth, or last all there are.
template <class Product, class Finish>
inline void product(
    const float* a, int64_t lda, int64_t rows, const Packed& b, int64_t first, int64_t last, float* c, int64_t ldc,
    const Finish& finish) {
  for (int64_t d = 0; d < b.depth; d += kDepth) {
    const int64_t depth = units<Product>(b.depth - d < kDepth ? b.depth - d : kDepth), from = d / Product::kPer;
    const float* block = b.data + from * packed_cols(b.cols) + first * depth;
    if (d + kDepth >= b.depth) {
      product_block<Product>(a + from, lda, rows, block, depth, last - first, c, ldc, d > 0, finish);
    } else {
      product_block<Product>(a + from, lda, rows, block, depth, last - first, c, ldc, d > 0, AsItIs{});
    }
  }
}

template <class Product>
inline void pack(const float* from, int64_t by_depth, int64_t by_col, int64_t depth, int64_t cols, float* to) {
  const int64_t end = packed_cols(cols);
  for (int64_t d0 = 0; d0 < depth; d0 += kDepth) {
    const int64_t last = depth - d0 < kDepth ? depth : d0 + kDepth;
    for (int64_t col = 0; col < end;) {
      const int64_t past = col + tile_vectors(col, end) * kLanes;
      for (int64_t d = d0; d < last; d += Product::kPer) {
        for (int64_t c = col; c < past; ++c) {
          const float* at = from + d * by_depth + c * by_col;
          *to++ = c < cols ? unit<Product>(*at, d + 1 < last ? at[by_depth] : 0.0f) : 0.0f;
        }
      }
      col = past;
    }
  }
}

// ------------------------------------------------------------------------------------------------------------ readout

// x = (x - mean) / sqrt(variance + eps) over the first `dim` of `width` entries, whatever is behind them.
inline void normalize(float* x, int64_t dim, int64_t width, float eps) {
  Floats sum = {};
  for (int64_t d = dim; d < width; ++d) x[d] = 0;
  for (int64_t d = 0; d < width; d += kLanes) sum += load(x + d);
  const float mean = total(sum) / static_cast<float>(dim);
  for (int64_t d = 0; d < width; d += kLanes) store(x + d, load(x + d) - mean);
  for (int64_t d = dim; d < width; ++d) x[d] = 0;
  Floats square = {};
  for (int64_t d = 0; d < width; d += kLanes) square += load(x + d) * load(x + d);
  const Floats scale = all(1.0f / std::sqrt(total(square) / static_cast<float>(dim) + eps));
  for (int64_t d = 0; d < width; d += kLanes) store(x + d, load(x + d) * scale);
}

// Weights p [e, f, heads], heads padded, of the entries of one set.
template <int Size>
inline void set_weights(const Readout& task, const int64_t* set, float* p, int64_t ldp) {
  for (int64_t h = 0; h < task.heads; h += kLanes) {
    Floats s[Size][Size] = {};
    for (int64_t d = 0; d < task.head_dim; ++d) {
      Floats key[Size];
#pragma GCC unroll 4
      for (int f = 0; f < Size; ++f) key[f] = load(task.key + (set[f] * task.head_dim + d) * ldp + h);
#pragma GCC unroll 4
      for (int e = 0; e < Size; ++e) {
        const Floats query = load(task.query + (set[e] * task.head_dim + d) * ldp + h);
#pragma GCC unroll 4
        for (int f = 0; f < Size; ++f) s[e][f] += query * key[f];
      }
    }
#pragma GCC unroll 4
    for (int e = 0; e < Size; ++e) {
      Floats top = s[e][0], sum = {};
#pragma GCC unroll 4
      for (int f = 1; f < Size; ++f) top = larger(top, s[e][f]);
#pragma GCC unroll 4
      for (int f = 0; f < Size; ++f) sum += s[e][f] = exp_negative(s[e][f] - top);
#pragma GCC unroll 4
      for (int f = 0; f < Size; ++f) store(p + (e * Size + f) * ldp + h, s[e][f] / sum);
    }
  }
}

// y [Size, width] = x_e + sum_{f, h} p_efh v_fh
template <int Size>
inline void attended(const Readout& task, const int64_t* set, const float* p, int64_t ldp, float* y) {
  for (int64_t d = 0; d < task.width; d += kLanes) {
    Floats sum[Size];
#pragma GCC unroll 4
    for (int e = 0; e < Size; ++e) sum[e] = load(task.x + set[e] * task.width + d);
    for (int f = 0; f < Size; ++f) {
      const float* value = task.value + set[f] * task.heads * task.width + d;
      for (int64_t h = 0; h < task.heads; ++h) {
        const Floats v = load(value + h * task.width);
#pragma GCC unroll 4
        for (int e = 0; e < Size; ++e) sum[e] += all(p[(e * Size + f) * ldp + h]) * v;
      }
    }
#pragma GCC unroll 4
    for (int e = 0; e < Size; ++e) store(y + e * task.width + d, sum[e]);
  }
}

template <int Size, class Product>
inline void readout(const Readout& task, int64_t begin, int64_t end, float* scratch) {
  const int64_t width = task.width, ldp = task.weights_width(), rows = (end - begin) * Size;
  float *y = scratch, *x = y + kRowBlock * width, *z = x + kRowBlock * width, *hidden = z + kRowBlock * width;
  float* p = hidden + kRowBlock * kDepth;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t* set = task.sets + b * Size;
    float* rows_of_set = y + (b - begin) * Size * width;
    set_weights<Size>(task, set, p, ldp);
    attended<Size>(task, set, p, ldp, rows_of_set);
    for (int e = 0; e < Size; ++e) {
      float* row = rows_of_set + e * width;
      normalize(row, task.dim, width, task.eps1);
      for (int64_t d = 0; d < width; d += kLanes) {
        store(row + d, load(row + d) * load(task.weight1 + d) + load(task.bias1 + d));
      }
      operand<Product>(row, width, x + (row - y));
    }
  }
  for (int64_t first = 0; first < task.up.cols; first += kDepth) {
    const int64_t depth = task.up.cols - first < kDepth ? task.up.cols - first : kDepth;
    const float* down = task.down.data + first / Product::kPer * packed_cols(task.dim);
    product<Product>(x, width, rows, task.up, first, first + depth, hidden, kDepth, GeluPlusBias{task.up_bias + first});
    for (int64_t row = 0; row < rows; ++row) operand<Product>(hidden + row * kDepth, depth, hidden + row * kDepth);
    product_block<Product>(hidden, kDepth, rows, down, units<Product>(depth), task.dim, z, width, first > 0, AsItIs{});
  }
  for (int64_t b = begin; b < end; ++b) {
    float* first = z + (b - begin) * Size * width;
    for (int e = 0; e < Size; ++e) {
      float* row = first + e * width;
      const float* own = y + ((b - begin) * Size + e) * width;
      for (int64_t d = 0; d < width; d += kLanes) {
        store(row + d, load(row + d) + load(own + d) + load(task.down_bias + d));
      }
      normalize(row, task.dim, width, task.eps2);
      if (e > 0) {
        for (int64_t d = 0; d < width; d += kLanes) store(first + d, load(first + d) + load(row + d));
      }
    }
    float* out = task.out + b * task.dim;
    for (int64_t d = 0; d < task.dim; ++d) out[d] = first[d] * (1.0f / Size) * task.weight2[d] + task.bias2[d];
  }
}

// ---------------------------------------------------------------------------------------------------- cross-attention

// Here vectors lie along the sets, since a head may have few columns: sums [columns, sets] of a factor's columns, one after the
// other, times weights [genes, sets].
constexpr int kTileVectors = CELLATTN_VECTOR_BYTES == 16 ? 4 : 2;
constexpr int kTileSets = kTileVectors * kLanes;
constexpr int kStrip = (CELLATTN_VECTOR_BYTES == 64 ? 22 : 12) / kTileVectors;  // columns of which sums and weights fill the registers
static_assert(kTileSets % kSlots == 0 && kSetBlock % kTileSets == 0, "a tile holds whole groups of sets");

// Columns are dealt out to as few strips as hold them, the first of which have one more.
struct Strips {
  int64_t count, least, wider;
  explicit Strips(int64_t cols) : count((cols + kStrip - 1) / kStrip), least(cols / count), wider(cols % count) {}
  int64_t width(int64_t strip) const { return least + (strip < wider); }
};

template <class Product>
inline void pack_strips(const float* from, int64_t depth, int64_t cols, float* to) {
  const Strips strips(cols);
  for (int64_t d0 = 0; d0 < depth; d0 += kDepth) {
    const int64_t last = depth - d0 < kDepth ? depth : d0 + kDepth;
    for (int64_t strip = 0, col = 0; strip < strips.count; col += strips.width(strip++)) {
      for (int64_t d = d0; d < last; d += Product::kPer) {
        for (int64_t c = col; c < col + strips.width(strip); ++c) {
          *to++ = unit<Product>(from[d * cols + c], d + 1 < last ? from[(d + 1) * cols + c] : 0.0f);
        }
      }
    }
  }
}

// Sums [Cols, kTileSets], rows kSetBlock apart.
template <class Product, int Cols>
inline void strip_tile(const float* weights, const float* factor, int64_t depth, float* to, bool add) {
  Floats sum[Cols][kTileVectors] = {};
  if (add) {
#pragma GCC unroll 12
    for (int c = 0; c < Cols; ++c) {
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) sum[c][v] = load(to + c * kSetBlock + v * kLanes);
    }
  }
  for (int64_t d = 0; d < depth; ++d) {
    Floats w[kTileVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) w[v] = load(weights + d * kTileSets + v * kLanes);
#pragma GCC unroll 12
    for (int c = 0; c < Cols; ++c) {
      const Floats f = Product::each(factor + d * Cols + c);
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) sum[c][v] = Product::multiply_add(sum[c][v], w[v], f);
    }
  }
#pragma GCC unroll 12
  for (int c = 0; c < Cols; ++c) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) store(to + c * kSetBlock + v * kLanes, sum[c][v]);
  }
}

template <class Product>
using StripTile = void (*)(const float*, const float*, int64_t, float*, bool);

template <class Product, int Cols = kStrip>
inline StripTile<Product> strip_tile_of(int64_t cols) {
  if constexpr (Cols == 1) return &strip_tile<Product, 1>;
  else return cols == Cols ? &strip_tile<Product, Cols> : strip_tile_of<Product, Cols - 1>(cols);
}

inline void multiply(const float* x, const float* y, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(x + i) * load(y + i));
  for (; i < n; ++i) out[i] = x[i] * y[i];
}

// Asks for n floats that are read after a while.
inline void ahead(const float* x, int64_t n) {
  for (int64_t i = 0; i < n; i += kLine / sizeof *x) __builtin_prefetch(x + i, 0, 2);
}

// to [n, kSlots] = rows [kSlots, n] turned.
inline void turned(const float* const (&rows)[kSlots], int64_t n, float* to) {
  typedef float Four __attribute__((vector_size(16)));
  typedef float FourAnywhere __attribute__((vector_size(16), aligned(4), may_alias));
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    for (int s = 0; s < kSlots; s += 4) {
      Four x[4];
      for (int r = 0; r < 4; ++r) x[r] = *reinterpret_cast<const FourAnywhere*>(rows[s + r] + i);
      const Four ab = {x[0][0], x[1][0], x[0][1], x[1][1]}, cd = {x[2][0], x[3][0], x[2][1], x[3][1]};
      const Four AB = {x[0][2], x[1][2], x[0][3], x[1][3]}, CD = {x[2][2], x[3][2], x[2][3], x[3][3]};
      float* at = to + i * kSlots + s;
      *reinterpret_cast<FourAnywhere*>(at) = Four{ab[0], ab[1], cd[0], cd[1]};
      *reinterpret_cast<FourAnywhere*>(at + kSlots) = Four{ab[2], ab[3], cd[2], cd[3]};
      *reinterpret_cast<FourAnywhere*>(at + 2 * kSlots) = Four{AB[0], AB[1], CD[0], CD[1]};
      *reinterpret_cast<FourAnywhere*>(at + 3 * kSlots) = Four{AB[2], AB[3], CD[2], CD[3]};
    }
  }
  for (; i < n; ++i) {
    for (int s = 0; s < kSlots; ++s) to[i * kSlots + s] = rows[s][i];
  }
}

// weights [units, kSlots], units kTileSets apart, of firsts [n, kSlots] times what all sets have in common [n] or nothing.
template <class Product>
inline void group_weights(const float* firsts, const float* others, int64_t n, float* weights) {
  for (int64_t i = 0; i < n; i += Product::kPer) {
    float* to = weights + i / Product::kPer * kTileSets;
    for (int s = 0; s < kSlots; s += kLanes) {
      Floats x = load(firsts + i * kSlots + s);
      if (others != nullptr) x = x * all(others[i]);
      if constexpr (Product::kPer == 1) {
        store(to + s, Product::round(x));
      } else {
#if defined(CELLATTN_BF16_PAIRS)
        Floats next = {};
        if (i + 1 < n) {
          next = load(firsts + (i + 1) * kSlots + s);
          if (others != nullptr) next = next * all(others[i + 1]);
        }
        const __m512i order = (__m512i)Shorts{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                              8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)next, (__m512)x);
        store(to + s, (Floats)_mm512_permutexvar_epi16(order, both));
#endif
      }
    }
  }
}

template <int Size, class Product>
inline void cross(const CrossAttention& task, int64_t begin, int64_t end, float* scratch) {
  const int64_t n = task.num_genes, d = task.head_dim, dim = task.heads * d, rows = end - begin, each = task.packed_size();
  const Strips strips(d + 1);
  float *firsts = scratch, *others = firsts + kDepth * kSlots, *products = others + kDepth;
  float *a = products + kDepth * kSlots, *c = a + kSetBlock * kDepth;
  const auto set_of = [&](int64_t slot) { return task.slots[slot] < 0 ? ~task.slots[slot] : task.slots[slot]; };
  for (int64_t h = 0; h < task.heads; ++h) {
    for (int64_t from = 0; from < n; from += kDepth) {
      const int64_t depth = n - from < kDepth ? n - from : kDepth, depth_units = units<Product>(depth);
      const auto row_of = [&](int64_t row) {
        const float* weights = task.w + (row * task.heads + h) * n + from;
        ahead(weights + kDepth, depth);
        return weights;
      };
      int64_t turned_of[kSlots], common[Size];  // whose weights `firsts` and `others` hold
      for (int s = 0; s < kSlots; ++s) turned_of[s] = -1;
      common[0] = -1;
      for (int64_t group = 0; group < rows; group += kSlots) {
        const float* row[kSlots];
        const int64_t* set = task.rows + set_of(begin + group) * Size;
        bool alike = true, known = true;  // all but the first genes; the first genes
        for (int s = 0; s < kSlots; ++s) {
          const int64_t* own = task.rows + set_of(begin + group + s) * Size;
          for (int e = 1; e < Size; ++e) alike = alike && own[e] == set[e];
          known = known && own[0] == turned_of[s];
        }
        if (!alike || !known) {
          for (int s = 0; s < kSlots; ++s) {
            const int64_t* own = task.rows + set_of(begin + group + s) * Size;
            row[s] = row_of(own[0]);
            turned_of[s] = alike ? own[0] : -1;
            if (alike) continue;
            float* to = products + s * kDepth;
            for (int e = 1; e < Size; ++e) multiply(e == 1 ? row[s] : to, row_of(own[e]), depth, to);
            row[s] = to;
          }
          turned(row, depth, firsts);
        }
        const float* times = nullptr;
        if constexpr (Size > 1) {
          if (alike) {
            bool same = common[0] == 0;
            for (int e = 1; e < Size; ++e) same = same && common[e] == set[e];
            if (!same) {
              std::memcpy(others, row_of(set[1]), depth * sizeof *others);
              for (int e = 2; e < Size; ++e) multiply(others, row_of(set[e]), depth, others);
              common[0] = 0;
              for (int e = 1; e < Size; ++e) common[e] = set[e];
            }
            times = others;
          }
        }
        float* to = a + group / kTileSets * kTileSets * kDepth + group % kTileSets;
        group_weights<Product>(firsts, times, depth, to);
      }
      const float* factor = task.packed + h * each + from / Product::kPer * (d + 1);
      for (int64_t strip = 0, col = 0; strip < strips.count; col += strips.width(strip++)) {
        const auto f = strip_tile_of<Product>(strips.width(strip));
        for (int64_t tile = 0; tile < rows; tile += kTileSets) {
          f(a + tile * kDepth, factor + col * depth_units, depth_units, c + col * kSetBlock + tile, from > 0);
        }
      }
    }
    for (int64_t slot = 0; slot < rows; ++slot) {
      const int64_t set = task.slots[begin + slot];
      if (set < 0) continue;
      const int64_t* entry = task.sets + set * Size;
      float* out = task.out + set * dim + h * d;
      float beta[Size];
      for (int e = 0; e < Size; ++e) {
        const int64_t gene = task.genes[set * Size + e];
        beta[e] = task.bias[h * n + gene];
        for (int f = 0; f < Size; ++f) beta[e] *= task.w[(task.rows[set * Size + f] * task.heads + h) * n + gene];
      }
      const float whole = c[d * kSetBlock + slot], inverse = 1.0f / whole;
      task.total[set * task.heads + h] = whole;
      for (int64_t j = 0; j < d; ++j) {
        float x = c[j * kSetBlock + slot], own = 0;
        for (int e = 0; e < Size; ++e) {
          x += beta[e] * task.change[entry[e] * dim + h * d + j];
          own += task.add[entry[e] * dim + h * d + j];
        }
        out[j] = own + x * inverse;
      }
    }
  }
}

template <class Product>
inline void mlp(const Mlp& task, int64_t begin, int64_t end, float* scratch) {
  const int64_t rows = end - begin, width = task.width(), ldx = task.x_width();
  float *hidden = scratch, *x = hidden + kRowBlock * width;
  for (int64_t row = 0; row < rows; ++row) operand<Product>(task.x + (begin + row) * task.dim, task.dim, x + row * ldx);
  product<Product>(x, ldx, rows, task.up, 0, task.hidden, hidden, width, GeluPlusBias{task.up_bias});
  for (int64_t b = begin; b < end; ++b) {
    const float* row = hidden + (b - begin) * width;
    Floats part[4] = {};
    int64_t h = 0;
    for (; h + 4 * kLanes <= task.hidden; h += 4 * kLanes) {
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) part[p] += load(row + h + p * kLanes) * load(task.down + h + p * kLanes);
    }
    float sum = total((part[0] + part[1]) + (part[2] + part[3]));
    for (; h < task.hidden; ++h) sum += row[h] * task.down[h];
    task.out[b] = sum;
  }
}

template <class Product>
inline void readout_of_size(const Readout& task, int64_t begin, int64_t end, float* scratch) {
  switch (task.size) {
    case 1: return readout<1, Product>(task, begin, end, scratch);
    case 2: return readout<2, Product>(task, begin, end, scratch);
    case 3: return readout<3, Product>(task, begin, end, scratch);
    case 4: return readout<4, Product>(task, begin, end, scratch);
  }
}

template <class Product>
inline void cross_of_size(const CrossAttention& task, int64_t begin, int64_t end, float* scratch) {
  switch (task.size) {
    case 1: return cross<1, Product>(task, begin, end, scratch);
    case 2: return cross<2, Product>(task, begin, end, scratch);
    case 3: return cross<3, Product>(task, begin, end, scratch);
    case 4: return cross<4, Product>(task, begin, end, scratch);
  }
}

}  // namespace

int64_t packed_size(int64_t depth, int64_t cols) { return depth * packed_cols(cols); }

void pack(bool bfloat16, const float* from, int64_t by_depth, int64_t by_col, int64_t depth, int64_t cols, float* to) {
  (bfloat16 ? pack<BFloat16> : pack<Float32>)(from, by_depth, by_col, depth, cols, to);
}

void pack_strips(bool bfloat16, const float* from, int64_t depth, int64_t cols, float* to) {
  (bfloat16 ? pack_strips<BFloat16> : pack_strips<Float32>)(from, depth, cols, to);
}

void readout_block(const Readout& task, int64_t begin, int64_t end, float* scratch) {
  (task.bfloat16 ? readout_of_size<BFloat16> : readout_of_size<Float32>)(task, begin, end, scratch);
}

void cross_block(const CrossAttention& task, int64_t begin, int64_t end, float* scratch) {
  (task.bfloat16 ? cross_of_size<BFloat16> : cross_of_size<Float32>)(task, begin, end, scratch);
}

void mlp_block(const Mlp& task, int64_t begin, int64_t end, float* scratch) {
  (task.bfloat16 ? mlp<BFloat16> : mlp<Float32>)(task, begin, end, scratch);
}
