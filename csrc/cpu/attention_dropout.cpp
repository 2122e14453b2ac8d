// Attention with dropout on the CPU: checks, and how the work is shared out.

#include "attention_dropout.h"

#include "isa.h"
#include "room.h"
#include "values.h"

namespace cellattn {
namespace {

constexpr int64_t kMostParts = 16;  // of a head's queries in the backward, each with a dk and a dv of its own

template <class T>
struct DropoutLoops {
  int64_t vector_bytes = 16;
  void (*pack)(const DropoutAttention<T>&, int64_t) = &portable::dropout_pack;
  void (*forward)(const DropoutAttention<T>&, int64_t, int64_t, int64_t, T*) = &portable::dropout_forward;
  void (*backward)(const DropoutAttention<T>&, int64_t, int64_t, int64_t, T*, T*, T*) = &portable::dropout_backward;

  DropoutLoops() {
#if defined(__x86_64__)
    if (use_avx512()) {
      vector_bytes = 64;
      pack = &avx512::dropout_pack;
      forward = &avx512::dropout_forward;
      backward = &avx512::dropout_backward;
    } else if (use_avx2()) {
      vector_bytes = 32;
      pack = &avx2::dropout_pack;
      forward = &avx2::dropout_forward;
      backward = &avx2::dropout_backward;
    }
#endif
  }
};

ScalarType check_heads(const char* name, const Tensor& x, const Tensor& first) {
  check_tensor(name, x, 3, {ScalarType::Double, ScalarType::Float});
  check_same_device(name, x, first);
  STD_TORCH_CHECK(x.scalar_type() == first.scalar_type(), name, ": expected the dtype of q");
  check_size(name, x.size(0), first.size(0));
  return x.scalar_type();
}

void check_problem(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& draw, int64_t threshold) {
  check_heads("q", q, q);
  check_heads("k", k, q);
  check_heads("v", v, q);
  check_size("k", k.size(2), q.size(2));
  check_size("v", v.size(1), k.size(1));
  STD_TORCH_CHECK(k.size(1) >= 1, "k: expected at least one token");
  STD_TORCH_CHECK(
      q.size(1) <= UINT32_MAX && k.size(1) <= UINT32_MAX && q.size(0) <= UINT32_MAX,
      "q: expected at most 4294967295 heads, queries and keys");
  check_tensor("draw", draw, 1, {ScalarType::Long});
  check_same_device("draw", draw, q);
  check_size("draw", draw.numel(), 2);
  STD_TORCH_CHECK(
      threshold >= 1 && threshold <= 65535, "threshold: expected 65536 times a probability, 1 to 65535, got ", threshold);
}

template <class T>
DropoutAttention<T> problem(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& draw, double scale, int64_t threshold,
    const DropoutLoops<T>& loops) {
  DropoutAttention<T> task = {};
  task.q = static_cast<const T*>(q.const_data_ptr());
  task.k = static_cast<const T*>(k.const_data_ptr());
  task.v = static_cast<const T*>(v.const_data_ptr());
  task.num_heads = q.size(0);
  task.num_queries = q.size(1);
  task.num_keys = k.size(1);
  task.dim = q.size(2);
  task.dim_v = v.size(2);
  const int64_t lanes = loops.vector_bytes / static_cast<int64_t>(sizeof(T));
  task.width = ceil_div(task.dim, lanes) * lanes;
  task.width_v = ceil_div(task.dim_v, lanes) * lanes;
  task.padded_keys = ceil_div(task.num_keys, kDropoutKeys) * kDropoutKeys;
  task.scale = static_cast<T>(scale);
  task.rescale = static_cast<T>(65536.0 / (65536.0 - static_cast<double>(threshold)));
  const uint64_t seed = static_cast<uint64_t>(longs_of(draw)[0]);
  task.bits.seed[0] = static_cast<uint32_t>(seed);
  task.bits.seed[1] = static_cast<uint32_t>(seed >> 32);
  task.bits.offset = static_cast<uint32_t>(longs_of(draw)[1]);
  task.bits.threshold = static_cast<int32_t>(threshold);
  return task;
}

template <class T>
void run_forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& draw, double scale, int64_t threshold, const Tensor& out,
    const Tensor& lse) {
  const DropoutLoops<T> loops;
  DropoutAttention<T> task = problem<T>(q, k, v, draw, scale, threshold, loops);
  Room<T> k_columns(task.num_heads * task.dim * task.padded_keys), v_rows(task.num_heads * task.padded_keys * task.width_v);
  task.k_columns = k_columns.data();
  task.v_rows = v_rows.data();
  task.out = static_cast<T*>(out.mutable_data_ptr());
  task.lse = static_cast<T*>(lse.mutable_data_ptr());
  for_each_task(task.num_heads, [&](int64_t head) { loops.pack(task, head); });
  const int64_t rows = 4 * kDropoutRows, blocks = ceil_div(task.num_queries, rows);
  for_each_task(task.num_heads * blocks, [&](int64_t t) {
    Room<T> room(dropout_room(task));
    const int64_t begin = t % blocks * rows;
    loops.forward(task, t / blocks, begin, std::min(begin + rows, task.num_queries), room.data());
  });
}

template <class T>
void run_backward(
    const Tensor& dout, const Tensor& delta, const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& draw, double scale, int64_t threshold, const Tensor& dq, const Tensor& dk, const Tensor& dv) {
  const DropoutLoops<T> loops;
  DropoutAttention<T> task = problem<T>(q, k, v, draw, scale, threshold, loops);
  const int64_t heads = task.num_heads, padded = task.padded_keys;
  Room<T> k_columns(heads * task.dim * padded), v_columns(heads * task.dim_v * padded), k_rows(heads * padded * task.width);
  task.k_columns = k_columns.data();
  task.v_columns = v_columns.data();
  task.k_rows = k_rows.data();
  task.dout = static_cast<const T*>(dout.const_data_ptr());
  task.delta = static_cast<const T*>(delta.const_data_ptr());
  task.lse = const_cast<T*>(static_cast<const T*>(lse.const_data_ptr()));
  task.dq = static_cast<T*>(dq.mutable_data_ptr());
  for_each_task(heads, [&](int64_t head) { loops.pack(task, head); });
  // Parts of a head's queries, enough of them for the threads, each of whole blocks.
  const int64_t blocks = ceil_div(task.num_queries, kDropoutRows);
  const int64_t wanted = ceil_div(8 * static_cast<int64_t>(torch::stable::get_num_threads()), heads);
  const int64_t parts = std::max<int64_t>(1, std::min({wanted, blocks / 4, kMostParts}));
  const int64_t room_k = padded * task.width, room_v = padded * task.width_v;
  Room<T> dk_parts(heads * parts * room_k), dv_parts(heads * parts * room_v);
  T* dk_data = dk_parts.data();
  T* dv_data = dv_parts.data();
  for_each_task(heads * parts, [&](int64_t t) {
    Room<T> room(dropout_room(task));
    const int64_t part = t % parts, begin = part * blocks / parts * kDropoutRows;
    const int64_t end = std::min((part + 1) * blocks / parts * kDropoutRows, task.num_queries);
    loops.backward(task, t / parts, begin, end, dk_data + t * room_k, dv_data + t * room_v, room.data());
  });
  const auto add_parts = [&](const T* from, int64_t width, int64_t dim, T* to) {
    for_each_block(heads * task.num_keys, 1024, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const T* row = from + (i / task.num_keys * parts * padded + i % task.num_keys) * width;
        for (int64_t c = 0; c < dim; ++c) {
          T sum = 0;
          for (int64_t part = 0; part < parts; ++part) sum += row[part * padded * width + c];
          to[i * dim + c] = sum;
        }
      }
    });
  };
  add_parts(dk_data, task.width, task.dim, static_cast<T*>(dk.mutable_data_ptr()));
  add_parts(dv_data, task.width_v, task.dim_v, static_cast<T*>(dv.mutable_data_ptr()));
}

