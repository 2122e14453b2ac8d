// Message passing over several relations between gene subsets on the CPU: checks, and how the work is shared out.

#include "relational_spmm.h"

#include <memory>

#include "isa.h"
#include "values.h"

namespace cellattn {
namespace {

template <class T>
struct RelationalLoops {
  void (*rows)(const Relational<T>&, const Senders<T>&, const KeptRow<T>&, int64_t, int64_t) = &portable::relational_rows;
  int64_t (*count)(const int32_t*, int64_t, const int32_t*) = &portable::count_senders;

  RelationalLoops() {
#if defined(__x86_64__)
    if (use_avx512()) {
      rows = &avx512::relational_rows;
      count = &avx512::count_senders;
    } else if (use_avx2()) {
      rows = &avx2::relational_rows;
      count = &avx2::count_senders;
    }
#endif
  }
};

// A ragged batch of genes, each sample's ascending: a gene's place in it is an index of features.
struct Places {
  const int64_t *gene, *ptr;
  int64_t size, num_sets;

  Places(const char* name, const Tensor& genes, const Tensor& ptrs, int64_t num_nodes) {
    const std::string ptr_name = std::string(name) + "_ptr";
    check_tensor(name, genes, 1, {ScalarType::Long});
    check_tensor(ptr_name.c_str(), ptrs, 1, {ScalarType::Long});
    check_same_device(ptr_name.c_str(), ptrs, genes);
    STD_TORCH_CHECK(ptrs.numel() >= 1, ptr_name, ": expected at least one entry, got none");
    gene = longs_of(genes);
    ptr = longs_of(ptrs);
    size = genes.numel();
    num_sets = ptrs.numel() - 1;
    check_rises(ptr_name.c_str(), ptr, ptrs.numel(), size);
    for (int64_t b = 0; b < num_sets; ++b) {
      int64_t last = -1;
      for (int64_t p = ptr[b]; p < ptr[b + 1]; ++p) {
        STD_TORCH_CHECK(
            gene[p] > last && gene[p] < num_nodes, name, ": position ", p, " holds ", gene[p],
            ", expected genes in [0, ", num_nodes, ") that ascend within a sample");
        last = gene[p];
      }
    }
  }
};

// Where each gene's features are, for one sample at a time.
class PlaceTable {
 public:
  explicit PlaceTable(int64_t num_nodes) : place_(num_nodes, -1) {}

  // Places count from the sample's first; where the features are all genes', a gene is its own place.
  void enter(const Places& source, int64_t b, bool shared) {
    for (int64_t p = first_; p < last_; ++p) place_[source.gene[p]] = -1;
    first_ = source.ptr[b];
    last_ = source.ptr[b + 1];
    for (int64_t p = first_; p < last_; ++p) {
      place_[source.gene[p]] = static_cast<int32_t>(shared ? source.gene[p] : p - first_);
    }
  }

  const int32_t* data() const { return place_.data(); }

 private:
  std::vector<int32_t> place_;
  int64_t first_ = 0, last_ = 0;  // what is entered
};

// What both operators ask of the graph, the relations and the two batches.
struct Between {
  int64_t num_nodes;
  const std::vector<int64_t>& relation;
  Places source, target;
  const int64_t* rowptr;
  const int32_t* col;
  std::vector<int64_t> cost;  // [N] of a target, all relations together
  int64_t longest = 0;        // row

  Between(
      const Tensor& rowptrs, const Tensor& cols, const Tensor& sources, const Tensor& source_ptr, const Tensor& targets,
      const Tensor& target_ptr, const std::vector<int64_t>& relations, int64_t n)
      : num_nodes(n),
        relation(relations),
        source("source", sources, source_ptr, n),
        target("target", targets, target_ptr, n),
        rowptr(nullptr),
        col(nullptr) {
    const int64_t stacked = check_stack(rowptrs, cols, n);
    check_stack_values(rowptrs, cols, n);
    for (const Tensor* x : {&sources, &targets}) check_same_device("source", *x, rowptrs);
    check_size("target_ptr", target.num_sets + 1, source.num_sets + 1);
    for (int64_t r : relation) {
      STD_TORCH_CHECK(r >= 0 && r < stacked, "relations: expected indices in [0, ", stacked, "), got ", r);
    }
    rowptr = longs_of(rowptrs);
    col = ints_of(cols);
    cost.assign(n, 0);
    for (int64_t r : relation) {
      for (int64_t i = 0; i < n; ++i) {
        const int64_t degree = rowptr[r * n + i + 1] - rowptr[r * n + i];
        cost[i] += degree + kRowCost;
        longest = std::max(longest, degree);
      }
    }
  }

