// Attention along the edges of graphs on the CPU: checks, and how the work is shared out.

#include "edge_attention.h"

#include <optional>

#include "edge_dense.h"
#include "edge_problem.h"
#include "isa.h"
#include "room.h"

namespace cellattn {
namespace {

constexpr int64_t kTokens = 128;  // of a task, which takes the next one when it is free
template <class T>
struct EdgeLoops {
  using Pass = void (*)(const EdgeHead<T>&, int64_t, int64_t, const EdgeRoom<T>&);
  int64_t vector_bytes = 16;
  Pass forward = &portable::edge_forward, rows = &portable::edge_backward_rows, columns = &portable::edge_backward_columns;

  EdgeLoops() {
#if defined(__x86_64__)
    if (use_avx512()) {
      vector_bytes = 64;
      forward = &avx512::edge_forward;
      rows = &avx512::edge_backward_rows;
      columns = &avx512::edge_backward_columns;
    } else if (use_avx2()) {
      vector_bytes = 32;
      forward = &avx2::edge_forward;
      rows = &avx2::edge_backward_rows;
      columns = &avx2::edge_backward_columns;
    }
#endif
  }
};

// Rows [rows, dim] of every head as rows of whole vectors: where they stand, or, of some heads at a time, with zeros behind them.
template <class T>
class HeadRows {
 public:
  HeadRows(const Tensor& x, int64_t width, int64_t vector_bytes)
      : data_(static_cast<const T*>(x.const_data_ptr())),
        rows_(x.size(2)),
        dim_(x.size(3)),
        width_(width),
        copied_(dim_ != width || reinterpret_cast<uintptr_t>(data_) % vector_bytes != 0) {}

  bool copied() const { return copied_; }
  // Of the head of this number, which is at place `at` among those that were made room for.
  T* head(int64_t at, int64_t number) { return copied_ ? room_->data() + at * rows_ * width_ : own(number); }

  void make_room(int64_t heads) {
    if (copied_) room_.emplace(heads * rows_ * width_);
  }
  void take(const int64_t* heads, int64_t count) {
    if (copied_) copy(heads, count, [&](const T* own, T* padded) { std::copy(own, own + dim_, padded); });
  }
  void give(const int64_t* heads, int64_t count) {
    if (copied_) copy(heads, count, [&](T* own, const T* padded) { std::copy(padded, padded + dim_, own); });
  }

 private:
  T* own(int64_t number) const { return const_cast<T*>(data_) + number * rows_ * dim_; }

  template <class F>
  void copy(const int64_t* heads, int64_t count, const F& f) {
    T* room = room_->data();
    for_each_block(count * rows_, 4096, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) f(own(heads[i / rows_]) + i % rows_ * dim_, room + i * width_);
    });
  }

  const T* data_;
  int64_t rows_, dim_, width_;
  bool copied_;
  std::optional<Room<T>> room_;
};

// run(heads, count) of some heads after others, with their rows: of all at once where nothing is copied, else of as many as keep
// the threads busy. A head's numbers depend on no other.
template <class T, class Run>
void for_some_heads(
    const std::vector<int64_t>& heads, int64_t num_tokens, const std::vector<HeadRows<T>*>& inputs,
    const std::vector<HeadRows<T>*>& outputs, const Run& run) {
  const auto copied = [](const HeadRows<T>* rows) { return rows->copied(); };
  const bool any = std::any_of(inputs.begin(), inputs.end(), copied) || std::any_of(outputs.begin(), outputs.end(), copied);
  const int64_t all = static_cast<int64_t>(heads.size());
  const int64_t busy = ceil_div(8 * static_cast<int64_t>(torch::stable::get_num_threads()), ceil_div(num_tokens, kTokens));
  const int64_t step = any ? std::min(all, busy) : all;
  for (HeadRows<T>* rows : inputs) rows->make_room(step);
  for (HeadRows<T>* rows : outputs) rows->make_room(step);
  for (int64_t begin = 0; begin < all; begin += step) {
    const int64_t* some = heads.data() + begin;
    const int64_t count = std::min(step, all - begin);
    for (HeadRows<T>* rows : inputs) rows->take(some, count);
    run(some, count);
    for (HeadRows<T>* rows : outputs) rows->give(some, count);
  }
}

