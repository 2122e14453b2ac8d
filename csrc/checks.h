// What the operators ask of their arguments before they read them. Messages name the argument, what came and what was expected.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bits.h"

namespace cellattn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& x) {
  std::string text = "[";
  for (int64_t d = 0; d < x.dim(); ++d) text += (d ? ", " : "") + std::to_string(x.size(d));
  return text + "]";
}

inline void check_tensor(const char* name, const Tensor& x, int64_t dim, std::initializer_list<ScalarType> dtypes) {
  STD_TORCH_CHECK(x.dim() == dim, name, ": expected ", dim, " dimension(s), got shape ", shape_of(x));
  bool known = false;
  for (ScalarType dtype : dtypes) known = known || x.scalar_type() == dtype;
  STD_TORCH_CHECK(known, name, ": got a dtype this operator does not take");
  STD_TORCH_CHECK(x.is_contiguous(), name, ": expected a contiguous tensor");
}

inline void check_same_device(const char* name, const Tensor& x, const Tensor& first) {
  STD_TORCH_CHECK(x.device() == first.device(), name, ": expected a tensor on the device of the other arguments");
}

inline void check_size(const char* name, int64_t got, int64_t expected) {
  STD_TORCH_CHECK(got == expected, name, ": expected size ", expected, ", got ", got);
}

// A number of samples, and what the bits of the last word leave room for.
inline void check_num_sets(const Tensor& words, int64_t num_sets) {
  STD_TORCH_CHECK(
      num_sets >= 0 && num_words(num_sets) == words.size(1),
      "num_sets: expected a number of sets that fills ", words.size(1), " words, got ", num_sets);
}

// Shapes of a stack of CSR matrices with `num_nodes` columns; the number of matrices.
inline int64_t check_stack(const Tensor& rowptr, const Tensor& col, int64_t num_nodes) {
  check_tensor("rowptr", rowptr, 1, {ScalarType::Long});
  check_tensor("col", col, 1, {ScalarType::Int});
  check_same_device("col", col, rowptr);
  STD_TORCH_CHECK(
      num_nodes >= 1 && num_nodes <= INT32_MAX, "num_nodes: expected 1 to 2147483647 genes, got ", num_nodes);
  STD_TORCH_CHECK(
      rowptr.numel() % num_nodes == (num_nodes == 1 ? 0 : 1) && rowptr.numel() >= 1,
      "rowptr: expected a multiple of num_nodes = ", num_nodes, " entries and one more, got ", rowptr.numel());
  return (rowptr.numel() - 1) / num_nodes;
}

inline void check_ragged(const Tensor& seeds, const Tensor& ptr) {
  check_tensor("seeds", seeds, 1, {ScalarType::Long});
  check_tensor("ptr", ptr, 1, {ScalarType::Long});
  check_same_device("ptr", ptr, seeds);
  STD_TORCH_CHECK(ptr.numel() >= 1, "ptr: expected at least one entry, got none");
}

// Arguments of khop_words, checked for shapes on either device; the number of relations.
inline int64_t check_khop_words(
    const Tensor& rowptr, const Tensor& col, const Tensor& colptr, const Tensor& row, const Tensor& seeds,
    const Tensor& ptr, int64_t num_nodes, int64_t num_hops, bool incoming, bool outgoing) {
  const int64_t num_relations = check_stack(rowptr, col, num_nodes);
  check_size("colptr", check_stack(colptr, row, num_nodes), num_relations);
  check_ragged(seeds, ptr);
  for (const Tensor* x : {&colptr, &row, &seeds, &ptr}) check_same_device("khop_words", *x, rowptr);
  STD_TORCH_CHECK(num_hops >= 0, "num_hops: expected at least 0, got ", num_hops);
  STD_TORCH_CHECK(incoming || outgoing, "incoming, outgoing: expected one of them at least");
  return num_relations;
}

inline void check_words(const char* name, const Tensor& words) { check_tensor(name, words, 2, {ScalarType::Long}); }

inline Word* words_of(const Tensor& words) { return static_cast<Word*>(words.mutable_data_ptr()); }
inline const Word* const_words_of(const Tensor& words) { return static_cast<const Word*>(words.const_data_ptr()); }
inline const int64_t* longs_of(const Tensor& x) { return static_cast<const int64_t*>(x.const_data_ptr()); }
inline const int32_t* ints_of(const Tensor& x) { return static_cast<const int32_t*>(x.const_data_ptr()); }

// What Python sees as a MemoryError, with a message of ours: PyTorch's own does not come through the stable ABI.
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(std::string message) : message_(std::move(message)) {}
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  std::string message_;
};

inline int64_t bytes_of(ScalarType dtype) {
  return dtype == ScalarType::Long || dtype == ScalarType::Double ? 8
         : dtype == ScalarType::Int || dtype == ScalarType::Float ? 4
         : dtype == ScalarType::Half || dtype == ScalarType::BFloat16 ? 2 : 1;
}

