// Sums of features over the bits of a row, on the CPU: checks, and how the work is shared out.

#include "bit_spmm.h"

#include "isa.h"
#include "values.h"

namespace cellattn {
namespace {

template <class T>
auto tile_function() {
#if defined(__x86_64__)
  if (use_avx512()) return static_cast<int64_t (*)(const BitSpmm<T>&, int64_t, int64_t, int64_t)>(&avx512::bit_spmm_tile);
  if (use_avx2()) return static_cast<int64_t (*)(const BitSpmm<T>&, int64_t, int64_t, int64_t)>(&avx2::bit_spmm_tile);
#endif
  return static_cast<int64_t (*)(const BitSpmm<T>&, int64_t, int64_t, int64_t)>(&portable::bit_spmm_tile);
}

template <class T>
void run(const Tensor& words, const std::optional<Tensor>& rows, const Tensor& x, const Tensor& out) {
  BitSpmm<T> task = {};
  task.words = const_words_of(words);
  task.rows = rows ? longs_of(*rows) : nullptr;
  task.x = static_cast<const T*>(x.const_data_ptr());
  task.num_words = words.size(1);
  task.num_cols = x.size(0);
  task.num_features = x.size(1);
  task.out = static_cast<T*>(out.mutable_data_ptr());
  const auto tile = tile_function<T>();
  const int64_t num_rows = out.size(0), num_blocks = std::max(num_blocks_for(num_rows, 64), ceil_div(num_rows, kBitRows));
  for_each_task(num_blocks, [&](int64_t block) {
    const int64_t begin = num_rows * block / num_blocks, end = num_rows * (block + 1) / num_blocks;
    for (int64_t first = 0; first < task.num_features;) first += tile(task, begin, end, first);
  });
}

Tensor bit_spmm(const Tensor& words, const std::optional<Tensor>& rows, const Tensor& x) {
  check_words("words", words);
  check_tensor("x", x, 2, {ScalarType::Float, ScalarType::Double});
  check_same_device("x", x, words);
  check_size("words, for the columns of x", words.size(1), num_words(x.size(0)));
  int64_t num_rows = words.size(0);
  if (rows) {
    check_tensor("rows", *rows, 1, {ScalarType::Long});
    check_same_device("rows", *rows, words);
    const int64_t* r = longs_of(*rows);
    for (int64_t i = 0; i < rows->numel(); ++i) {
      STD_TORCH_CHECK(
          r[i] >= 0 && r[i] < num_rows, "rows: position ", i, " holds ", r[i], ", expected a row in [0, ", num_rows, ")");
    }
    num_rows = rows->numel();
  }
  Tensor out = empty_on(x, {num_rows, x.size(1)}, x.scalar_type());
  if (x.scalar_type() == ScalarType::Double) {
    run<double>(words, rows, x, out);
  } else {
    run<float>(words, rows, x, out);
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cellattn, CPU, m) { m.impl("bit_spmm", TORCH_BOX(&bit_spmm)); }

}  // namespace cellattn
