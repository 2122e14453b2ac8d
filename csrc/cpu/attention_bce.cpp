// Cross-entropy between rows of a graph and rows of scores on the CPU: checks, and how the work is shared out.

#include "attention_bce.h"

#include "isa.h"
#include "room.h"
#include "values.h"

namespace cellattn {
namespace {

template <class T>
using BcePass = void (*)(const BceRows<T>&, int64_t, int64_t, T*);

template <class T>
struct BceLoops {
  BcePass<T> forward = &portable::bce_forward, backward = &portable::bce_backward;

  BceLoops() {
#if defined(__x86_64__)
    if (use_avx512()) {
      forward = &avx512::bce_forward, backward = &avx512::bce_backward;
    } else if (use_avx2()) {
      forward = &avx2::bce_forward, backward = &avx2::bce_backward;
    }
#endif
  }
};

template <class T>
T* written(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

const int64_t* check_genes(const char* name, const Tensor& x, int64_t num_genes) {
  check_tensor(name, x, 1, {ScalarType::Long});
  const int64_t* gene = longs_of(x);
  for (int64_t i = 0; i < x.numel(); ++i) {
    STD_TORCH_CHECK(
        gene[i] >= 0 && gene[i] < num_genes, name, ": position ", i, " holds ", gene[i], ", expected a gene in [0, ",
        num_genes, ")");
  }
  return gene;
}

// The arguments that both passes have.
struct Problem {
  const Tensor& scores;
  const std::optional<Tensor>& total;
  const Tensor &rows, &rowptr, &col;
  const std::optional<Tensor>& weight;
  const Tensor &inv_mass, &unknown;
  double least, most;
  int64_t longest = 0;  // of the rows

  int64_t num_rows() const { return scores.size(0); }

  void check() {
    check_tensor("scores", scores, 2, {ScalarType::Double, ScalarType::Float});
    const int64_t num_genes = scores.size(1);
    STD_TORCH_CHECK(num_genes <= INT32_MAX, "scores: expected at most 2147483647 genes, got ", num_genes);
    check_rows("inv_mass", inv_mass, num_genes);
    if (total) check_rows("total", *total, num_rows());
    check_tensor("rowptr", rowptr, 1, {ScalarType::Long});
    check_size("rowptr", rowptr.numel(), num_genes + 1);
    check_tensor("col", col, 1, {ScalarType::Int});
    if (weight) check_rows("weight", *weight, col.numel());
    for (const Tensor* x : {&rows, &rowptr, &col, &unknown}) check_same_device("rows, rowptr, col, unknown", *x, scores);
    check_genes("unknown", unknown, num_genes);
    const int64_t* row = check_genes("rows", rows, num_genes);
    check_size("rows", rows.numel(), num_rows());
    const int64_t* ptr = longs_of(rowptr);
    const int32_t* gene = ints_of(col);
    for (int64_t i = 0; i < num_rows(); ++i) {
      const int64_t first = ptr[row[i]], last = ptr[row[i] + 1];
      STD_TORCH_CHECK(
          first >= 0 && first <= last && last <= col.numel(), "rowptr: expected to rise from 0 to ", col.numel(), ", got ", first,
          " and ", last, " at position ", row[i]);
      longest = std::max(longest, last - first);
      for (int64_t e = first; e < last; ++e) {
        STD_TORCH_CHECK(gene[e] >= 0 && gene[e] < num_genes, "col: expected genes in [0, ", num_genes, "), got ", gene[e]);
      }
    }
  }

  void check_rows(const char* name, const Tensor& x, int64_t size) const {
    check_tensor(name, x, 1, {scores.scalar_type()});
    check_same_device(name, x, scores);
    check_size(name, x.numel(), size);
  }

  template <class T>
  BceRows<T> task() const {
    BceRows<T> task = {};
    task.scores = written<T>(scores);
    task.total = data_of<T>(total);
    task.rows = longs_of(rows);
    task.rowptr = longs_of(rowptr);
    task.col = ints_of(col);
    task.weight = data_of<T>(weight);
    task.inv_mass = data_of<T>(inv_mass);
    task.unknown = longs_of(unknown);
    task.num_genes = scores.size(1);
    task.num_unknown = unknown.numel();
    task.least = static_cast<T>(least);
    task.most = static_cast<T>(most);
    return task;
  }

  template <class T>
  void run(const BceRows<T>& task, BcePass<T> pass) const {
    for_each_block(num_rows(), 2, [&](int64_t first, int64_t last) {
      Room<T> edge(longest);
      pass(task, first, last, edge.data());
    });
  }
};

template <class T>
void run_forward(
    const Problem& problem, const Tensor& loss, const Tensor& sharp, const Tensor& positive, const Tensor& negative) {
  BceRows<T> task = problem.task<T>();
  task.loss = written<T>(loss);
  task.sharp = written<int64_t>(sharp);
  task.sharp_positive = written<T>(positive);
  task.sharp_negative = written<T>(negative);
  problem.run(task, BceLoops<T>().forward);
}

template <class T>
void run_backward(const Problem& problem, const Tensor& dloss, const Tensor& sharp, const Tensor& dtotal) {
  BceRows<T> task = problem.task<T>();
  task.dloss = data_of<T>(dloss);
  task.sharp = const_cast<int64_t*>(longs_of(sharp));  // only read
  task.dtotal = written<T>(dtotal);
  problem.run(task, BceLoops<T>().backward);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bce_map(
    const Tensor& scores, const std::optional<Tensor>& total, const Tensor& rows, const Tensor& rowptr, const Tensor& col,
    const std::optional<Tensor>& weight, const Tensor& inv_mass, const Tensor& unknown, double least, double most) {
  Problem problem{scores, total, rows, rowptr, col, weight, inv_mass, unknown, least, most};
  problem.check();
  const int64_t kept = total ? problem.num_rows() : 0;
  Tensor loss = empty_on(scores, {problem.num_rows()}, scores.scalar_type());
  Tensor sharp = empty_on(scores, {kept}, ScalarType::Long);
  Tensor positive = empty_on(scores, {kept}, scores.scalar_type()), negative = empty_on(scores, {kept}, scores.scalar_type());
  const auto run = scores.scalar_type() == ScalarType::Double ? &run_forward<double> : &run_forward<float>;
  run(problem, loss, sharp, positive, negative);
  return {loss, sharp, positive, negative};
}

Tensor bce_map_backward(
    const Tensor& dloss, const Tensor& sharp, const Tensor& scores, const std::optional<Tensor>& total, const Tensor& rows,
    const Tensor& rowptr, const Tensor& col, const std::optional<Tensor>& weight, const Tensor& inv_mass,
    const Tensor& unknown, double most) {
  Problem problem{scores, total, rows, rowptr, col, weight, inv_mass, unknown, 0, most};
  problem.check();
  problem.check_rows("dloss", dloss, problem.num_rows());
  check_tensor("sharp", sharp, 1, {ScalarType::Long});
  check_same_device("sharp", sharp, scores);
  check_size("sharp", sharp.numel(), total ? problem.num_rows() : 0);
  for (int64_t i = 0; i < sharp.numel(); ++i) {
    const int64_t gene = longs_of(sharp)[i];
    STD_TORCH_CHECK(gene >= -1 && gene < scores.size(1), "sharp: expected -1 or a gene, got ", gene);
  }
  Tensor dtotal = empty_on(scores, {total ? problem.num_rows() : 0}, scores.scalar_type());
  const auto run = scores.scalar_type() == ScalarType::Double ? &run_backward<double> : &run_backward<float>;
  run(problem, dloss, sharp, dtotal);
  return dtotal;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cellattn, CPU, m) {
  m.impl("bce_map", TORCH_BOX(&bce_map));
  m.impl("bce_map_backward", TORCH_BOX(&bce_map_backward));
}

}  // namespace cellattn