  int64_t num_relations() const { return static_cast<int64_t>(relation.size()); }

  // f(b, begin, end) over blocks of each sample's targets that cost about the same.
  template <class F>
  void for_each_target_block(const F& f) const {
    struct Block {
      int64_t sample, begin, end;
    };
    std::vector<int64_t> before(target.size + 1, 0);
    for (int64_t t = 0; t < target.size; ++t) before[t + 1] = before[t] + cost[target.gene[t]];
    const int64_t each = ceil_div(before[target.size] + 1, num_blocks_for(before[target.size], 16384));
    std::vector<Block> blocks;
    for (int64_t b = 0; b < target.num_sets; ++b) {
      const int64_t first = target.ptr[b], size = target.ptr[b + 1] - first;
      const int64_t num_blocks = ceil_div(before[first + size] - before[first] + 1, each);
      for (int64_t at = 0; at < num_blocks; ++at) {
        const int64_t begin = first + block_begin(before.data() + first, size, at, num_blocks);
        const int64_t end = first + block_begin(before.data() + first, size, at + 1, num_blocks);
        if (begin < end) blocks.push_back({b, begin, end});
      }
    }
    for_each_task(static_cast<int64_t>(blocks.size()), [&](int64_t at) {
      f(blocks[at].sample, blocks[at].begin, blocks[at].end);
    });
  }