std::tuple<Tensor, Tensor> attention_dropout(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& draw, double scale, int64_t threshold) {
  check_problem(q, k, v, draw, threshold);
  Tensor out = empty_on(q, {q.size(0), q.size(1), v.size(2)}, q.scalar_type());
  Tensor lse = empty_on(q, {q.size(0), q.size(1)}, q.scalar_type());
  if (lse.numel() > 0) {
    q.scalar_type() == ScalarType::Double ? run_forward<double>(q, k, v, draw, scale, threshold, out, lse)
                                          : run_forward<float>(q, k, v, draw, scale, threshold, out, lse);
  }
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_dropout_backward(
    const Tensor& dout, const Tensor& delta, const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& draw, double scale, int64_t threshold) {
  check_problem(q, k, v, draw, threshold);
  check_heads("dout", dout, q);
  check_size("dout", dout.size(1), q.size(1));
  check_size("dout", dout.size(2), v.size(2));
  const auto check_rows = [&](const char* name, const Tensor& x) {
    check_tensor(name, x, 2, {q.scalar_type()});
    check_same_device(name, x, q);
    check_size(name, x.size(0), q.size(0));
    check_size(name, x.size(1), q.size(1));
  };
  check_rows("delta", delta);
  check_rows("lse", lse);
  Tensor dq = empty_on(q, {q.size(0), q.size(1), q.size(2)}, q.scalar_type());
  Tensor dk = empty_on(q, {k.size(0), k.size(1), k.size(2)}, q.scalar_type());
  Tensor dv = empty_on(q, {v.size(0), v.size(1), v.size(2)}, q.scalar_type());
  if (q.size(0) > 0) {
    q.scalar_type() == ScalarType::Double
        ? run_backward<double>(dout, delta, lse, q, k, v, draw, scale, threshold, dq, dk, dv)
        : run_backward<float>(dout, delta, lse, q, k, v, draw, scale, threshold, dq, dk, dv);
  }
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cellattn, CPU, m) {
  m.impl("attention_dropout", TORCH_BOX(&attention_dropout));
  m.impl("attention_dropout_backward", TORCH_BOX(&attention_dropout_backward));
}

}  // namespace cellattn
