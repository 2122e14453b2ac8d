// The schemas of the extension's operators. Each backend registers its own implementations; fakes and autograd are Python's.

#include <Python.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(cellattn, m) {
  m.def("are_sets(Tensor index, Tensor ptr, int size, bool ascending, bool distinct) -> Tensor");
  m.def("set_words(Tensor seeds, Tensor ptr, SymInt num_nodes, bool complement) -> Tensor");
  m.def(
      "khop_words(Tensor rowptr, Tensor col, Tensor colptr, Tensor row, Tensor seeds, Tensor ptr, SymInt num_nodes, "
      "SymInt num_hops, bool mixed, bool incoming, bool outgoing) -> Tensor");
  m.def("subgraph_rows(Tensor rowptr, Tensor col, Tensor nodes, SymInt num_nodes) -> (Tensor, Tensor, Tensor)");
  m.def("unpack_words(Tensor words, SymInt num_sets) -> Tensor");
  m.def("pack_words(Tensor keep) -> Tensor");
  m.def("bit_spmm(Tensor words, Tensor? rows, Tensor x) -> Tensor");
  m.def("edge_words(Tensor rowptr, Tensor col, Tensor words) -> Tensor");
  m.def("induced_sizes(Tensor rowptr, Tensor col, Tensor words, SymInt num_sets) -> (Tensor, Tensor, Tensor)");
  m.def(
      "induced_write(Tensor rowptr, Tensor col, Tensor words, Tensor seed_words, Tensor node_ptr, Tensor edge_ptr, "
      "Tensor offsets, Tensor(a!) node, Tensor(b!) seed_mask, Tensor(c!) edge_index, Tensor(d!)? edge_id, "
      "Tensor(e!)? csr_rowptr, SymInt[] edge_capacity) -> ()");
  m.def(
      "masked_spmm(Tensor rowptr, Tensor col, Tensor? value, Tensor x, Tensor words, SymInt num_sets, bool mean) -> Tensor");
  m.def("masked_sddmm(Tensor rowptr, Tensor col, Tensor g, Tensor x, Tensor words, SymInt num_sets) -> Tensor");
  m.def("masked_degree(Tensor rowptr, Tensor col, Tensor words, SymInt num_sets) -> Tensor");
  m.def(
      "relational_spmm(Tensor rowptr, Tensor col, Tensor value, Tensor x, Tensor source, Tensor source_ptr, Tensor target, "
      "Tensor target_ptr, Tensor? source_scale, Tensor? target_scale, int[] relations, SymInt num_nodes, bool shared, "
      "bool sum_relations, bool sum_samples) -> Tensor");
  m.def(
      "attention_rows(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? draw, float scale, int threshold, "
      "float rounding) -> (Tensor, Tensor)");
  m.def(
      "attention_rows_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor out, "
      "Tensor lse, Tensor? draw, float scale, int threshold, float rounding) -> (Tensor, Tensor, Tensor)");
  m.def("is_ordinary(Tensor q, Tensor k, Tensor v, float rounding) -> Tensor");
  m.def(
      "edge_rows(Tensor q, Tensor k, Tensor v, Tensor? edge_bias, Tensor rowptr, Tensor col, Tensor? log_weight, "
      "int[] relations, int[] heads, int num_prefix, bool self_loops, float scale, Tensor? draw, int threshold) -> "
      "(Tensor, Tensor)");
  m.def(
      "edge_rows_backward(Tensor dout, Tensor delta, Tensor lse, Tensor q, Tensor k, Tensor v, Tensor? edge_bias, "
      "Tensor rowptr, Tensor col, Tensor? log_weight, Tensor colptr, Tensor row, Tensor? log_weight_by_column, "
      "int[] relations, int[] heads, int num_prefix, bool self_loops, float scale, Tensor? draw, int threshold) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "bce_map(Tensor(a!) scores, Tensor? total, Tensor rows, Tensor rowptr, Tensor col, Tensor? weight, Tensor inv_mass, "
      "Tensor unknown, float least, float most) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "bce_map_backward(Tensor dloss, Tensor sharp, Tensor(a!) scores, Tensor? total, Tensor rows, Tensor rowptr, Tensor col, "
      "Tensor? weight, Tensor inv_mass, Tensor unknown, float most) -> Tensor");
  m.def(
      "relational_degree(Tensor rowptr, Tensor col, Tensor source, Tensor source_ptr, Tensor target, Tensor target_ptr, "
      "int[] relations, SymInt num_nodes) -> Tensor");
  m.def(
      "screen_readout(Tensor sets, Tensor query, Tensor key, Tensor value, Tensor x, Tensor weight1, Tensor bias1, float eps1, "
      "Tensor up, Tensor up_bias, Tensor down, Tensor down_bias, Tensor weight2, Tensor bias2, float eps2) -> Tensor");
  m.def(
      "screen_cross_attention(Tensor sets, Tensor rows, Tensor genes, Tensor w, Tensor value, Tensor bias, Tensor add, "
      "Tensor change) -> (Tensor, Tensor)");
  m.def("screen_mlp(Tensor x, Tensor up, Tensor up_bias, Tensor down) -> Tensor");
}

// Importing the module loads the library, which registers the operators.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