// An uninitialised tensor on the device of `like`. No other operator's error is to be had here: a size below 0 is refused before.
// Not by torch::stable::new_empty, which goes through the dispatcher with boxed arguments: small problems are all calls.
inline Tensor empty_on(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t count = 1, num_bytes = bytes_of(dtype);
  bool too_large = false;
  for (size_t d = sizes.size(); d-- > 0;) {
    STD_TORCH_CHECK(sizes[d] >= 0, "expected sizes of at least 0, got ", sizes[d]);
    strides[d] = count;
    too_large = __builtin_mul_overflow(count, std::max<int64_t>(sizes[d], 1), &count) || too_large;
  }
  too_large = __builtin_mul_overflow(num_bytes, count, &num_bytes) || too_large;
  const bool none = std::find(sizes.begin(), sizes.end(), 0) != sizes.end();
  const auto what = [&] {
    std::string shape;
    for (int64_t size : sizes) shape += (shape.empty() ? "" : ", ") + std::to_string(size);
    return "a tensor of shape [" + shape + "]";
  };
  if (too_large && !none) throw OutOfMemory("cannot allocate " + what() + ": it has more than 2^63 bytes");
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made;
  if (aoti_torch_empty_strided(
          static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), type, device_type, device_index, &made)) {
    throw OutOfMemory("cannot allocate " + std::to_string(none ? 0 : num_bytes) + " bytes of memory for " + what());
  }
  return Tensor(made);
}

// Arguments of induced_write, checked for shapes on either device; the number of relations.
struct Induced {
  int64_t num_nodes, num_relations, num_sets, num_places;  // places: the capacity of `node`
  bool csr, wide;                                          // wide: int64 indices
};

inline Induced check_induced_write(
    const Tensor& rowptr, const Tensor& col, const Tensor& words, const Tensor& seed_words, const Tensor& node_ptr,
    const Tensor& edge_ptr, const Tensor& offsets, const Tensor& node, const Tensor& seed_mask, const Tensor& edge_index,
    const std::optional<Tensor>& edge_id, const std::optional<Tensor>& csr_rowptr,
    const std::vector<int64_t>& edge_capacity) {
  check_words("words", words);
  check_words("seed_words", seed_words);
  check_size("seed_words", seed_words.size(0), words.size(0));
  check_size("seed_words", seed_words.size(1), words.size(1));
  Induced about;
  about.num_nodes = words.size(0);
  about.num_relations = check_stack(rowptr, col, about.num_nodes);
  check_tensor("node_ptr", node_ptr, 1, {ScalarType::Long});
  about.num_sets = node_ptr.numel() - 1;
  check_num_sets(words, about.num_sets);
  check_tensor("edge_ptr", edge_ptr, 2, {ScalarType::Long});
  check_size("edge_ptr", edge_ptr.size(0), about.num_relations);
  check_size("edge_ptr", edge_ptr.size(1), about.num_sets + 1);
  check_tensor("offsets", offsets, 2, {ScalarType::Long});  // how many rows, each backend decides
  check_size("offsets", offsets.size(1), about.num_sets);
  check_tensor("node", node, 1, {ScalarType::Long, ScalarType::Int});
  const ScalarType index = node.scalar_type();
  about.wide = index == ScalarType::Long;
  about.num_places = node.numel();
  check_tensor("seed_mask", seed_mask, 1, {ScalarType::Bool});
  check_size("seed_mask", seed_mask.numel(), about.num_places);
  check_size("edge_capacity", static_cast<int64_t>(edge_capacity.size()), about.num_relations);
  about.csr = csr_rowptr.has_value();
  int64_t total = 0;
  for (int64_t capacity : edge_capacity) {
    STD_TORCH_CHECK(
        capacity >= 0 && capacity <= (INT64_MAX / 16 - total), "edge_capacity: expected sizes >= 0, got ", capacity);
    total += capacity;
  }
  check_tensor("edge_index", edge_index, 1, {index});
  STD_TORCH_CHECK(
      edge_index.numel() >= (about.csr ? total : 2 * total), "edge_index: expected at least ",
      about.csr ? total : 2 * total, " entries, got ", edge_index.numel());
  for (const Tensor* x : {&col, &words, &seed_words, &node_ptr, &edge_ptr, &offsets, &node, &seed_mask, &edge_index}) {
    check_same_device("induced_write", *x, rowptr);
  }
  if (edge_id.has_value()) {
    check_tensor("edge_id", *edge_id, 1, {index});
    check_same_device("edge_id", *edge_id, rowptr);
    STD_TORCH_CHECK(
        edge_id->numel() >= total, "edge_id: expected at least ", total, " entries, got ", edge_id->numel());
  }
  if (csr_rowptr.has_value()) {
    check_tensor("csr_rowptr", *csr_rowptr, 1, {index});
    check_same_device("csr_rowptr", *csr_rowptr, rowptr);
    check_size("csr_rowptr", csr_rowptr->numel(), about.num_relations * (about.num_places + 1));
  }
  return about;
}

}  // namespace cellattn
