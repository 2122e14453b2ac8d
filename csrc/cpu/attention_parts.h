// What whole and masked maps share: the draw of dropout, and the backward by parts of a head's queries, each with a dk and a dv of
// its own.

#pragma once

#include "attention_rows.h"
#include "room.h"
#include "values.h"

namespace cellattn {

// Seed and offset, int64 [2], and the probability in steps of 2^-16; nothing, and 0, where nothing is dropped.
inline void check_draw(const std::optional<Tensor>& draw, int64_t threshold, const Tensor& q) {
  if (draw) {
    check_tensor("draw", *draw, 1, {ScalarType::Long});
    check_same_device("draw", *draw, q);
    check_size("draw", draw->numel(), 2);
  }
  STD_TORCH_CHECK(
      draw ? threshold >= 1 && threshold <= 65535 : threshold == 0,
      "threshold: expected 65536 times a probability, 1 to 65535, or 0 without a draw, got ", threshold);
}

inline DropoutBits bits_of(const std::optional<Tensor>& draw, int64_t threshold) {
  if (!draw) return {};
  const uint64_t seed = static_cast<uint64_t>(longs_of(*draw)[0]);
  const uint32_t offset = static_cast<uint32_t>(longs_of(*draw)[1]);
  return {{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)}, offset, static_cast<int32_t>(threshold)};
}

// 1 / (1 - p)
template <class T>
inline T rescale_of(int64_t threshold) {
  return static_cast<T>(65536.0 / (65536.0 - static_cast<double>(threshold)));
}

// f(task) for every task, by this thread alone where one is what the work is worth.
template <class F>
void for_each_of(int64_t num_threads, int64_t num_tasks, const F& f) {
  if (num_threads > 1) return for_each_task(num_tasks, f);
  for (int64_t task = 0; task < num_tasks; ++task) f(task);
}

// f(task, room) for every task as above, with room of `size` numbers, zeros but for what another task has left there.
template <class T, class F>
void for_each_with_room(int64_t num_threads, int64_t num_tasks, int64_t size, const F& f) {
  if (num_threads > 1) {
    return for_each_task(num_tasks, [&](int64_t task) {
      Room<T> room(size);
      f(task, room.data());
    });
  }
  Room<T> room(size);
  for (int64_t task = 0; task < num_tasks; ++task) f(task, room.data());
}

// dk [L, Tk, D], dv [L, Tk, DV] of the heads head_of(0), ..., head_of(count - 1). Parts are of whole blocks, and added up in their
// order. backward(head, begin, end, dk, dv, room) does those of the queries [begin, end).
template <class T, class HeadOf, class Backward>
void backward_by_parts(
    const AttentionRows<T>& rows, int64_t num_threads, int64_t count, int64_t parts, const HeadOf& head_of,
    const Backward& backward, T* dk, T* dv) {
  const int64_t padded = rows.padded_keys, blocks = ceil_div(rows.num_queries, kMapRows);
  const int64_t room_k = padded * rows.width, room_v = padded * rows.width_v;
  Room<T> dk_parts(count * parts * room_k), dv_parts(count * parts * room_v);
  T* dk_data = dk_parts.data();
  T* dv_data = dv_parts.data();
  for_each_with_room<T>(num_threads, count * parts, attention_room(rows), [&](int64_t t, T* room) {
    const int64_t part = t % parts, begin = part * blocks / parts * kMapRows;
    const int64_t end = std::min((part + 1) * blocks / parts * kMapRows, rows.num_queries);
    backward(head_of(t / parts), begin, end, dk_data + t * room_k, dv_data + t * room_v, room);
  });
  const auto add_parts = [&](const T* from, int64_t width, int64_t dim, T* to) {
    for_each_block(count * rows.num_keys, 1024, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t h = i / rows.num_keys, key = i % rows.num_keys;
        const T* row = from + (h * parts * padded + key) * width;
        T* sums = to + (head_of(h) * rows.num_keys + key) * dim;
        for (int64_t c = 0; c < dim; ++c) {
          T sum = 0;
          for (int64_t part = 0; part < parts; ++part) sum += row[part * padded * width + c];
          sums[c] = sum;
        }
      }
    });
  };
  add_parts(dk_data, rows.width, rows.dim, dk);
  add_parts(dv_data, rows.width_v, rows.dim_v, dv);
}

}  // namespace cellattn
