// Dropout of attention maps on the CPU: what the instruction sets share.

#pragma once

#include <cstdint>

namespace cellattn {

// Philox counts 64 keys of a row in 8 calls of 128 bits: key j is 16 bits of counter (j / 64 * 8 + j % 8, row, head, offset), half
// j / 8 % 2 of word j / 16 % 4. An entry stays where its 16 bits are at least `threshold`.
struct DropoutBits {
  uint32_t seed[2];
  uint32_t offset;
  int32_t threshold;  // in [1, 65535]; 0 where nothing is dropped

  // Of another entry for the same pair of tokens.
  DropoutBits copy(int64_t number) const {
    return {{seed[0], seed[1]}, offset + static_cast<uint32_t>(number), threshold};
  }
};

}  // namespace cellattn
