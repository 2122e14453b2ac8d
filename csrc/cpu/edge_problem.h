// Attention along the edges of graphs on the CPU: its arguments, checked.

#pragma once

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "attention_parts.h"
#include "edge_attention.h"
#include "values.h"

namespace cellattn {

// A graph by rows or by columns.
struct EdgeStack {
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
struct EdgeDropout {
  const std::optional<Tensor>& draw;
  int64_t threshold;

  DropoutBits bits() const { return bits_of(draw, threshold); }
};

struct EdgeProblem {
  int64_t num_leading, num_heads, num_nodes, num_prefix, dim, dim_v, num_ties;
  ScalarType dtype;
  std::vector<int64_t> relations, heads;

  EdgeProblem(
      const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& bias, const EdgeStack& by_row,
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
  std::vector<std::vector<EdgeTie>> ties_of(const EdgeStack& stack) const {
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

}  // namespace cellattn
