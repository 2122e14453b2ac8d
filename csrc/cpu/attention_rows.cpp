// Attention on the CPU: checks, and how the work is shared out.

#include "attention_rows.h"

#include <cmath>

#include "attention_parts.h"
#include "isa.h"
#include "room.h"
#include "values.h"

namespace cellattn {
namespace {

constexpr int64_t kMostParts = 16;          // of a head's queries in the backward, each with a dk and a dv of its own
constexpr int64_t kWorthThreads = 1 << 19;  // products of numbers; with fewer, waking threads takes longer than they save

template <class T>
struct AttentionLoops {
  int64_t vector_bytes = 16;
  T (*largest)(const T*, int64_t) = &portable::attention_largest;
  void (*pack)(const AttentionRows<T>&, int64_t) = &portable::attention_pack;
  void (*forward)(const AttentionRows<T>&, int64_t, int64_t, int64_t, T*) = &portable::attention_forward;
  void (*backward)(const AttentionRows<T>&, int64_t, int64_t, int64_t, T*, T*, T*) = &portable::attention_backward;

  AttentionLoops() {
#if defined(__x86_64__)
    if (use_avx512()) {
      vector_bytes = 64;
      largest = &avx512::attention_largest;
      pack = &avx512::attention_pack;
      forward = &avx512::attention_forward;
      backward = &avx512::attention_backward;
    } else if (use_avx2()) {
      vector_bytes = 32;
      largest = &avx2::attention_largest;
      pack = &avx2::attention_pack;
      forward = &avx2::attention_forward;
      backward = &avx2::attention_backward;
    }
#endif
  }
};

// x is [..., n, m], a tensor of heads as q is: of its dtype and leading dimensions.
void check_heads(const char* name, const Tensor& x, const Tensor& q) {
  STD_TORCH_CHECK(q.dim() >= 2, "q: expected at least 2 dimensions, got shape ", shape_of(q));
  check_tensor(name, x, q.dim(), {ScalarType::Double, ScalarType::Float});
  check_same_device(name, x, q);
  STD_TORCH_CHECK(x.scalar_type() == q.scalar_type(), name, ": expected the dtype of q");
  for (int64_t d = 0; d < q.dim() - 2; ++d) check_size(name, x.size(d), q.size(d));
}

// [..., T] beside q [..., T, D].
void check_rows(const char* name, const Tensor& x, const Tensor& q) {
  check_tensor(name, x, q.dim() - 1, {q.scalar_type()});
  check_same_device(name, x, q);
  for (int64_t d = 0; d < q.dim() - 1; ++d) check_size(name, x.size(d), q.size(d));
}

void check_problem(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& key_mask,
    const std::optional<Tensor>& draw, int64_t threshold) {
  check_heads("q", q, q);
  check_heads("k", k, q);
  check_heads("v", v, q);
  const int64_t n = q.dim();
  check_size("k", k.size(n - 1), q.size(n - 1));
  check_size("v", v.size(n - 2), k.size(n - 2));
  STD_TORCH_CHECK(k.size(n - 2) >= 1, "k: expected at least one token");
  STD_TORCH_CHECK(
      q.size(n - 2) <= UINT32_MAX && k.size(n - 2) <= UINT32_MAX, "q: expected at most 4294967295 queries and keys");
  if (key_mask) {
    check_tensor("key_mask", *key_mask, n - 1, {ScalarType::Bool});
    check_same_device("key_mask", *key_mask, q);
    for (int64_t d = 0; d < n - 1; ++d) check_size("key_mask", key_mask->size(d), k.size(d));
  }
  check_draw(draw, threshold, q);
}

template <class T>
AttentionRows<T> problem(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& key_mask,
    const std::optional<Tensor>& draw, double scale, int64_t threshold, const AttentionLoops<T>& loops) {
  AttentionRows<T> task = {};
  const int64_t n = q.dim();
  task.q = data_of<T>(q);
  task.k = data_of<T>(k);
  task.v = data_of<T>(v);
  task.key_mask = data_of<bool>(key_mask);
  task.num_heads = 1;
  for (int64_t d = 0; d < n - 2; ++d) task.num_heads *= q.size(d);
  task.num_queries = q.size(n - 2);
  task.num_keys = k.size(n - 2);
  task.dim = q.size(n - 1);
  task.dim_v = v.size(n - 1);
  const int64_t lanes = loops.vector_bytes / static_cast<int64_t>(sizeof(T)), piece = std::max<int64_t>(lanes, 4);
  task.width = ceil_div(task.dim, lanes) * lanes;
  task.width_v = ceil_div(task.dim_v, lanes) * lanes;
  task.padded_keys = ceil_div(task.num_keys, piece) * piece;
  task.scale = static_cast<T>(scale);
  task.rescale = rescale_of<T>(threshold);
  task.bits = bits_of(draw, threshold);
  return task;
}

// Threads that the work is worth.
template <class T>
int64_t threads_for(const AttentionRows<T>& task) {
  const double work = static_cast<double>(task.num_heads) * task.num_queries * task.num_keys * (task.dim + task.dim_v);
  return work < kWorthThreads ? 1 : static_cast<int64_t>(torch::stable::get_num_threads());
}

template <class T>
void run_forward(AttentionRows<T> task, const AttentionLoops<T>& loops, const Tensor& out, const Tensor& lse) {
  Room<T> k_columns(task.num_heads * task.dim * task.padded_keys), v_rows(task.num_heads * task.padded_keys * task.width_v);
  task.k_columns = k_columns.data();
  task.v_rows = v_rows.data();
  task.out = static_cast<T*>(out.mutable_data_ptr());
  task.lse = static_cast<T*>(lse.mutable_data_ptr());
  const int64_t threads = threads_for(task);
  for_each_of(threads, task.num_heads, [&](int64_t head) { loops.pack(task, head); });
  const int64_t all = task.num_heads * ceil_div(task.num_queries, kMapRows);
  const int64_t rows = kMapRows * std::clamp<int64_t>(all / (4 * threads), 1, 4), blocks = ceil_div(task.num_queries, rows);
  for_each_with_room<T>(threads, task.num_heads * blocks, attention_room(task), [&](int64_t t, T* room) {
    const int64_t begin = t % blocks * rows;
    loops.forward(task, t / blocks, begin, std::min(begin + rows, task.num_queries), room);
  });
}

template <class T>
void run_backward(
    AttentionRows<T> task, const AttentionLoops<T>& loops, const Tensor& dq, const Tensor& dk, const Tensor& dv) {
  const int64_t heads = task.num_heads, padded = task.padded_keys;
  Room<T> k_columns(heads * task.dim * padded), v_columns(heads * task.dim_v * padded), k_rows(heads * padded * task.width);
  task.k_columns = k_columns.data();
  task.v_columns = v_columns.data();
  task.k_rows = k_rows.data();
  task.dq = static_cast<T*>(dq.mutable_data_ptr());
  const int64_t threads = threads_for(task);
  for_each_of(threads, heads, [&](int64_t head) { loops.pack(task, head); });
  // Parts of a head's queries, enough of them for the threads, each of whole blocks.
  const int64_t blocks = ceil_div(task.num_queries, kMapRows);
  const int64_t wanted = threads == 1 ? 1 : ceil_div(2 * threads, heads);  // each has a dk and a dv of its own
  const int64_t parts = std::max<int64_t>(1, std::min({wanted, blocks / 4, kMostParts}));
  const auto backward = [&](int64_t head, int64_t begin, int64_t end, T* dk_part, T* dv_part, T* room) {
    loops.backward(task, head, begin, end, dk_part, dv_part, room);
  };
  backward_by_parts(
      task, threads, heads, parts, [](int64_t head) { return head; }, backward, static_cast<T*>(dk.mutable_data_ptr()),
      static_cast<T*>(dv.mutable_data_ptr()));
}

std::vector<int64_t> sizes_of(const Tensor& x, int64_t leading) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < leading; ++d) sizes.push_back(x.size(d));
  return sizes;
}

