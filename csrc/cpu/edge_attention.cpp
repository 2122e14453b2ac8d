// Attention along the edges of graphs on the CPU: checks, and how the work is shared out.

#include "edge_attention.h"

#include <cmath>
#include <map>
#include <optional>

#include "attention_parts.h"
#include "edge_blocks.h"
#include "isa.h"
#include "room.h"
#include "values.h"

namespace cellattn {
namespace {

constexpr int64_t kTokens = 128;  // of a task, which takes the next one when it is free
// From how many genes on, and from which part of all pairs on, blocks of the map with a bit a pair are faster than its entries: by
// processor time on an AMD EPYC with AVX-512, at 2,000 genes and heads of 16, the two cross at a fifth.
constexpr int64_t kFewest = 512, kDense = 5;

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

// Dropout of the map.
struct Dropout {
  const std::optional<Tensor>& draw;
  int64_t threshold;

  DropoutBits bits() const { return bits_of(draw, threshold); }
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

// Whether all numbers are finite; the largest magnitude.
template <class T>
bool finite(const Tensor& x, T* largest) {
  const T* values = static_cast<const T*>(x.const_data_ptr());
  T check = 0, most = 0;
  for (int64_t i = 0; i < x.numel(); ++i) {
    const T magnitude = values[i] < 0 ? -values[i] : values[i];
    check += T{0} * values[i];
    most = magnitude > most ? magnitude : most;
  }
  *largest = most;
  return check == 0;
}

// Heads of one dense relation without weights or a bias, of which the map is made block by block. What is not finite, or is not
// once it is multiplied, would spread in the products of a block, and scores that overflow have no largest: then there are none.
struct DenseHeads {
  std::vector<int64_t> heads, others;  // of all leading dimensions
  std::vector<const uint64_t*> seen;
  std::vector<const uint8_t*> twice;
  std::vector<int64_t> tie;
  std::map<int64_t, std::pair<std::vector<uint64_t>, std::vector<uint8_t>>> masks;  // by relation

  template <class T>
  DenseHeads(
      const Problem& about, const Stack& by_row, bool has_bias, bool self_loops, double scale, const Tensor& q, const Tensor& k,
      const Tensor& v, const Tensor* dout, const Tensor* delta, T) {
    const int64_t n = about.num_nodes, all = about.num_leading * about.num_heads;
    std::vector<int64_t> relation(about.num_heads, -1), last(about.num_heads);
    if (!has_bias && !by_row.log_weight && n >= kFewest && about.dim > 0 && about.dim_v > 0) {
      std::vector<int64_t> count(about.num_heads);
      for (int64_t t = 0; t < about.num_ties; ++t) ++count[about.heads[t]], last[about.heads[t]] = t;
      for (int64_t t = 0; t < about.num_ties; ++t) {
        const int64_t* ptr = longs_of(by_row.ptr) + about.relations[t] * n;
        if (count[about.heads[t]] == 1 && ptr[n] - ptr[0] >= n * n / kDense) relation[about.heads[t]] = about.relations[t];
      }
    }
    if (std::any_of(relation.begin(), relation.end(), [](int64_t r) { return r >= 0; })) {
      T sizes[3] = {}, above = 0, other = 0;
      bool fine = finite(q, &sizes[0]) && finite(k, &sizes[1]) && finite(v, &sizes[2]);
      fine = fine && (!dout || (finite(*dout, &above) && finite(*delta, &other)));
      const double scores = std::abs(scale) * static_cast<double>(sizes[0]) * static_cast<double>(sizes[1]) * about.dim;
      const double slopes = static_cast<double>(above) * static_cast<double>(sizes[2]) * about.dim_v;
      if (!fine || !(scores < 1e30 && slopes < 1e30)) std::fill(relation.begin(), relation.end(), -1);
    }
    seen.resize(all);
    twice.resize(all);
    tie.resize(all);
    for (int64_t l = 0; l < all; ++l) {
      const int64_t r = relation[l % about.num_heads];
      (r >= 0 ? heads : others).push_back(l);
      if (r < 0) continue;
      auto found = masks.find(r);
      if (found == masks.end()) found = masks.emplace(r, mask_of(about, by_row, r, self_loops)).first;
      seen[l] = found->second.first.data();
      twice[l] = found->second.second.data();
      tie[l] = last[l % about.num_heads];
    }
  }

