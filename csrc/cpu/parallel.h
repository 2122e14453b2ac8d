// Work on the CPU's threads, and blocks of CSR rows that cost about the same.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

namespace cellattn {

// f(task) for every task in [0, num_tasks), each thread taking the next one when it is free. Where f throws, the caller's thread throws
// std::bad_alloc or std::runtime_error, and not by way of the stable ABI, which would make another error of it.
template <class F>
void for_each_task(int64_t num_tasks, const F& f) {
  if (num_tasks <= 1) {
    for (int64_t task = 0; task < num_tasks; ++task) f(task);
    return;
  }
  const int64_t num_threads = std::min<int64_t>(num_tasks, torch::stable::get_num_threads());
  std::atomic<int64_t> next{0};
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  std::string error;  // the first; empty for missing memory
  torch::stable::parallel_for(0, num_threads, 1, [&](int64_t, int64_t) {
    try {
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < num_tasks;) f(task);
    } catch (const std::bad_alloc&) {
      failed.test_and_set();
      next.store(num_tasks, std::memory_order_relaxed);
    } catch (const std::exception& thrown) {
      if (!failed.test_and_set()) error = thrown.what();
      next.store(num_tasks, std::memory_order_relaxed);
    }
  });
  if (!failed.test_and_set()) return;
  if (error.empty()) throw std::bad_alloc();
  throw std::runtime_error(error);
}

// Enough blocks that none of the threads waits long for the last one.
inline int64_t num_blocks_for(int64_t work, int64_t smallest) {
  const int64_t wanted = 8 * static_cast<int64_t>(torch::stable::get_num_threads());
  return std::max<int64_t>(1, std::min(wanted, work / smallest));
}

constexpr int64_t kRowCost = 4;  // of a row, in edges

// Where block `block` of `num_blocks` begins among the rows of a CSR matrix: blocks share edges and rows evenly.
inline int64_t block_begin(const int64_t* rowptr, int64_t num_rows, int64_t block, int64_t num_blocks) {
  const int64_t total = rowptr[num_rows] - rowptr[0] + kRowCost * num_rows;
  const int64_t wanted = static_cast<int64_t>(static_cast<double>(total) * block / num_blocks);
  if (block >= num_blocks) return num_rows;
  int64_t low = 0, high = num_rows;  // the first row with at least `wanted` before it
  while (low < high) {
    const int64_t mid = low + (high - low) / 2;
    if (rowptr[mid] - rowptr[0] + kRowCost * mid < wanted) {
      low = mid + 1;
    } else {
      high = mid;
    }
  }
  return low;
}

// f(first_row, last_row) over blocks of rows.
template <class F>
void for_each_row_block(const int64_t* rowptr, int64_t num_rows, const F& f) {
  const int64_t work = rowptr[num_rows] - rowptr[0] + kRowCost * num_rows;
  const int64_t num_blocks = num_blocks_for(work, 16384);
  for_each_task(num_blocks, [&](int64_t block) {
    const int64_t begin = block_begin(rowptr, num_rows, block, num_blocks);
    const int64_t end = block_begin(rowptr, num_rows, block + 1, num_blocks);
    if (begin < end) f(begin, end);
  });
}

// f(first, last) over blocks of [0, n).
template <class F>
void for_each_block(int64_t n, int64_t smallest, const F& f) {
  const int64_t num_blocks = num_blocks_for(n, smallest);
  for_each_task(num_blocks, [&](int64_t block) { f(n * block / num_blocks, n * (block + 1) / num_blocks); });
}

}  // namespace cellattn
