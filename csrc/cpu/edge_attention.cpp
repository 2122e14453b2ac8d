// Attention along the edges of graphs on the CPU: checks, and how the work is shared out.

#include "edge_attention.h"

#include "isa.h"
#include "room.h"
#include "values.h"

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

// A graph by rows or by columns.
struct Stack {
  const Tensor &ptr, &neighbour;
  const std::optional<Tensor>& log_weight;

  void check(int64_t num_nodes, ScalarType dtype, const Tensor& q) const {
    check_stack(ptr, neighbour, num_nodes);
    check_stack_values(ptr, neighbour, num_nodes);
    check_same_device("rowptr", ptr, q);
    if (log_weight) {
      check_tensor("log_weight", *log_weight, 1, {dtype});
      check_same_device("log_weight", *log_weight, q);
      check_size("log_weight", log_weight->numel(), neighbour.numel());
    }
  }
};

struct Problem {
  int64_t num_leading, num_heads, num_nodes, num_prefix, dim, dim_v, num_ties;
  ScalarType dtype;
  std::vector<int64_t> relations, heads;

  Problem(
      const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& bias, const Stack& by_row,
      std::vector<int64_t> relations_, std::vector<int64_t> heads_, int64_t num_prefix_)
      : num_prefix(num_prefix_), relations(std::move(relations_)), heads(std::move(heads_)) {
    dtype = q.scalar_type();
    const char* names[3] = {"q", "k", "v"};
    const Tensor* tensors[3] = {&q, &k, &v};
    for (int i = 0; i < 3; ++i) {
      check_tensor(names[i], *tensors[i], 4, {ScalarType::Double, ScalarType::Float});
      check_same_device(names[i], *tensors[i], q);
      STD_TORCH_CHECK(tensors[i]->scalar_type() == dtype, names[i], ": expected the dtype of q");
      for (int dim = 0; dim < 2; ++dim) check_size(names[i], tensors[i]->size(dim), q.size(dim));
    }
    num_leading = q.size(0);
    num_heads = q.size(1);
    num_nodes = q.size(2);
    dim = q.size(3);
    dim_v = v.size(3);
    num_ties = static_cast<int64_t>(heads.size());
    STD_TORCH_CHECK(
        num_prefix >= 0 && num_prefix <= INT32_MAX - num_nodes, "num_prefix: expected at least 0, got ", num_prefix);
    check_size("k", k.size(2), num_prefix + num_nodes);
    check_size("k", k.size(3), dim);
    check_size("v", v.size(2), num_prefix + num_nodes);
    by_row.check(num_nodes, dtype, q);
    const int64_t num_relations = (by_row.ptr.numel() - 1) / num_nodes;
    check_size("relations", static_cast<int64_t>(relations.size()), num_ties);
    for (int64_t t = 0; t < num_ties; ++t) {
      STD_TORCH_CHECK(
          relations[t] >= 0 && relations[t] < num_relations, "relations: expected numbers in [0, ", num_relations, "), got ",
          relations[t]);
      STD_TORCH_CHECK(
          heads[t] >= 0 && heads[t] < num_heads, "heads: expected numbers in [0, ", num_heads, "), got ", heads[t]);
    }
    if (bias) {
      check_tensor("edge_bias", *bias, 1, {dtype});
      check_same_device("edge_bias", *bias, q);
      check_size("edge_bias", bias->numel(), num_ties);
    }
  }

  // The ties of each head.
  std::vector<std::vector<EdgeTie>> ties_of(const Stack& stack) const {
    std::vector<std::vector<EdgeTie>> ties(num_heads);
    for (int64_t t = 0; t < num_ties; ++t) ties[heads[t]].push_back({longs_of(stack.ptr) + relations[t] * num_nodes, t});
    return ties;
  }

  // The most entries of a row, and a vector of 64 bytes more.
  int64_t longest(const std::vector<std::vector<EdgeTie>>& ties) const {
    int64_t most = 0;
    for (const auto& mine : ties) {
      for (int64_t i = 0; i < num_nodes; ++i) {
        int64_t n = 0;
        for (const EdgeTie& tie : mine) n += tie.ptr[i + 1] - tie.ptr[i];
        most = std::max(most, n);
      }
    }
    STD_TORCH_CHECK(most <= INT32_MAX, "graph: a row has more than 2147483647 entries");
    return std::max(most + num_prefix + 1, num_nodes) + 16;
  }
};

