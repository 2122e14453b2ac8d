// Message passing over B masked copies of one graph on the CPU: checks, and how the work is shared out.

#include "masked_spmm.h"

#include "induced.h"
#include "isa.h"
#include "values.h"

namespace cellattn {
namespace {

constexpr int64_t kFewSets = 4;  // whose bits are counted one by one rather than all 64 of a word

template <class T>
struct SpmmLoops {
  void (*shared)(const Spmm<T>&, const KeptRow<T>&, int64_t, int64_t) = &portable::spmm_shared;
  void (*sample)(const Spmm<T>&, const KeptRow<T>&, int64_t, int64_t, int64_t, int64_t) = &portable::spmm_sample;
  void (*sddmm)(const Sddmm<T>&, int64_t, int64_t) = &portable::sddmm_rows;

  SpmmLoops() {
#if defined(__x86_64__)
    if (use_avx512()) {
      shared = &avx512::spmm_shared;
      sample = &avx512::spmm_sample;
      sddmm = &avx512::sddmm_rows;
    } else if (use_avx2()) {
      shared = &avx2::spmm_shared;
      sample = &avx2::spmm_sample;
      sddmm = &avx2::sddmm_rows;
    }
#endif
  }
};

// Shapes and values of a product; float32 copies of 16-bit features.
struct Product {
  int64_t num_nodes, num_features, num_sets, num_words;
  int64_t longest = 0;  // row
  ScalarType dtype;     // of the arithmetic

  Product(const Tensor& rowptr, const Tensor& col, const Tensor& x, const Tensor& words, int64_t sets) {
    check_words("words", words);
    check_num_sets(words, sets);
    num_nodes = words.size(0);
    num_sets = sets;
    num_words = words.size(1);
    check_size("relations of rowptr", check_stack(rowptr, col, num_nodes), 1);
    check_stack_values(rowptr, col, num_nodes);
    check_features("x", x, true);
    num_features = x.size(x.dim() - 1);
    dtype = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    const int64_t* r = longs_of(rowptr);
    for (int64_t i = 0; i < num_nodes; ++i) longest = std::max(longest, r[i + 1] - r[i]);
  }