// pass(head, begin, end, room) over tokens [0, num_tokens) of every head.
template <class T>
void for_each_tokens(
    std::vector<EdgeHead<T>>& tasks, int64_t num_tokens, int64_t longest, typename EdgeLoops<T>::Pass pass) {
  const int64_t blocks = ceil_div(num_tokens, kTokens);
  for_each_task(static_cast<int64_t>(tasks.size()) * blocks, [&](int64_t t) {
    std::vector<int32_t> index(longest);
    Room<T> score(longest), slope(longest), keep(tasks[t / blocks].bits.threshold ? longest : 0);
    const int64_t begin = t % blocks * kTokens;
    pass(tasks[t / blocks], begin, std::min(begin + kTokens, num_tokens), {index.data(), score.data(), slope.data(), keep.data()});
  });
}

// Of a head by its number, but its features.
template <class T>
EdgeHead<T> head_of(
    const EdgeProblem& about, const EdgeStack& by_row, const std::vector<std::vector<EdgeTie>>& ties,
    const std::optional<Tensor>& bias, bool self_loops, double scale, const EdgeDropout& dropout, int64_t width, int64_t width_v,
    int64_t number) {
  EdgeHead<T> head = {};
  const auto& mine = ties[number % about.num_heads];
  head.by_row = mine.data();
  head.num_ties = static_cast<int64_t>(mine.size());
  head.num_nodes = about.num_nodes;
  head.num_prefix = about.num_prefix;
  head.width = width;
  head.width_v = width_v;
  head.col = ints_of(by_row.neighbour);
  head.log_weight = data_of<T>(by_row.log_weight);
  head.bias = data_of<T>(bias);
  head.self_loops = self_loops;
  head.scale = static_cast<T>(scale);
  head.rescale = rescale_of<T>(dropout.threshold);
  head.bits = dropout.bits();
  head.number = number;
  return head;
}

template <class T>
int64_t width_of(int64_t dim, const EdgeLoops<T>& loops) {
  const int64_t lanes = loops.vector_bytes / static_cast<int64_t>(sizeof(T));
  return std::max<int64_t>(1, ceil_div(dim, lanes)) * lanes;
}

template <class T>
void run_forward(
    const EdgeProblem& about, const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& bias,
    const EdgeStack& by_row, bool self_loops, double scale, const EdgeDropout& dropout, const Tensor& out, const Tensor& lse) {
  const DenseHeads dense(about, by_row, bias.has_value(), self_loops, scale, q, k, v, nullptr, nullptr, T{});
  if (!dense.heads.empty()) {
    EdgeBlocks<T> task = dense.task<T>(about, q, k, v, self_loops, scale, dropout);
    task.rows.out = static_cast<T*>(out.mutable_data_ptr());
    task.rows.lse = static_cast<T*>(lse.mutable_data_ptr());
    attend_blocks(task, dense.heads);
  }
  if (dense.others.empty()) return;
  const EdgeLoops<T> loops;
  const int64_t width = width_of(about.dim, loops), width_v = width_of(about.dim_v, loops), n = about.num_nodes;
  const int64_t bytes = loops.vector_bytes;
  HeadRows<T> queries(q, width, bytes), keys(k, width, bytes), values(v, width_v, bytes), result(out, width_v, bytes);
  const auto ties = about.ties_of(by_row);
  const int64_t longest = about.longest(ties);
  for_some_heads<T>(dense.others, n, {&queries, &keys, &values}, {&result}, [&](const int64_t* heads, int64_t count) {
    std::vector<EdgeHead<T>> tasks;
    for (int64_t at = 0; at < count; ++at) {
      const int64_t l = heads[at];
      EdgeHead<T> head = head_of<T>(about, by_row, ties, bias, self_loops, scale, dropout, width, width_v, l);
      head.q = queries.head(at, l);
      head.k = keys.head(at, l);
      head.v = values.head(at, l);
      head.out = result.head(at, l);
      head.lse = static_cast<T*>(lse.mutable_data_ptr()) + l * n;
      tasks.push_back(head);
    }
    for_each_tokens(tasks, n, longest, loops.forward);
  });
}

