// What only the CPU can ask of its arguments without waiting, the values of index tensors; and features in the dtype it sums in.

#pragma once

#include "../checks.h"
#include "parallel.h"

namespace cellattn {

inline void check_rises(const char* name, const int64_t* ptr, int64_t size, int64_t end) {
  STD_TORCH_CHECK(ptr[0] == 0, name, ": expected to start with 0, got ", ptr[0]);
  for (int64_t i = 1; i < size; ++i) {
    STD_TORCH_CHECK(
        ptr[i] >= ptr[i - 1], name, ": expected to rise, got ", ptr[i], " after ", ptr[i - 1], " at position ", i);
  }
  STD_TORCH_CHECK(ptr[size - 1] == end, name, ": expected to end with ", end, ", got ", ptr[size - 1]);
}

// Rows of a stack rise and its columns are genes.
inline void check_stack_values(const Tensor& rowptr, const Tensor& col, int64_t num_nodes) {
  check_rises("rowptr", longs_of(rowptr), rowptr.numel(), col.numel());
  const int32_t* c = ints_of(col);
  std::atomic<bool> wrong{false};
  for_each_block(col.numel(), 1 << 16, [&](int64_t begin, int64_t end) {
    uint32_t outside = 0;  // no early exit: the loop is as fast as memory as it stands
    for (int64_t e = begin; e < end; ++e) outside |= static_cast<uint32_t>(c[e]) >= static_cast<uint32_t>(num_nodes);
    if (outside) wrong.store(true, std::memory_order_relaxed);
  });
  STD_TORCH_CHECK(!wrong.load(), "col: expected genes in [0, ", num_nodes, ")");
}

inline void check_ragged_values(const Tensor& seeds, const Tensor& ptr, int64_t num_nodes) {
  check_rises("ptr", longs_of(ptr), ptr.numel(), seeds.numel());
  const int64_t* s = longs_of(seeds);
  for (int64_t p = 0; p < seeds.numel(); ++p) {
    STD_TORCH_CHECK(
        s[p] >= 0 && s[p] < num_nodes, "seeds: position ", p, " holds ", s[p], ", expected a gene in [0, ", num_nodes, ")");
  }
}

template <class T>
const T* data_of(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
const T* data_of(const std::optional<Tensor>& x) {
  return x ? data_of<T>(*x) : nullptr;
}

// x in the dtype of the arithmetic, or a result in that of x.
inline Tensor widened(const Tensor& x, ScalarType dtype) {
  return x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
}

}  // namespace cellattn