  void check_features(const char* name, const Tensor& x, bool may_be_shared) const {
    STD_TORCH_CHECK(
        x.dim() == 3 || (may_be_shared && x.dim() == 2), name, ": expected ", may_be_shared ? "2 or 3" : "3",
        " dimensions, got shape ", shape_of(x));
    check_tensor(name, x, x.dim(), {ScalarType::Double, ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
    check_size(name, x.size(x.dim() - 2), num_nodes);
    if (x.dim() == 3) check_size(name, x.size(0), num_sets);
  }

  int64_t stride(const Tensor& x) const { return x.dim() == 3 ? num_nodes * num_features : 0; }
};

std::vector<uint8_t> keep_bytes(const Tensor& words, int64_t num_sets) {
  const Word* in = const_words_of(words);
  const int64_t n = words.size(0), w = words.size(1);
  std::vector<uint8_t> keep(num_sets * n);
  for_each_task(num_sets, [&](int64_t b) {
    for (int64_t i = 0; i < n; ++i) keep[b * n + i] = (in[i * w + b / kWordBits] >> (b % kWordBits)) & 1;
  });
  return keep;
}

template <class T>
void run_spmm(
    const Product& about, const Tensor& rowptr, const Tensor& col, const std::optional<Tensor>& value, const Tensor& x,
    const Tensor& words, bool mean, const Tensor& out) {
  const std::vector<uint8_t> keep = keep_bytes(words, about.num_sets);
  Spmm<T> task = {};
  task.rowptr = longs_of(rowptr);
  task.col = ints_of(col);
  task.value = value ? static_cast<const T*>(value->const_data_ptr()) : nullptr;
  task.x = static_cast<const T*>(x.const_data_ptr());
  task.x_stride = about.stride(x);
  task.keep = keep.data();
  task.words = const_words_of(words);
  task.num_words = about.num_words;
  task.num_nodes = about.num_nodes;
  task.num_features = about.num_features;
  task.num_sets = about.num_sets;
  task.mean = mean;
  task.out = static_cast<T*>(out.mutable_data_ptr());

  const SpmmLoops<T> loops;
  const auto with_room = [&](const auto& f) {
    std::vector<int32_t> kept_col(about.longest + 1);
    std::vector<T> kept_value(about.longest + 1);
    f(KeptRow<T>{kept_col.data(), kept_value.data()});
  };
  if (x.dim() == 2) {
    for_each_row_block(task.rowptr, about.num_nodes, [&](int64_t begin, int64_t end) {
      with_room([&](const KeptRow<T>& kept) { loops.shared(task, kept, begin, end); });
    });
    return;
  }
  // A tile of the features of one sample at a time: what is gathered from stays in the cache.
  const int64_t tile = kTileBytes / static_cast<int64_t>(sizeof(T)), num_tiles = ceil_div(about.num_features, tile);
  const int64_t per_sample = std::max<int64_t>(1, num_blocks_for(col.numel(), 16384) / std::max<int64_t>(1, about.num_sets));
  for_each_task(about.num_sets * num_tiles * per_sample, [&](int64_t t) {
    const int64_t block = t % per_sample, at = t / per_sample % num_tiles, b = t / per_sample / num_tiles;
    const int64_t begin = block_begin(task.rowptr, about.num_nodes, block, per_sample);
    const int64_t end = block_begin(task.rowptr, about.num_nodes, block + 1, per_sample);
    with_room([&](const KeptRow<T>& kept) { loops.sample(task, kept, b, begin, end, at * tile); });
  });
}

Tensor masked_spmm(
    const Tensor& rowptr, const Tensor& col, const std::optional<Tensor>& value, const Tensor& x, const Tensor& words,
    int64_t num_sets, bool mean) {
  const Product about(rowptr, col, x, words, num_sets);
  if (value) {
    check_tensor("value", *value, 1, {about.dtype});
    check_size("value", value->numel(), col.numel());
  }
  const Tensor features = widened(x, about.dtype);
  Tensor out = empty_on(x, {num_sets, about.num_nodes, about.num_features}, about.dtype);
  if (out.numel() > 0) {
    about.dtype == ScalarType::Double ? run_spmm<double>(about, rowptr, col, value, features, words, mean, out)
                                      : run_spmm<float>(about, rowptr, col, value, features, words, mean, out);
  }
  return widened(out, x.scalar_type());
}

template <class T>
void run_sddmm(
    const Product& about, const Tensor& rowptr, const Tensor& col, const Tensor& g, const Tensor& x, const Tensor& words,
    const Tensor& out) {
  Sddmm<T> task = {};
  task.rowptr = longs_of(rowptr);
  task.col = ints_of(col);
  task.g = static_cast<const T*>(g.const_data_ptr());
  task.x = static_cast<const T*>(x.const_data_ptr());
  task.x_stride = about.stride(x);
  task.words = const_words_of(words);
  task.num_words = about.num_words;
  task.num_nodes = about.num_nodes;
  task.num_features = about.num_features;
  task.num_sets = about.num_sets;
  task.out = static_cast<T*>(out.mutable_data_ptr());
  const SpmmLoops<T> loops;
  for_each_row_block(task.rowptr, about.num_nodes, [&](int64_t begin, int64_t end) { loops.sddmm(task, begin, end); });
}

Tensor masked_sddmm(
    const Tensor& rowptr, const Tensor& col, const Tensor& g, const Tensor& x, const Tensor& words, int64_t num_sets) {
  const Product about(rowptr, col, x, words, num_sets);
  about.check_features("g", g, false);
  check_size("g", g.size(2), about.num_features);
  STD_TORCH_CHECK(g.scalar_type() == x.scalar_type(), "g: expected the dtype of x");
  Tensor out = empty_on(x, {col.numel()}, about.dtype);
  const Tensor wide_g = widened(g, about.dtype), wide_x = widened(x, about.dtype);
  about.dtype == ScalarType::Double ? run_sddmm<double>(about, rowptr, col, wide_g, wide_x, words, out)
                                    : run_sddmm<float>(about, rowptr, col, wide_g, wide_x, words, out);
  return out;
}

Tensor masked_degree(const Tensor& rowptr, const Tensor& col, const Tensor& words, int64_t num_sets) {
  check_words("words", words);
  check_num_sets(words, num_sets);
  const int64_t n = words.size(0), w = words.size(1);
  check_size("relations of rowptr", check_stack(rowptr, col, n), 1);
  check_stack_values(rowptr, col, n);
  Tensor degree = empty_on(words, {num_sets, n}, ScalarType::Int);
  int32_t* out = static_cast<int32_t*>(degree.mutable_data_ptr());
  const Word* in = const_words_of(words);
  const int64_t* r = longs_of(rowptr);
  std::vector<Word> copy(w > 1 ? n : 0);
  for (int64_t c = 0; c < w; ++c) {
    for (int64_t i = 0; w > 1 && i < n; ++i) copy[i] = in[i * w + c];
    const Word* column = w > 1 ? copy.data() : in;
    const int64_t first = c * kWordBits, size = std::min(kWordBits, num_sets - first);
    for_each_row_block(r, n, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        int64_t counts[kWordBits] = {};
        if (size <= kFewSets) {
          for (int64_t e = r[i]; e < r[i + 1]; ++e) {
            const Word both = column[i] & column[ints_of(col)[e]];
            for (int64_t b = 0; b < size; ++b) counts[b] += (both >> b) & 1;
          }
        } else {
          portable::count_edges(r, ints_of(col), column, i, i + 1, counts);
        }
        for (int64_t b = 0; b < size; ++b) out[(first + b) * n + i] = static_cast<int32_t>(counts[b]);
      }
    });
  }
  return degree;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cellattn, CPU, m) {
  m.impl("masked_spmm", TORCH_BOX(&masked_spmm));
  m.impl("masked_sddmm", TORCH_BOX(&masked_sddmm));
  m.impl("masked_degree", TORCH_BOX(&masked_degree));
}

}  // namespace cellattn
