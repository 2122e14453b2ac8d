// What is a batch of sets; sets as words, words as masks, on the CPU. Words and masks are transposes of each other, 64 by 64
// bits at a time.

#include <algorithm>
#include <cstring>
#include <vector>

#include "values.h"

namespace cellattn {
namespace {

constexpr int64_t kTile = 64;

// rows[i] bit j <-> rows[j] bit i, by swapping ever smaller blocks.
void transpose_bits(Word* rows) {
  Word mask = 0x00000000FFFFFFFFull;
  for (int width = 32; width != 0; width >>= 1, mask ^= mask << width) {
    for (int i = 0; i < kTile; i = (i + width + 1) & ~width) {
      const Word swap = ((rows[i] >> width) ^ rows[i + width]) & mask;
      rows[i + width] ^= swap;
      rows[i] ^= swap << width;
    }
  }
}

// 8 bits as 8 bytes of 0 or 1, the lowest bit first.
Word spread(Word bits) {
  const Word one_a_byte = ((bits & 0xFF) * 0x0101010101010101ull) & 0x8040201008040201ull;
  return ((one_a_byte + 0x7F7F7F7F7F7F7F7Full) >> 7) & 0x0101010101010101ull;
}

// 8 bytes of 0 or 1 as 8 bits.
Word gather(Word bytes) { return (bytes * 0x0102040810204080ull) >> 56; }

// bool []: whether ptr rises from 0 to the length of index, whose entries are below size and, if asked for, ascend in each set or
// stand once in it. One look that finds nothing to say; who is told false looks for what is wrong.
Tensor are_sets(const Tensor& index, const Tensor& ptr, int64_t size, bool ascending, bool distinct) {
  check_tensor("index", index, 1, {ScalarType::Long});
  check_tensor("ptr", ptr, 1, {ScalarType::Long});
  check_same_device("ptr", ptr, index);
  Tensor result = empty_on(index, {}, ScalarType::Bool);
  const int64_t* i = longs_of(index);
  const int64_t* p = longs_of(ptr);
  const int64_t length = index.numel(), ends = ptr.numel();
  bool sound = ends >= 1 && p[0] == 0 && p[ends - 1] == length;
  for (int64_t b = 1; b < ends; ++b) sound &= p[b - 1] <= p[b];
  for (int64_t at = 0; at < length; ++at) sound &= i[at] >= 0 && i[at] < size;
  for (int64_t b = 1; b < ends && sound && ascending; ++b) {
    for (int64_t at = p[b - 1] + 1; at < p[b]; ++at) sound &= i[at - 1] < i[at];
  }
  std::vector<int64_t> set;
  for (int64_t b = 1; b < ends && sound && distinct && !ascending; ++b) {
    set.assign(i + p[b - 1], i + p[b]);
    std::sort(set.begin(), set.end());
    sound = std::adjacent_find(set.begin(), set.end()) == set.end();
  }
  *static_cast<bool*>(result.mutable_data_ptr()) = sound;
  return result;
}

Tensor set_words(const Tensor& seeds, const Tensor& ptr, int64_t num_nodes, bool complement) {
  check_ragged(seeds, ptr);
  STD_TORCH_CHECK(num_nodes >= 0 && num_nodes <= INT32_MAX, "num_nodes: expected 0 to 2147483647, got ", num_nodes);
  check_ragged_values(seeds, ptr, num_nodes);
  const int64_t num_sets = ptr.numel() - 1, w = num_words(num_sets);
  Tensor words = empty_on(seeds, {num_nodes, w}, ScalarType::Long);
  Word* out = words_of(words);
  for_each_block(num_nodes, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t c = 0; c < w; ++c) out[i * w + c] = complement ? valid_bits(num_sets, c) : 0;
    }
  });
  const int64_t* s = longs_of(seeds);
  const int64_t* p = longs_of(ptr);
  for (int64_t b = 0; b < num_sets; ++b) {
    const Word bit = Word{1} << (b % kWordBits);
    for (int64_t at = p[b]; at < p[b + 1]; ++at) {
      Word& word = out[s[at] * w + b / kWordBits];
      word = complement ? word & ~bit : word | bit;
    }
  }
  return words;
}

Tensor unpack_words(const Tensor& words, int64_t num_sets) {
  check_words("words", words);
  check_num_sets(words, num_sets);
  const int64_t m = words.size(0), w = words.size(1);
  Tensor keep = empty_on(words, {num_sets, m}, ScalarType::Bool);
  const Word* in = const_words_of(words);
  uint8_t* out = static_cast<uint8_t*>(keep.mutable_data_ptr());
  for_each_block(ceil_div(m, kTile) * w, 64, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t i = task / w * kTile, c = task % w, rows = std::min(kTile, m - i);
      Word tile[kTile] = {};
      for (int64_t k = 0; k < rows; ++k) tile[k] = in[(i + k) * w + c];
      transpose_bits(tile);
      for (int64_t b = c * kWordBits; b < std::min(num_sets, (c + 1) * kWordBits); ++b) {
        Word bytes[kTile / 8];
        for (int64_t k = 0; k < kTile / 8; ++k) bytes[k] = spread(tile[b % kWordBits] >> (8 * k));
        std::memcpy(out + b * m + i, bytes, rows);
      }
    }
  });
  return keep;
}

Tensor pack_words(const Tensor& keep) {
  check_tensor("keep", keep, 2, {ScalarType::Bool});
  const int64_t num_sets = keep.size(0), m = keep.size(1), w = num_words(num_sets);
  Tensor words = empty_on(keep, {m, w}, ScalarType::Long);
  const uint8_t* in = static_cast<const uint8_t*>(keep.const_data_ptr());
  Word* out = words_of(words);
  for_each_block(ceil_div(m, kTile) * w, 64, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t i = task / w * kTile, c = task % w, rows = std::min(kTile, m - i);
      Word tile[kTile] = {};
      for (int64_t b = c * kWordBits; b < std::min(num_sets, (c + 1) * kWordBits); ++b) {
        Word bytes[kTile / 8] = {}, bits = 0;
        std::memcpy(bytes, in + b * m + i, rows);
        for (int64_t k = 0; k < kTile / 8; ++k) bits |= gather(bytes[k]) << (8 * k);
        tile[b % kWordBits] = bits;
      }
      transpose_bits(tile);
      for (int64_t k = 0; k < rows; ++k) out[(i + k) * w + c] = tile[k];
    }
  });
  return words;
}

Tensor edge_words(const Tensor& rowptr, const Tensor& col, const Tensor& words) {
  check_words("words", words);
  const int64_t n = words.size(0), w = words.size(1);
  check_size("relations of rowptr", check_stack(rowptr, col, n), 1);
  check_stack_values(rowptr, col, n);
  Tensor out_words = empty_on(words, {col.numel(), w}, ScalarType::Long);
  const Word* in = const_words_of(words);
  const int64_t* r = longs_of(rowptr);
  const int32_t* c = ints_of(col);
  Word* out = words_of(out_words);
  for_each_row_block(r, n, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t e = r[i]; e < r[i + 1]; ++e) {
        for (int64_t k = 0; k < w; ++k) out[e * w + k] = in[i * w + k] & in[c[e] * w + k];
      }
    }
  });
  return out_words;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cellattn, CPU, m) {
  m.impl("are_sets", TORCH_BOX(&are_sets));
  m.impl("set_words", TORCH_BOX(&set_words));
  m.impl("unpack_words", TORCH_BOX(&unpack_words));
  m.impl("pack_words", TORCH_BOX(&pack_words));
  m.impl("edge_words", TORCH_BOX(&edge_words));
}

}  // namespace cellattn