template <class T>
void run_backward(
    const EdgeProblem& about, const Tensor& dout, const Tensor& delta, const Tensor& lse, const Tensor& q, const Tensor& k,
    const Tensor& v, const std::optional<Tensor>& bias, const EdgeStack& by_row, const EdgeStack& by_column, bool self_loops,
    double scale, const EdgeDropout& dropout, const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& dbias) {
  const DenseHeads dense(about, by_row, bias.has_value(), self_loops, scale, q, k, v, &dout, &delta, T{});
  if (!dense.heads.empty()) {
    EdgeBlocks<T> task = dense.task<T>(about, q, k, v, self_loops, scale, dropout);
    task.rows.dout = static_cast<const T*>(dout.const_data_ptr());
    task.delta = static_cast<const T*>(delta.const_data_ptr());
    task.rows.lse = const_cast<T*>(static_cast<const T*>(lse.const_data_ptr()));
    task.rows.dq = static_cast<T*>(dq.mutable_data_ptr());
    attend_blocks_backward(
        task, dense.heads, static_cast<T*>(dk.mutable_data_ptr()), static_cast<T*>(dv.mutable_data_ptr()));
  }
  if (dense.others.empty()) return;
  const EdgeLoops<T> loops;
  const int64_t width = width_of(about.dim, loops), width_v = width_of(about.dim_v, loops), n = about.num_nodes;
  const int64_t tokens = about.num_prefix + n, bytes = loops.vector_bytes;
  HeadRows<T> queries(q, width, bytes), keys(k, width, bytes), values(v, width_v, bytes), above(dout, width_v, bytes);
  HeadRows<T> queries_grad(dq, width, bytes), keys_grad(dk, width, bytes), values_grad(dv, width_v, bytes);
  const auto ties = about.ties_of(by_row), ties_by_column = about.ties_of(by_column);
  const int64_t longest_row = about.longest(ties), longest_column = about.longest(ties_by_column);
  const auto run = [&](const int64_t* heads, int64_t count) {
    std::vector<EdgeHead<T>> tasks;
    for (int64_t at = 0; at < count; ++at) {
      const int64_t l = heads[at];
      EdgeHead<T> head = head_of<T>(about, by_row, ties, bias, self_loops, scale, dropout, width, width_v, l);
      head.by_column = ties_by_column[l % about.num_heads].data();
      head.row = ints_of(by_column.neighbour);
      head.log_weight_by_column = data_of<T>(by_column.log_weight);
      head.lse = const_cast<T*>(static_cast<const T*>(lse.const_data_ptr())) + l * n;
      head.delta = static_cast<const T*>(delta.const_data_ptr()) + l * n;
      head.q = queries.head(at, l);
      head.k = keys.head(at, l);
      head.v = values.head(at, l);
      head.dout = above.head(at, l);
      head.dq = queries_grad.head(at, l);
      head.dk = keys_grad.head(at, l);
      head.dv = values_grad.head(at, l);
      head.dbias_stride = about.num_ties;
      head.dbias = bias ? static_cast<T*>(dbias.mutable_data_ptr()) + l / about.num_heads * n * about.num_ties : nullptr;
      tasks.push_back(head);
    }
    for_each_tokens(tasks, n, longest_row, loops.rows);
    for_each_tokens(tasks, tokens, longest_column, loops.columns);
  };
  for_some_heads<T>(
      dense.others, n, {&queries, &keys, &values, &above}, {&queries_grad, &keys_grad, &values_grad}, run);
}