  // f(first, last) over blocks of genes that cost about the same as targets of all samples.
  template <class F>
  void for_each_gene_block(const F& f) const {
    std::vector<int64_t> before(num_nodes + 1, 0);
    for (int64_t t = 0; t < target.size; ++t) before[target.gene[t] + 1] += cost[target.gene[t]];
    for (int64_t i = 0; i < num_nodes; ++i) before[i + 1] += before[i];
    for_each_row_block(before.data(), num_nodes, f);
  }
};

template <class T>
const T* data_or_null(const std::optional<Tensor>& x) {
  return x ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

template <class T>
void run_product(
    const Between& between, const Tensor& value, const Tensor& x, const std::optional<Tensor>& source_scale,
    const std::optional<Tensor>& target_scale, bool shared, bool sum_relations, bool sum_samples, const Tensor& out) {
  Relational<T> task = {};
  task.rowptr = between.rowptr;
  task.col = between.col;
  task.value = static_cast<const T*>(value.const_data_ptr());
  task.relation = between.relation.data();
  task.num_relations = between.num_relations();
  task.num_nodes = between.num_nodes;
  task.num_features = x.size(x.dim() - 1);
  task.target = between.target.gene;
  task.target_scale = data_or_null<T>(target_scale);
  task.x_per_relation = x.dim() == 3;
  task.out_per_relation = !sum_relations;
  task.sum_samples = sum_samples;
  task.out = static_cast<T*>(out.mutable_data_ptr());

  const RelationalLoops<T> loops;
  const T *features = static_cast<const T*>(x.const_data_ptr()), *factors = data_or_null<T>(source_scale);
  const int64_t per_place = (task.x_per_relation ? task.num_relations : 1) * task.num_features;
  int64_t most_places = shared ? between.num_nodes : 0;
  for (int64_t b = 0; b < between.source.num_sets && !shared; ++b) {
    most_places = std::max(most_places, between.source.ptr[b + 1] - between.source.ptr[b]);
  }
  const auto with_room = [&](const auto& f) {
    PlaceTable table(between.num_nodes);
    std::vector<int32_t> kept_place(between.longest + kListRoom);
    std::vector<T> kept_value(between.longest + kListRoom);
    const KeptRow<T> kept = {kept_place.data(), kept_value.data()};
    const std::unique_ptr<T[]> packed(new T[most_places * kTileBytes / sizeof(T)]);  // not touched unless it is wanted
    f([&](int64_t b, int64_t begin, int64_t end) {
      table.enter(between.source, b, shared);
      const int64_t first = shared ? 0 : between.source.ptr[b];
      const T* factor = factors == nullptr ? nullptr : factors + first * task.num_relations;
      const int64_t places = shared ? between.num_nodes : between.source.ptr[b + 1] - first;
      loops.rows(task, {table.data(), features + first * per_place, factor, places, packed.get()}, kept, begin, end);
    });
  };
  if (!sum_samples) {
    between.for_each_target_block(
        [&](int64_t b, int64_t begin, int64_t end) { with_room([&](const auto& rows) { rows(b, begin, end); }); });
    return;
  }
  // A block of genes has the whole batch to itself, sample by sample: the same order in every run.
  const int64_t per_gene = (task.out_per_relation ? task.num_relations : 1) * task.num_features;
  between.for_each_gene_block([&](int64_t first, int64_t last) {
    std::fill(task.out + first * per_gene, task.out + last * per_gene, T{0});
    with_room([&](const auto& rows) {
      for (int64_t b = 0; b < between.target.num_sets; ++b) {
        const int64_t *from = between.target.gene + between.target.ptr[b], *to = between.target.gene + between.target.ptr[b + 1];
        const int64_t begin = std::lower_bound(from, to, first) - between.target.gene;
        const int64_t end = std::lower_bound(from, to, last) - between.target.gene;
        if (begin < end) rows(b, begin, end);
      }
    });
  });
}

void check_scale(
    const char* name, const std::optional<Tensor>& scale, int64_t places, int64_t num_relations, ScalarType dtype) {
  if (!scale) return;
  check_tensor(name, *scale, 2, {dtype});
  check_size(name, scale->size(0), places);
  check_size(name, scale->size(1), num_relations);
}

Tensor relational_spmm(
    const Tensor& rowptr, const Tensor& col, const Tensor& value, const Tensor& x, const Tensor& source,
    const Tensor& source_ptr, const Tensor& target, const Tensor& target_ptr, const std::optional<Tensor>& source_scale,
    const std::optional<Tensor>& target_scale, std::vector<int64_t> relations, int64_t num_nodes, bool shared,
    bool sum_relations, bool sum_samples) {
  const Between between(rowptr, col, source, source_ptr, target, target_ptr, relations, num_nodes);
  const int64_t k = between.num_relations(), places = shared ? num_nodes : between.source.size;
  STD_TORCH_CHECK(x.dim() == 2 || x.dim() == 3, "x: expected 2 or 3 dimensions, got shape ", shape_of(x));
  check_tensor("x", x, x.dim(), {ScalarType::Double, ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  check_size("x", x.size(0), places);
  if (x.dim() == 3) check_size("x", x.size(1), k);
  const ScalarType dtype = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check_tensor("value", value, 1, {dtype});
  check_size("value", value.numel(), col.numel());
  check_scale("source_scale", source_scale, places, k, dtype);
  check_scale("target_scale", target_scale, between.target.size, k, dtype);

  std::vector<int64_t> shape = {sum_samples ? num_nodes : between.target.size};
  if (!sum_relations) shape.push_back(k);
  shape.push_back(x.size(x.dim() - 1));
  Tensor out = empty_on(x, shape, dtype);
  if (k == 0) {
    torch::stable::zero_(out);
  } else if (out.numel() > 0) {
    const Tensor features = widened(x, dtype);
    const auto run = dtype == ScalarType::Double ? &run_product<double> : &run_product<float>;
    run(between, value, features, source_scale, target_scale, shared, sum_relations, sum_samples, out);
  }
  return widened(out, x.scalar_type());
}

Tensor relational_degree(
    const Tensor& rowptr, const Tensor& col, const Tensor& source, const Tensor& source_ptr, const Tensor& target,
    const Tensor& target_ptr, std::vector<int64_t> relations, int64_t num_nodes) {
  const Between between(rowptr, col, source, source_ptr, target, target_ptr, relations, num_nodes);
  const int64_t k = between.num_relations();
  Tensor degree = empty_on(source, {between.target.size, k}, ScalarType::Int);
  int32_t* out = static_cast<int32_t*>(degree.mutable_data_ptr());
  const RelationalLoops<float> loops;
  between.for_each_target_block([&](int64_t b, int64_t begin, int64_t end) {
    PlaceTable table(num_nodes);
    table.enter(between.source, b, false);
    for (int64_t r = 0; r < k; ++r) {
      const int64_t* row = between.rowptr + relations[r] * num_nodes;
      for (int64_t t = begin; t < end; ++t) {
        const int64_t i = between.target.gene[t];
        out[t * k + r] = static_cast<int32_t>(loops.count(between.col + row[i], row[i + 1] - row[i], table.data()));
      }
    }
  });
  return degree;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cellattn, CPU, m) {
  m.impl("relational_spmm", TORCH_BOX(&relational_spmm));
  m.impl("relational_degree", TORCH_BOX(&relational_degree));
}

}  // namespace cellattn
