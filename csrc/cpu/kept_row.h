// What the products with graphs share besides their loops.

#pragma once

#include <cstdint>

namespace cellattn {

constexpr int64_t kTileBytes = 256;  // of a row of x: a pass over 6,607 rows of it stays in the second-level cache

// The neighbours of a row that take part: where their features are, and the weights of the edges. Each task has room of its
// own for the longest row.
template <class T>
struct KeptRow {
  int32_t* col;
  T* value;
};

}  // namespace cellattn