std::tuple<Tensor, Tensor> edge_rows(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& bias, const Tensor& rowptr,
    const Tensor& col, const std::optional<Tensor>& log_weight, std::vector<int64_t> relations, std::vector<int64_t> heads,
    int64_t num_prefix, bool self_loops, double scale, std::optional<Tensor> draw, int64_t threshold) {
  const EdgeStack by_row{rowptr, col, log_weight};
  const EdgeProblem about(q, k, v, bias, by_row, std::move(relations), std::move(heads), num_prefix);
  check_draw(draw, threshold, q);
  const EdgeDropout dropout{draw, threshold};
  Tensor out = empty_on(q, {about.num_leading, about.num_heads, about.num_nodes, about.dim_v}, about.dtype);
  Tensor lse = empty_on(q, {about.num_leading, about.num_heads, about.num_nodes}, about.dtype);
  if (lse.numel() > 0) {
    const auto run = about.dtype == ScalarType::Double ? &run_forward<double> : &run_forward<float>;
    run(about, q, k, v, bias, by_row, self_loops, scale, dropout, out, lse);
  }
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> edge_rows_backward(
    const Tensor& dout, const Tensor& delta, const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
    const std::optional<Tensor>& bias, const Tensor& rowptr, const Tensor& col, const std::optional<Tensor>& log_weight,
    const Tensor& colptr, const Tensor& row, const std::optional<Tensor>& log_weight_by_column, std::vector<int64_t> relations,
    std::vector<int64_t> heads, int64_t num_prefix, bool self_loops, double scale, std::optional<Tensor> draw, int64_t threshold) {
  const EdgeStack by_row{rowptr, col, log_weight}, by_column{colptr, row, log_weight_by_column};
  const EdgeProblem about(q, k, v, bias, by_row, std::move(relations), std::move(heads), num_prefix);
  check_draw(draw, threshold, q);
  const EdgeDropout dropout{draw, threshold};
  by_column.check(about.num_nodes, about.dtype, q);
  check_size("colptr", colptr.numel(), rowptr.numel());
  STD_TORCH_CHECK(
      log_weight.has_value() == log_weight_by_column.has_value(), "log_weight_by_column: expected beside log_weight alone");
  check_tensor("dout", dout, 4, {about.dtype});
  check_same_device("dout", dout, q);
  const int64_t sizes[4] = {about.num_leading, about.num_heads, about.num_nodes, about.dim_v};
  for (int dim = 0; dim < 4; ++dim) check_size("dout", dout.size(dim), sizes[dim]);
  const Tensor* rows[2] = {&delta, &lse};
  for (const Tensor* x : rows) {
    const char* name = x == &delta ? "delta" : "lse";
    check_tensor(name, *x, 3, {about.dtype});
    check_same_device(name, *x, q);
    for (int dim = 0; dim < 3; ++dim) check_size(name, x->size(dim), sizes[dim]);
  }
  Tensor dq = empty_on(q, {q.size(0), q.size(1), q.size(2), q.size(3)}, about.dtype);
  Tensor dk = empty_on(q, {k.size(0), k.size(1), k.size(2), k.size(3)}, about.dtype);
  Tensor dv = empty_on(q, {v.size(0), v.size(1), v.size(2), v.size(3)}, about.dtype);
  Tensor dbias = empty_on(q, {about.num_leading, about.num_nodes, bias ? about.num_ties : 0}, about.dtype);
  if (lse.numel() > 0) {
    const auto run = about.dtype == ScalarType::Double ? &run_backward<double> : &run_backward<float>;
    run(about, dout, delta, lse, q, k, v, bias, by_row, by_column, self_loops, scale, dropout, dq, dk, dv, dbias);
  }
  return {dq, dk, dv, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cellattn, CPU, m) {
  m.impl("edge_rows", TORCH_BOX(&edge_rows));
  m.impl("edge_rows_backward", TORCH_BOX(&edge_rows_backward));
}

}  // namespace cellattn
