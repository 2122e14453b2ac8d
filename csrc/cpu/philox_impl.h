// Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011), several counters at a time: which entries of a
// dropped map stay. Compiled for each instruction set.

constexpr uint32_t kPhiloxFactor[2] = {0xD2511F53u, 0xCD9E8D57u};
constexpr uint32_t kPhiloxWeyl[2] = {0x9E3779B9u, 0xBB67AE85u};
constexpr int kPhiloxRounds = 10;

// Numbers of 32 bits in lanes of 64, of which the upper half is anything: the product of two lower halves is one instruction.
typedef uint64_t Wide __attribute__((vector_size(CELLATTN_VECTOR_BYTES)));
constexpr int kWideLanes = CELLATTN_VECTOR_BYTES / 8;

inline Wide product(Wide x, uint32_t factor) {
#if defined(__x86_64__) && CELLATTN_VECTOR_BYTES == 64
  return reinterpret_cast<Wide>(_mm512_mul_epu32(reinterpret_cast<__m512i>(x), _mm512_set1_epi64(factor)));
#elif defined(__x86_64__) && CELLATTN_VECTOR_BYTES == 32
  return reinterpret_cast<Wide>(_mm256_mul_epu32(reinterpret_cast<__m256i>(x), _mm256_set1_epi64x(factor)));
#else
  return (x & 0xFFFFFFFFu) * factor;
#endif
}

// All rounds for `Parts` vectors of counters x[word][part], independent of each other, so that one's products are made while another
// waits.
template <int Parts>
inline void philox(const DropoutBits& bits, Wide (*x)[Parts]) {
  uint32_t key[2] = {bits.seed[0], bits.seed[1]};
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) {
#pragma GCC unroll 4
    for (int part = 0; part < Parts; ++part) {
      const Wide a = product(x[0][part], kPhiloxFactor[0]), b = product(x[2][part], kPhiloxFactor[1]);
      x[0][part] = (b >> 32) ^ x[1][part] ^ key[0];
      x[2][part] = (a >> 32) ^ x[3][part] ^ key[1];
      x[1][part] = b;
      x[3][part] = a;
    }
    for (int i = 0; i < 2; ++i) key[i] += kPhiloxWeyl[i];
  }
}

// keep[j] for the keys j of group `group` (64 of them) in a row of the map: all bits, or none where the entry is dropped.
inline void fill_keep(const DropoutBits& bits, int64_t head, int64_t row, int64_t group, int32_t* keep) {
  constexpr int kParts = 8 / kWideLanes;
  const uint64_t first = static_cast<uint32_t>(group) * 8u;
  Wide x[4][kParts];
  Wide lanes = {};
  for (int lane = 0; lane < kWideLanes; ++lane) lanes[lane] = lane;
  for (int part = 0; part < kParts; ++part) {
    x[0][part] = lanes + (first + part * kWideLanes);
    x[1][part] = Wide{} + static_cast<uint32_t>(row);
    x[2][part] = Wide{} + static_cast<uint32_t>(head);
    x[3][part] = Wide{} + bits.offset;
  }
  philox<kParts>(bits, x);
  typedef uint32_t Narrow __attribute__((vector_size(CELLATTN_VECTOR_BYTES / 2)));
  typedef int32_t Flags __attribute__((vector_size(CELLATTN_VECTOR_BYTES / 2)));
  typedef int32_t Store __attribute__((vector_size(CELLATTN_VECTOR_BYTES / 2), aligned(4), may_alias));
  for (int word = 0; word < 4; ++word) {
    for (int part = 0; part < kParts; ++part) {
      const Narrow all = __builtin_convertvector(x[word][part], Narrow);
      int32_t* to = keep + 16 * word + part * kWideLanes;
      *reinterpret_cast<Store*>(to) = reinterpret_cast<Flags>(all & 0xFFFFu) >= bits.threshold;
      *reinterpret_cast<Store*>(to + 8) = reinterpret_cast<Flags>(all >> 16) >= bits.threshold;
    }
  }
}

// keep[e], 1 or 0, for n entries in one row of the map (ByRow) or one column, `line`, at `first + other[e]` along it. A counter of
// its own each. `other` and `keep` have room for a vector more.
template <bool ByRow, class T>
inline void keep_entries(
    const DropoutBits& bits, int64_t head, int64_t line, int64_t first, const int32_t* other, int64_t n, T* keep) {
  constexpr int kParts = 16 / kWideLanes;
  for (int64_t e = 0; e < n; e += 16) {
    Wide x[4][kParts], column[kParts];
    for (int part = 0; part < kParts; ++part) {
      Wide across;
      for (int lane = 0; lane < kWideLanes; ++lane) across[lane] = static_cast<uint32_t>(first + other[e + part * kWideLanes + lane]);
      const Wide along = Wide{} + static_cast<uint32_t>(line);
      column[part] = ByRow ? across : along;
      x[0][part] = column[part] / 64 * 8 + column[part] % 8;
      x[1][part] = ByRow ? along : across;
      x[2][part] = Wide{} + static_cast<uint32_t>(head);
      x[3][part] = Wide{} + bits.offset;
    }
    philox<kParts>(bits, x);
    for (int part = 0; part < kParts; ++part) {
      const Wide half = column[part] / 8 % 2 * 16;
      const Wide lower = (column[part] & 16) != 0 ? x[1][part] : x[0][part];
      const Wide upper = (column[part] & 16) != 0 ? x[3][part] : x[2][part];
      const Wide word = (column[part] & 32) != 0 ? upper : lower;
      const Wide own = word >> half & 0xFFFFu;
      for (int lane = 0; lane < kWideLanes; ++lane) {
        keep[e + part * kWideLanes + lane] = static_cast<int32_t>(own[lane]) >= bits.threshold ? T{1} : T{0};
      }
    }
  }
}