Tensor empty_as(const Tensor& x) { return empty_on(x, sizes_of(x, x.dim()), x.scalar_type()); }

// Whether nothing is NaN or infinite, and no score off by more than it may be; `rounding` of that by which it is for each |q| |k|.
template <class T>
bool is_ordinary(const Tensor& q, const Tensor& k, const Tensor& v, double rounding, const AttentionLoops<T>& loops) {
  const auto largest = [&](const Tensor& x) { return static_cast<double>(loops.largest(data_of<T>(x), x.numel())); };
  return rounding * (largest(q) * largest(k)) <= 1 && largest(v) < INFINITY;
}

bool is_ordinary(const Tensor& q, const Tensor& k, const Tensor& v, double rounding) {
  STD_TORCH_CHECK(rounding >= 0, "rounding: expected at least 0, got ", rounding);
  return q.scalar_type() == ScalarType::Double ? is_ordinary(q, k, v, rounding, AttentionLoops<double>())
                                               : is_ordinary(q, k, v, rounding, AttentionLoops<float>());
}

Tensor nothing_like(const Tensor& x) { return empty_on(x, {0}, x.scalar_type()); }

// Tensors of size 0 where values are not ordinary.
std::tuple<Tensor, Tensor> attention_rows(
    const Tensor& q, const Tensor& k, const Tensor& v, std::optional<Tensor> key_mask, std::optional<Tensor> draw, double scale,
    int64_t threshold, double rounding) {
  check_problem(q, k, v, key_mask, draw, threshold);
  if (!is_ordinary(q, k, v, rounding)) return {nothing_like(q), nothing_like(q)};
  std::vector<int64_t> sizes = sizes_of(q, q.dim() - 1);
  Tensor lse = empty_on(q, sizes, q.scalar_type());
  sizes.push_back(v.size(v.dim() - 1));
  Tensor out = empty_on(q, sizes, q.scalar_type());
  const auto run = [&](auto zero) {
    const AttentionLoops<decltype(zero)> loops;
    run_forward(problem(q, k, v, key_mask, draw, scale, threshold, loops), loops, out, lse);
  };
  if (lse.numel() > 0) q.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_rows_backward(
    const Tensor& dout, std::optional<Tensor> dlse, const Tensor& q, const Tensor& k, const Tensor& v,
    std::optional<Tensor> key_mask, const Tensor& out, const Tensor& lse, std::optional<Tensor> draw, double scale,
    int64_t threshold, double rounding) {
  check_problem(q, k, v, key_mask, draw, threshold);
  const int64_t n = q.dim();
  for (const Tensor* x : {&dout, &out}) {
    const char* name = x == &dout ? "dout" : "out";
    check_heads(name, *x, q);
    check_size(name, x->size(n - 2), q.size(n - 2));
    check_size(name, x->size(n - 1), v.size(n - 1));
  }
  check_rows("lse", lse, q);
  if (dlse) check_rows("dlse", *dlse, q);
  if (!is_ordinary(q, k, v, rounding)) return {nothing_like(q), nothing_like(q), nothing_like(q)};
  Tensor dq = empty_as(q), dk = empty_as(k), dv = empty_as(v);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const AttentionLoops<T> loops;
    AttentionRows<T> task = problem(q, k, v, key_mask, draw, scale, threshold, loops);
    task.dout = data_of<T>(dout);
    task.dlse = data_of<T>(dlse);
    task.out = const_cast<T*>(data_of<T>(out));
    task.lse = const_cast<T*>(data_of<T>(lse));
    run_backward(task, loops, dq, dk, dv);
  };
  q.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
  return {dq, dk, dv};
}

// bool []: what `attention_rows` asks of values.
Tensor are_ordinary(const Tensor& q, const Tensor& k, const Tensor& v, double rounding) {
  for (const Tensor* x : {&q, &k, &v}) {
    const char* name = x == &q ? "q" : x == &k ? "k" : "v";
    check_tensor(name, *x, x->dim(), {ScalarType::Double, ScalarType::Float});
    check_same_device(name, *x, q);
    STD_TORCH_CHECK(x->scalar_type() == q.scalar_type(), name, ": expected the dtype of q");
  }
  Tensor result = empty_on(q, {}, ScalarType::Bool);
  *static_cast<bool*>(result.mutable_data_ptr()) = is_ordinary(q, k, v, rounding);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cellattn, CPU, m) {
  m.impl("attention_rows", TORCH_BOX(&attention_rows));
  m.impl("attention_rows_backward", TORCH_BOX(&attention_rows_backward));
  m.impl("is_ordinary", TORCH_BOX(&are_ordinary));
}

}  // namespace cellattn
