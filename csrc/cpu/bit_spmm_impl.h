// The body of bit_spmm_portable.cpp and its siblings: the same text, compiled for each instruction set. CELLATTN_VECTOR_BYTES is
// its widest vector.

constexpr int kSubsets = 16, kGroups = kWordBits / 4;  // of four columns; groups in a word

template <class T, int Vectors>
struct Lanes {
  typedef T Vec __attribute__((vector_size(CELLATTN_VECTOR_BYTES)));
  static constexpr int kWidth = Vectors * CELLATTN_VECTOR_BYTES / static_cast<int>(sizeof(T));
  Vec v[Vectors];

  void clear() {
    for (int i = 0; i < Vectors; ++i) v[i] = Vec{};
  }
  void add(const Lanes& other) {
    for (int i = 0; i < Vectors; ++i) v[i] += other.v[i];
  }
  void load(const T* from, int64_t width) {
    clear();
    std::memcpy(v, from, width * sizeof(T));
  }
  void store(T* to, int64_t width) const { std::memcpy(to, v, width * sizeof(T)); }
};

template <class T, int Vectors>
int64_t bit_tile(const BitSpmm<T>& task, int64_t begin, int64_t end, int64_t first) {
  using L = Lanes<T, Vectors>;
  const int64_t f = task.num_features, left = f - first, width = left < L::kWidth ? left : L::kWidth;
  alignas(64) L table[kGroups][kSubsets];
  alignas(64) L sum[kBitRows];
  for (int64_t r = begin; r < end; ++r) sum[r - begin].clear();
  for (int64_t w = 0; w < task.num_words; ++w) {
    for (int g = 0; g < kGroups; ++g) {
      L one[4];
      for (int c = 0; c < 4; ++c) {
        const int64_t col = w * kWordBits + 4 * g + c;
        if (col < task.num_cols) {
          one[c].load(task.x + col * f + first, width);
        } else {
          one[c].clear();
        }
      }
      table[g][0].clear();
      for (int s = 1; s < kSubsets; ++s) {
        table[g][s] = table[g][s & (s - 1)];
        table[g][s].add(one[__builtin_ctz(s)]);
      }
    }
    for (int64_t r = begin; r < end; ++r) {
      const int64_t row = task.rows == nullptr ? r : task.rows[r];
      Word bits = task.words[row * task.num_words + w];
      if (bits == 0) continue;
      L even = sum[r - begin], odd;  // two sums that do not wait for each other
      odd.clear();
#pragma GCC unroll 8
      for (int g = 0; g < kGroups; g += 2) {
        even.add(table[g][bits & 15]);
        odd.add(table[g + 1][bits >> 4 & 15]);
        bits >>= 8;
      }
      even.add(odd);
      sum[r - begin] = even;
    }
  }
  for (int64_t r = begin; r < end; ++r) sum[r - begin].store(task.out + r * f + first, width);
  return width;
}

// As many vectors as the features left fill.
template <class T>
int64_t bit_any_tile(const BitSpmm<T>& task, int64_t begin, int64_t end, int64_t first) {
  const int64_t left = task.num_features - first;
  if (left > Lanes<T, 3>::kWidth) return bit_tile<T, 4>(task, begin, end, first);
  if (left > Lanes<T, 2>::kWidth) return bit_tile<T, 3>(task, begin, end, first);
  if (left > Lanes<T, 1>::kWidth) return bit_tile<T, 2>(task, begin, end, first);
  return bit_tile<T, 1>(task, begin, end, first);
}

#define CELLATTN_DEFINE_BIT_SPMM(T)                                                            \
  int64_t bit_spmm_tile(const BitSpmm<T>& task, int64_t begin, int64_t end, int64_t first) {   \
    return bit_any_tile<T>(task, begin, end, first);                                           \
  }
