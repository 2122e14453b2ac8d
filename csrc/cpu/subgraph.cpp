// The rows of a stack of CSR matrices that chosen genes keep, with the columns that are chosen too.

#include "values.h"

namespace cellattn {
namespace {

// (rowptr [K * M + 1], col int32 [E'], edge int64 [E']): nodes[m] becomes m, and entry p was entry edge[p]; all of size 0 where the
// nodes are not distinct genes. Who gets that looks for what is wrong.
std::tuple<Tensor, Tensor, Tensor> subgraph_rows(
    const Tensor& rowptr, const Tensor& col, const Tensor& nodes, int64_t num_nodes) {
  const int64_t num_relations = check_stack(rowptr, col, num_nodes);
  check_rises("rowptr", longs_of(rowptr), rowptr.numel(), col.numel());
  check_tensor("nodes", nodes, 1, {ScalarType::Long});
  check_same_device("nodes", nodes, rowptr);
  const int64_t *old = longs_of(rowptr), *node = longs_of(nodes), m = nodes.numel();
  const int32_t* neighbour = ints_of(col);

  std::vector<int32_t> label(num_nodes, -1);
  bool distinct = true, ascending = true;
  for (int64_t i = 0; i < m && distinct; ++i) {
    distinct = node[i] >= 0 && node[i] < num_nodes && label[node[i]] < 0;
    ascending &= i == 0 || node[i] > node[i - 1];
    if (distinct) label[node[i]] = static_cast<int32_t>(i);
  }
  if (!distinct) {
    return {empty_on(nodes, {0}, ScalarType::Long), empty_on(nodes, {0}, ScalarType::Int), empty_on(nodes, {0}, ScalarType::Long)};
  }

  Tensor ptr = empty_on(nodes, {num_relations * m + 1}, ScalarType::Long);
  int64_t* first = static_cast<int64_t*>(ptr.mutable_data_ptr());
  first[0] = 0;
  bool outside = false;  // of the edges of chosen rows, which alone are read
  for (int64_t r = 0; r < num_relations; ++r) {
    for (int64_t i = 0; i < m; ++i, ++first) {
      const int64_t row = r * num_nodes + node[i];
      first[1] = first[0];
      for (int64_t e = old[row]; e < old[row + 1]; ++e) {
        const bool is_gene = neighbour[e] >= 0 && neighbour[e] < num_nodes;
        outside |= !is_gene;
        first[1] += is_gene && label[neighbour[e]] >= 0;
      }
    }
  }
  STD_TORCH_CHECK(!outside, "col: expected genes in [0, ", num_nodes, ")");
  Tensor columns = empty_on(nodes, {*first}, ScalarType::Int), edges = empty_on(nodes, {*first}, ScalarType::Long);
  int32_t* to = static_cast<int32_t*>(columns.mutable_data_ptr());
  int64_t* edge = static_cast<int64_t*>(edges.mutable_data_ptr());
  std::vector<std::pair<int32_t, int64_t>> entries;  // of a row whose columns change their order
  for (int64_t r = 0; r < num_relations; ++r) {
    for (int64_t i = 0; i < m; ++i) {
      const int64_t row = r * num_nodes + node[i];
      entries.clear();
      for (int64_t e = old[row]; e < old[row + 1]; ++e) {
        if (label[neighbour[e]] >= 0) entries.emplace_back(label[neighbour[e]], e);
      }
      if (!ascending) std::sort(entries.begin(), entries.end());
      for (const auto& [column, e] : entries) {
        *to++ = column;
        *edge++ = e;
      }
    }
  }
  return {ptr, columns, edges};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cellattn, CPU, m) { m.impl("subgraph_rows", TORCH_BOX(&subgraph_rows)); }

}  // namespace cellattn