  static std::pair<std::vector<uint64_t>, std::vector<uint8_t>> mask_of(
      const Problem& about, const Stack& by_row, int64_t relation, bool self_loops) {
    const int64_t n = about.num_nodes, prefix = about.num_prefix, words = ceil_div(prefix + n, kMapKeys);
    std::vector<uint64_t> seen(n * words);
    std::vector<uint8_t> twice(n);
    const int64_t* ptr = longs_of(by_row.ptr) + relation * n;
    const int32_t* col = ints_of(by_row.neighbour);
    for_each_block(n, 64, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        uint64_t* row = seen.data() + i * words;
        const auto set = [&](int64_t token) { row[token / 64] |= uint64_t{1} << token % 64; };
        for (int64_t token = 0; token < prefix; ++token) set(token);
        for (int64_t e = ptr[i]; e < ptr[i + 1]; ++e) set(prefix + col[e]);
        const int64_t own = prefix + i;
        twice[i] = self_loops && (row[own / 64] >> own % 64 & 1);
        if (self_loops) set(own);
      }
    });
    return {std::move(seen), std::move(twice)};
  }

  template <class T>
  EdgeBlocks<T> task(
      const Problem& about, const Tensor& q, const Tensor& k, const Tensor& v, bool self_loops, double scale,
      const Dropout& dropout) const {
    EdgeBlocks<T> task = {};
    AttentionRows<T>& rows = task.rows;
    rows.q = static_cast<const T*>(q.const_data_ptr());
    rows.k = static_cast<const T*>(k.const_data_ptr());
    rows.v = static_cast<const T*>(v.const_data_ptr());
    rows.num_heads = about.num_leading * about.num_heads;
    rows.num_queries = about.num_nodes;
    rows.num_keys = about.num_prefix + about.num_nodes;
    rows.dim = about.dim;
    rows.dim_v = about.dim_v;
    rows.scale = static_cast<T>(scale);
    rows.rescale = rescale_of<T>(dropout.threshold);
    rows.bits = dropout.bits();
    task.seen = seen.data();
    task.twice = twice.data();
    task.tie = tie.data();
    task.num_prefix = about.num_prefix;
    task.self_loops = self_loops;
    return task;
  }
};

template <class T>
struct BlockLoops {
  int64_t vector_bytes = 16;
  void (*pack)(const EdgeBlocks<T>&, int64_t) = &portable::blocks_pack;
  void (*forward)(const EdgeBlocks<T>&, int64_t, int64_t, int64_t, T*) = &portable::blocks_forward;
  void (*backward)(const EdgeBlocks<T>&, int64_t, int64_t, int64_t, T*, T*, T*) = &portable::blocks_backward;

  BlockLoops() {
#if defined(__x86_64__)
    if (use_avx512()) {
      vector_bytes = 64;
      pack = &avx512::blocks_pack;
      forward = &avx512::blocks_forward;
      backward = &avx512::blocks_backward;
    } else if (use_avx2()) {
      vector_bytes = 32;
      pack = &avx2::blocks_pack;
      forward = &avx2::blocks_forward;
      backward = &avx2::blocks_backward;
    }
#endif
  }

