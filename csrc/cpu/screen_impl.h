// The body of screen_portable.cpp, screen_avx2.cpp and screen_avx512.cpp: the same text, compiled for each instruction set.
// CELLATTN_VECTOR_BYTES is the widest vector of the instruction set.

namespace {

constexpr int kLanes = CELLATTN_VECTOR_BYTES / sizeof(float);
constexpr int kTileSums = CELLATTN_VECTOR_BYTES == 64 ? 24 : 12;  // vectors that a tile adds up: as many as the registers hold
constexpr int kTileCols = 2 * kLanes;

typedef float Floats __attribute__((vector_size(CELLATTN_VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(CELLATTN_VECTOR_BYTES)));
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

template <int Rows, int Vectors>
inline void tile(const float* a, int64_t lda, const float* b, int64_t depth, Floats (&sum)[Rows][Vectors]) {
  for (int64_t d = 0; d < depth; ++d) {
    Floats column[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) column[v] = load(b + (d * Vectors + v) * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
      const Floats row = all(a[r * lda + d]);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sum[r][v] += row * column[v];
    }
  }
}

template <int Vectors, class Finish>
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
    tile<kRows, Vectors>(a + row * lda, lda, b, depth, sum);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) store(to + r * ldc + v * kLanes, finish(sum[r][v], col + v * kLanes));
    }
  }
}

// c [rows, cols] = finish(a [rows, depth] b, first column of the vector), added to what is there where `add`; depth at most
// kDepth. Rows up to a multiple of a tile's and columns up to one of kLanes are read and written.
template <class Finish>
inline void product_block(
    const float* a, int64_t lda, int64_t rows, const float* b, int64_t depth, int64_t cols, float* c, int64_t ldc, bool add,
    const Finish& finish) {
  const int64_t end = packed_cols(cols);
  for (int64_t col = 0; col < end;) {
    const int vectors = tile_vectors(col, end);
    const float* from = b + col * depth;
    switch (vectors) {
      case 1: tile_column<1>(a, lda, rows, from, depth, c, ldc, col, add, finish); break;
      case 2: tile_column<2>(a, lda, rows, from, depth, c, ldc, col, add, finish); break;
      case 3: tile_column<3>(a, lda, rows, from, depth, c, ldc, col, add, finish); break;
    }
    col += vectors * kLanes;
  }
}