// Rows of `dim` numbers as rows of whole vectors, zeros behind them.
template <class T>
class Padded {
 public:
  Padded(const Tensor& x, int64_t dim, int64_t width) : room_(x.size(0) * x.size(1) * x.size(2) * width) {
    if (dim == 0) return;
    const T* from = static_cast<const T*>(x.const_data_ptr());
    T* to = room_.data();
    for_each_block(x.numel() / dim, 4096, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) std::copy(from + i * dim, from + (i + 1) * dim, to + i * width);
    });
  }
  Padded(int64_t rows, int64_t width) : room_(rows * width) {}

  T* data() { return room_.data(); }

  void copy_to(const Tensor& x, int64_t dim, int64_t width) {
    if (dim == 0) return;
    T* to = static_cast<T*>(x.mutable_data_ptr());
    const T* from = room_.data();
    for_each_block(x.numel() / dim, 4096, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) std::copy(from + i * width, from + i * width + dim, to + i * dim);
    });
  }

 private:
  Room<T> room_;
};

template <class T>
const T* data_of(const std::optional<Tensor>& x) {
  return x ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

// pass(head, begin, end, room) over tokens [0, num_tokens) of every head.
template <class T>
void for_each_tokens(
    std::vector<EdgeHead<T>>& tasks, int64_t num_tokens, int64_t longest, typename EdgeLoops<T>::Pass pass) {
  const int64_t blocks = ceil_div(num_tokens, kTokens);
  for_each_task(static_cast<int64_t>(tasks.size()) * blocks, [&](int64_t t) {
    std::vector<int32_t> index(longest);
    Room<T> score(longest), slope(longest);
    const int64_t begin = t % blocks * kTokens;
    pass(tasks[t / blocks], begin, std::min(begin + kTokens, num_tokens), {index.data(), score.data(), slope.data()});
  });
}

template <class T>
std::vector<EdgeHead<T>> heads_of(
    const Problem& about, const Stack& by_row, const std::vector<std::vector<EdgeTie>>& ties,
    const std::optional<Tensor>& bias, bool self_loops, double scale, int64_t width, int64_t width_v, const T* q, const T* k,
    const T* v) {
  std::vector<EdgeHead<T>> tasks;
  const int64_t n = about.num_nodes, tokens = about.num_prefix + n;
  for (int64_t l = 0; l < about.num_leading * about.num_heads; ++l) {
    EdgeHead<T> head = {};
    const auto& mine = ties[l % about.num_heads];
    head.q = q + l * n * width;
    head.k = k + l * tokens * width;
    head.v = v + l * tokens * width_v;
    head.by_row = mine.data();
    head.num_ties = static_cast<int64_t>(mine.size());
    head.num_nodes = n;
    head.num_prefix = about.num_prefix;
    head.width = width;
    head.width_v = width_v;
    head.col = ints_of(by_row.neighbour);
    head.log_weight = data_of<T>(by_row.log_weight);
    head.bias = data_of<T>(bias);
    head.self_loops = self_loops;
    head.scale = static_cast<T>(scale);
    tasks.push_back(head);
  }
  return tasks;
}

template <class T>
int64_t width_of(int64_t dim, const EdgeLoops<T>& loops) {
  const int64_t lanes = loops.vector_bytes / static_cast<int64_t>(sizeof(T));
  return std::max<int64_t>(1, ceil_div(dim, lanes)) * lanes;
}

template <class T>
void run_forward(
    const Problem& about, const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& bias,
    const Stack& by_row, bool self_loops, double scale, const Tensor& out, const Tensor& lse) {
  const EdgeLoops<T> loops;
  const int64_t width = width_of(about.dim, loops), width_v = width_of(about.dim_v, loops), n = about.num_nodes;
  Padded<T> queries(q, about.dim, width), keys(k, about.dim, width), values(v, about.dim_v, width_v);
  Padded<T> result(about.num_leading * about.num_heads * n, width_v);
  const auto ties = about.ties_of(by_row);
  auto tasks = heads_of<T>(
      about, by_row, ties, bias, self_loops, scale, width, width_v, queries.data(), keys.data(), values.data());
  for (size_t l = 0; l < tasks.size(); ++l) {
    tasks[l].out = result.data() + l * n * width_v;
    tasks[l].lse = static_cast<T*>(lse.mutable_data_ptr()) + l * n;
  }
  for_each_tokens(tasks, n, about.longest(ties), loops.forward);
  result.copy_to(out, about.dim_v, width_v);
}

template <class T>
void run_backward(
    const Problem& about, const Tensor& dout, const Tensor& delta, const Tensor& lse, const Tensor& q, const Tensor& k,
    const Tensor& v, const std::optional<Tensor>& bias, const Stack& by_row, const Stack& by_column, bool self_loops,
    double scale, const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& dbias) {
  const EdgeLoops<T> loops;
  const int64_t width = width_of(about.dim, loops), width_v = width_of(about.dim_v, loops), n = about.num_nodes;
  const int64_t tokens = about.num_prefix + n, num_heads = about.num_leading * about.num_heads;
  Padded<T> queries(q, about.dim, width), keys(k, about.dim, width), values(v, about.dim_v, width_v);
  Padded<T> above(dout, about.dim_v, width_v);
  Padded<T> queries_grad(num_heads * n, width), keys_grad(num_heads * tokens, width), values_grad(num_heads * tokens, width_v);
  const auto ties = about.ties_of(by_row), ties_by_column = about.ties_of(by_column);
  auto tasks = heads_of<T>(
      about, by_row, ties, bias, self_loops, scale, width, width_v, queries.data(), keys.data(), values.data());
  for (size_t l = 0; l < tasks.size(); ++l) {
    EdgeHead<T>& head = tasks[l];
    head.by_column = ties_by_column[l % about.num_heads].data();
    head.row = ints_of(by_column.neighbour);
    head.log_weight_by_column = data_of<T>(by_column.log_weight);
    head.lse = const_cast<T*>(static_cast<const T*>(lse.const_data_ptr())) + l * n;
    head.delta = static_cast<const T*>(delta.const_data_ptr()) + l * n;
    head.dout = above.data() + l * n * width_v;
    head.dq = queries_grad.data() + l * n * width;
    head.dk = keys_grad.data() + l * tokens * width;
    head.dv = values_grad.data() + l * tokens * width_v;
    head.dbias_stride = about.num_ties;
    head.dbias = bias ? static_cast<T*>(dbias.mutable_data_ptr()) + l / about.num_heads * n * about.num_ties : nullptr;
  }
  for_each_tokens(tasks, n, about.longest(ties), loops.rows);
  for_each_tokens(tasks, tokens, about.longest(ties_by_column), loops.columns);
  queries_grad.copy_to(dq, about.dim, width);
  keys_grad.copy_to(dk, about.dim, width);
  values_grad.copy_to(dv, about.dim_v, width_v);
}

std::tuple<Tensor, Tensor> edge_rows(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& bias, const Tensor& rowptr,
    const Tensor& col, const std::optional<Tensor>& log_weight, std::vector<int64_t> relations, std::vector<int64_t> heads,
    int64_t num_prefix, bool self_loops, double scale) {
  const Stack by_row{rowptr, col, log_weight};
  const Problem about(q, k, v, bias, by_row, std::move(relations), std::move(heads), num_prefix);
  Tensor out = empty_on(q, {about.num_leading, about.num_heads, about.num_nodes, about.dim_v}, about.dtype);
  Tensor lse = empty_on(q, {about.num_leading, about.num_heads, about.num_nodes}, about.dtype);
  if (lse.numel() > 0) {
    about.dtype == ScalarType::Double ? run_forward<double>(about, q, k, v, bias, by_row, self_loops, scale, out, lse)
                                      : run_forward<float>(about, q, k, v, bias, by_row, self_loops, scale, out, lse);
  }
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> edge_rows_backward(
    const Tensor& dout, const Tensor& delta, const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
    const std::optional<Tensor>& bias, const Tensor& rowptr, const Tensor& col, const std::optional<Tensor>& log_weight,
    const Tensor& colptr, const Tensor& row, const std::optional<Tensor>& log_weight_by_column, std::vector<int64_t> relations,
    std::vector<int64_t> heads, int64_t num_prefix, bool self_loops, double scale) {
  const Stack by_row{rowptr, col, log_weight}, by_column{colptr, row, log_weight_by_column};
  const Problem about(q, k, v, bias, by_row, std::move(relations), std::move(heads), num_prefix);
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
    run(about, dout, delta, lse, q, k, v, bias, by_row, by_column, self_loops, scale, dq, dk, dv, dbias);
  }
  return {dq, dk, dv, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cellattn, CPU, m) {
  m.impl("edge_rows", TORCH_BOX(&edge_rows));
  m.impl("edge_rows_backward", TORCH_BOX(&edge_rows_backward));
}

}  // namespace cellattn