  void set_widths(AttentionRows<T>& rows) const {
    const int64_t lanes = vector_bytes / static_cast<int64_t>(sizeof(T));
    rows.width = ceil_div(rows.dim, lanes) * lanes;
    rows.width_v = ceil_div(rows.dim_v, lanes) * lanes;
    rows.padded_keys = ceil_div(rows.num_keys, kMapKeys) * kMapKeys;
  }
};

template <class T>
void attend_blocks(EdgeBlocks<T> task, const std::vector<int64_t>& heads) {
  const BlockLoops<T> loops;
  AttentionRows<T>& rows = task.rows;
  loops.set_widths(rows);
  Room<T> k_columns(rows.num_heads * rows.dim * rows.padded_keys), v_rows(rows.num_heads * rows.padded_keys * rows.width_v);
  rows.k_columns = k_columns.data();
  rows.v_rows = v_rows.data();
  const int64_t count = static_cast<int64_t>(heads.size());
  for_each_task(count, [&](int64_t h) { loops.pack(task, heads[h]); });
  const int64_t step = 4 * kMapRows, blocks = ceil_div(rows.num_queries, step);
  for_each_task(count * blocks, [&](int64_t t) {
    Room<T> room(attention_room(rows));
    const int64_t begin = t % blocks * step;
    loops.forward(task, heads[t / blocks], begin, std::min(begin + step, rows.num_queries), room.data());
  });
}

// dk [L, Tk, D], dv [L, Tk, DV] of these heads.
template <class T>
void attend_blocks_backward(EdgeBlocks<T> task, const std::vector<int64_t>& heads, T* dk, T* dv) {
  constexpr int64_t kParts = 8;  // of a head's queries, each with a dk and a dv of its own: as many for any number of threads
  const BlockLoops<T> loops;
  AttentionRows<T>& rows = task.rows;
  loops.set_widths(rows);
  const int64_t all = rows.num_heads, count = static_cast<int64_t>(heads.size()), padded = rows.padded_keys;
  Room<T> k_columns(all * rows.dim * padded), v_columns(all * rows.dim_v * padded), k_rows(all * padded * rows.width);
  rows.k_columns = k_columns.data();
  rows.v_columns = v_columns.data();
  rows.k_rows = k_rows.data();
  for_each_task(count, [&](int64_t h) { loops.pack(task, heads[h]); });
  const int64_t blocks = ceil_div(rows.num_queries, kMapRows), parts = std::min(blocks, kParts);
  const auto backward = [&](int64_t head, int64_t begin, int64_t end, T* dk_part, T* dv_part, T* room) {
    loops.backward(task, head, begin, end, dk_part, dv_part, room);
  };
  backward_by_parts(
      rows, torch::stable::get_num_threads(), count, parts, [&](int64_t h) { return heads[h]; }, backward, dk, dv);
}

// Of a head by its number, but its features.
template <class T>
EdgeHead<T> head_of(
    const Problem& about, const Stack& by_row, const std::vector<std::vector<EdgeTie>>& ties,
    const std::optional<Tensor>& bias, bool self_loops, double scale, const Dropout& dropout, int64_t width, int64_t width_v,
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
    const Problem& about, const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& bias,
    const Stack& by_row, bool self_loops, double scale, const Dropout& dropout, const Tensor& out, const Tensor& lse) {
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
    const Problem& about, const Tensor& dout, const Tensor& delta, const Tensor& lse, const Tensor& q, const Tensor& k,
    const Tensor& v, const std::optional<Tensor>& bias, const Stack& by_row, const Stack& by_column, bool self_loops,
    double scale, const Dropout& dropout, const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& dbias) {
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
  const Stack by_row{rowptr, col, log_weight};
  const Problem about(q, k, v, bias, by_row, std::move(relations), std::move(heads), num_prefix);
  check_draw(draw, threshold, q);
  const Dropout dropout{draw, threshold};
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
  const Stack by_row{rowptr, col, log_weight}, by_column{colptr, row, log_weight_by_column};
  const Problem about(q, k, v, bias, by_row, std::move(relations), std::move(heads), num_prefix);
  check_draw(draw, threshold, q);
  const Dropout dropout{draw, threshold};
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