// c = finish(a b) for columns [first, last) of b: both multiples of kDepth, or last all there are.
template <class Finish>
inline void product(
    const float* a, int64_t lda, int64_t rows, const Packed& b, int64_t first, int64_t last, float* c, int64_t ldc,
    const Finish& finish) {
  for (int64_t d = 0; d < b.depth; d += kDepth) {
    const int64_t depth = b.depth - d < kDepth ? b.depth - d : kDepth;
    const float* block = b.data + d * packed_cols(b.cols) + first * depth;
    if (d + depth == b.depth) {
      product_block(a + d, lda, rows, block, depth, last - first, c, ldc, d > 0, finish);
    } else {
      product_block(a + d, lda, rows, block, depth, last - first, c, ldc, d > 0, AsItIs{});
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

template <int Size>
inline void readout(const Readout& task, int64_t begin, int64_t end, float* scratch) {
  const int64_t width = task.width, ldp = task.weights_width(), rows = (end - begin) * Size;
  float *y = scratch, *z = y + kRowBlock * width, *hidden = z + kRowBlock * width, *p = hidden + kRowBlock * kDepth;
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
    }
  }
  for (int64_t first = 0; first < task.up.cols; first += kDepth) {
    const int64_t depth = task.up.cols - first < kDepth ? task.up.cols - first : kDepth;
    const float* down = task.down.data + first * packed_cols(task.dim);
    product(y, width, rows, task.up, first, first + depth, hidden, kDepth, GeluPlusBias{task.up_bias + first});
    product_block(hidden, kDepth, rows, down, depth, task.dim, z, width, first > 0, AsItIs{});
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

inline void multiply(const float* x, const float* y, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(x + i) * load(y + i));
  for (; i < n; ++i) out[i] = x[i] * y[i];
}

// a [depth] = the product of a set's weights of genes [from, from + depth) in head h; `others`, all but the first of them, is that of
// the set before where these are the same.
template <int Size>
inline void weights_of_set(
    const CrossAttention& task, const int64_t* row, const int64_t* before, int64_t h, int64_t from, int64_t depth, float* others,
    float* a) {
  const float* w[Size];
  for (int e = 0; e < Size; ++e) w[e] = task.w + (row[e] * task.heads + h) * task.num_genes + from;
  if constexpr (Size == 1) {
    std::memcpy(a, w[0], depth * sizeof *a);
  } else if constexpr (Size == 2) {
    multiply(w[0], w[1], depth, a);
  } else {
    if (before == nullptr || std::memcmp(row + 1, before + 1, (Size - 1) * sizeof *row) != 0) {
      multiply(w[1], w[2], depth, others);
      for (int e = 3; e < Size; ++e) multiply(others, w[e], depth, others);
    }
    multiply(others, w[0], depth, a);
  }
}

template <int Size>
inline void cross(const CrossAttention& task, int64_t begin, int64_t end, float* scratch) {
  const int64_t n = task.num_genes, d = task.head_dim, dim = task.heads * d, rows = end - begin;
  const int64_t width = task.width();
  float *others = scratch, *a = others + kDepth, *c = a + kRowBlock * kDepth;
  for (int64_t h = 0; h < task.heads; ++h) {
    const float* packed = task.packed + h * n * packed_cols(d + 1);
    for (int64_t from = 0; from < n; from += kDepth) {
      const int64_t depth = n - from < kDepth ? n - from : kDepth;
      const int64_t* before = nullptr;
      for (int64_t b = begin; b < end; ++b) {
        const int64_t* row = task.rows + task.turn[b] * Size;
        weights_of_set<Size>(task, row, before, h, from, depth, others, a + (b - begin) * kDepth);
        before = row;
      }
      product_block(
          a, kDepth, rows, packed + from * packed_cols(d + 1), depth, d + 1, c, width, from > 0, AsItIs{});
    }
    for (int64_t b = begin; b < end; ++b) {
      const int64_t set = task.turn[b];
      const float* sum = c + (b - begin) * width;
      const int64_t* entry = task.sets + set * Size;
      float* out = task.out + set * dim + h * d;
      float beta[Size];
      for (int e = 0; e < Size; ++e) {
        const int64_t gene = task.genes[set * Size + e];
        beta[e] = task.bias[h * n + gene];
        for (int f = 0; f < Size; ++f) beta[e] *= task.w[(task.rows[set * Size + f] * task.heads + h) * n + gene];
      }
      const float whole = sum[d], inverse = 1.0f / whole;
      task.total[set * task.heads + h] = whole;
      for (int64_t j = 0; j < d; ++j) {
        float x = sum[j], own = 0;
        for (int e = 0; e < Size; ++e) {
          x += beta[e] * task.change[entry[e] * dim + h * d + j];
          own += task.add[entry[e] * dim + h * d + j];
        }
        out[j] = own + x * inverse;
      }
    }
  }
}

}  // namespace

int64_t packed_size(int64_t depth, int64_t cols) { return depth * packed_cols(cols); }

void pack(const float* from, int64_t by_depth, int64_t by_col, int64_t depth, int64_t cols, float* to) {
  const int64_t end = packed_cols(cols);
  for (int64_t d0 = 0; d0 < depth; d0 += kDepth) {
    const int64_t last = depth - d0 < kDepth ? depth : d0 + kDepth;
    for (int64_t col = 0; col < end;) {
      const int64_t past = col + tile_vectors(col, end) * kLanes;
      for (int64_t d = d0; d < last; ++d) {
        for (int64_t c = col; c < past; ++c) *to++ = c < cols ? from[d * by_depth + c * by_col] : 0.0f;
      }
      col = past;
    }
  }
}

void readout_block(const Readout& task, int64_t begin, int64_t end, float* scratch) {
  switch (task.size) {
    case 1: return readout<1>(task, begin, end, scratch);
    case 2: return readout<2>(task, begin, end, scratch);
    case 3: return readout<3>(task, begin, end, scratch);
    case 4: return readout<4>(task, begin, end, scratch);
  }
}

void cross_block(const CrossAttention& task, int64_t begin, int64_t end, float* scratch) {
  switch (task.size) {
    case 1: return cross<1>(task, begin, end, scratch);
    case 2: return cross<2>(task, begin, end, scratch);
    case 3: return cross<3>(task, begin, end, scratch);
    case 4: return cross<4>(task, begin, end, scratch);
  }
}

void mlp_block(const Mlp& task, int64_t begin, int64_t end, float* scratch) {
  const int64_t rows = end - begin, width = task.width();
  float *hidden = scratch, *x = hidden + kRowBlock * width;  // a copy: whole tiles of rows are read
  std::memcpy(x, task.x + begin * task.dim, rows * task.dim * sizeof(float));
  product(x, task.dim, rows, task.up, 0, task.hidden, hidden, width, GeluPlusBias{task.up_bias});
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
