// Memory for vectors.

#pragma once

#include <cstdint>
#include <vector>

namespace cellattn {

// Zeros on a boundary of 64 bytes.
template <class T>
class Room {
 public:
  explicit Room(int64_t size) : room_(size + 64 / sizeof(T)) {}
  T* data() { return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(room_.data()) + 63) / 64 * 64); }

 private:
  std::vector<T> room_;
};

}  // namespace cellattn
