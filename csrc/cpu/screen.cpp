// Scores of many sets of genes on the CPU: checks, and how the work is shared out.

#include "screen.h"

#include <algorithm>
#include <numeric>

#include "isa.h"
#include "values.h"

namespace cellattn {
namespace {

struct ScreenLoops {
  decltype(&portable::packed_size) packed_size;
  decltype(&portable::pack) pack;
  decltype(&portable::pack_strips) pack_strips;
  decltype(&portable::readout_block) readout;
  decltype(&portable::cross_block) cross;
  decltype(&portable::mlp_block) mlp;
};

#define CELLATTN_SCREEN_LOOPS(isa) \
  ScreenLoops { &isa::packed_size, &isa::pack, &isa::pack_strips, &isa::readout_block, &isa::cross_block, &isa::mlp_block }

ScreenLoops screen_loops() {
#if defined(__x86_64__)
  if (use_avx512_bf16()) return CELLATTN_SCREEN_LOOPS(avx512_bf16);
  if (use_avx512()) return CELLATTN_SCREEN_LOOPS(avx512);
  if (use_avx2()) return CELLATTN_SCREEN_LOOPS(avx2);
#endif
  return CELLATTN_SCREEN_LOOPS(portable);
}

// Zeros that begin with a line of the cache.
class Aligned {
 public:
  explicit Aligned(int64_t size) : room_(size + kLine / sizeof(float)) {}
  float* data() {
    const uintptr_t at = reinterpret_cast<uintptr_t>(room_.data());
    return room_.data() + (kLine - at % kLine) % kLine / sizeof(float);
  }

 private:
  std::vector<float> room_;
};

const float* floats_of(const Tensor& x) { return static_cast<const float*>(x.const_data_ptr()); }
bool in_bfloat16(const Tensor& x) { return x.scalar_type() == ScalarType::BFloat16; }

const float* check_floats(const char* name, const Tensor& x, std::vector<int64_t> shape) {
  check_tensor(name, x, static_cast<int64_t>(shape.size()), {ScalarType::Float});
  for (size_t d = 0; d < shape.size(); ++d) check_size(name, x.size(static_cast<int64_t>(d)), shape[d]);
  return floats_of(x);
}

// Indices [B, k] in [0, size), k from 1 to kMaxSet.
const int64_t* check_sets(const char* name, const Tensor& x, int64_t size) {
  check_tensor(name, x, 2, {ScalarType::Long});
  STD_TORCH_CHECK(
      x.size(1) >= 1 && x.size(1) <= kMaxSet, name, ": expected 1 to ", kMaxSet, " genes a set, got ", x.size(1));
  const int64_t* index = longs_of(x);
  for (int64_t i = 0; i < x.numel(); ++i) {
    STD_TORCH_CHECK(
        index[i] >= 0 && index[i] < size, name, ": position ", i, " holds ", index[i], ", expected one in [0, ", size, ")");
  }
  return index;
}

// f(task, begin, end, scratch) over blocks of at most `most` of n, shared out among the threads.
template <class Task>
void for_each_set_block(
    const Task& task, int64_t n, int64_t most, void (*f)(const Task&, int64_t, int64_t, float*)) {
  const int64_t num_blocks = ceil_div(n, most);
  for_each_block(num_blocks, 1, [&](int64_t first, int64_t last) {
    Aligned scratch(task.scratch());
    for (int64_t block = first; block < last; ++block) {
      f(task, block * most, std::min(n, (block + 1) * most), scratch.data());
    }
  });
}

// A weight [cols, depth] of a linear layer, float32 or bfloat16, as the product with its transpose reads it.
struct PackedWeight {
  Aligned room;
  Packed packed;

  PackedWeight(const ScreenLoops& loops, const Tensor& weight)
      : room(loops.packed_size(weight.size(1), weight.size(0))), packed{room.data(), weight.size(1), weight.size(0)} {
    const Tensor wide = widened(weight, ScalarType::Float);
    loops.pack(in_bfloat16(weight), floats_of(wide), 1, packed.depth, packed.depth, packed.cols, room.data());
  }
};

// A bias with zeros behind it, to whole vectors.
Aligned widened_bias(const float* bias, int64_t size) {
  Aligned room(padded(size, kWidest));
  std::copy(bias, bias + size, room.data());
  return room;
}

// Sets in an order in which a block of them holds few different rows of w, which then stay in the cache: what sets have in
// common from the third on, then squares of kSlots firsts times all seconds.
std::vector<int64_t> near_sets(const int64_t* rows, int64_t num_sets, int64_t size) {
  std::vector<int64_t> turn(num_sets);
  std::iota(turn.begin(), turn.end(), 0);
  std::sort(turn.begin(), turn.end(), [&](int64_t x, int64_t y) {
    const int64_t *a = rows + x * size, *b = rows + y * size;
    for (int64_t e = size - 1; e >= 2; --e) {
      if (a[e] != b[e]) return a[e] < b[e];
    }
    if (a[0] / kSlots != b[0] / kSlots) return a[0] / kSlots < b[0] / kSlots;
    if (size > 1 && a[1] != b[1]) return a[1] < b[1];
    return a[0] != b[0] ? a[0] < b[0] : x < y;
  });
  return turn;
}

// Those in groups of kSlots: of sets that differ in their first row alone where there are enough of them, else of any. A group that
// is not full ends with ~set of its last.
std::vector<int64_t> slots_of(const int64_t* rows, int64_t num_sets, int64_t size) {
  constexpr int64_t kEnough = 3 * kSlots / 4;
  const std::vector<int64_t> turn = near_sets(rows, num_sets, size);
  std::vector<int64_t> slots, others;
  const auto fill_up = [&] {
    while (slots.size() % kSlots != 0) slots.push_back(slots.back() < 0 ? slots.back() : ~slots.back());
  };
  for (int64_t begin = 0, end; begin < num_sets; begin = end) {
    const int64_t* common = rows + turn[begin] * size;
    for (end = begin + 1; end < num_sets && std::equal(common + 1, common + size, rows + turn[end] * size + 1);) ++end;
    const int64_t left = (end - begin) % kSlots, whole = left < kEnough ? end - left : end;
    slots.insert(slots.end(), turn.begin() + begin, turn.begin() + whole);
    fill_up();
    others.insert(others.end(), turn.begin() + whole, turn.begin() + end);
  }
  slots.insert(slots.end(), others.begin(), others.end());
  fill_up();
  return slots;
}

Tensor screen_readout(
    const Tensor& sets, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& x, const Tensor& weight1,
    const Tensor& bias1, double eps1, const Tensor& up, const Tensor& up_bias, const Tensor& down, const Tensor& down_bias,
    const Tensor& weight2, const Tensor& bias2, double eps2) {
  Readout task = {};
  check_tensor("query", query, 3, {ScalarType::Float});
  check_tensor("value", value, 3, {ScalarType::Float});
  check_tensor("up", up, 2, {ScalarType::Float, ScalarType::BFloat16});
  check_tensor("down", down, 2, {up.scalar_type()});
  task.bfloat16 = in_bfloat16(up);
  const int64_t entries = query.size(0);
  task.head_dim = query.size(1);
  task.heads = value.size(1);
  task.dim = up.size(1);
  task.width = padded(task.dim, kWidest);
  const int64_t hidden = up.size(0), width = task.width;
  STD_TORCH_CHECK(task.dim >= 1 && hidden >= 1, "up: expected at least one row and column, got shape ", shape_of(up));
  task.sets = check_sets("sets", sets, entries);
  task.num_sets = sets.size(0);
  task.size = sets.size(1);
  task.query = check_floats("query", query, {entries, task.head_dim, task.weights_width()});
  task.key = check_floats("key", key, {entries, task.head_dim, task.weights_width()});
  task.value = check_floats("value", value, {entries, task.heads, width});
  task.x = check_floats("x", x, {entries, width});
  task.weight1 = check_floats("weight1", weight1, {width});
  task.bias1 = check_floats("bias1", bias1, {width});
  task.weight2 = check_floats("weight2", weight2, {width});
  task.bias2 = check_floats("bias2", bias2, {width});
  task.down_bias = check_floats("down_bias", down_bias, {width});
  check_size("down", down.size(0), task.dim);
  check_size("down", down.size(1), hidden);
  task.eps1 = static_cast<float>(eps1);
  task.eps2 = static_cast<float>(eps2);
  Aligned bias = widened_bias(check_floats("up_bias", up_bias, {hidden}), hidden);
  task.up_bias = bias.data();
  Tensor out = empty_on(x, {task.num_sets, task.dim}, ScalarType::Float);
  if (task.num_sets == 0) return out;
  const ScreenLoops loops = screen_loops();
  const PackedWeight first(loops, up), second(loops, down);
  task.up = first.packed;
  task.down = second.packed;
  task.out = static_cast<float*>(out.mutable_data_ptr());
  for_each_set_block(task, task.num_sets, kRowBlock / task.size, loops.readout);
  return out;
}

std::tuple<Tensor, Tensor> screen_cross_attention(
    const Tensor& sets, const Tensor& rows, const Tensor& genes, const Tensor& w, const Tensor& value, const Tensor& bias,
    const Tensor& add, const Tensor& change) {
  CrossAttention task = {};
  check_tensor("w", w, 3, {ScalarType::Float});
  check_tensor("value", value, 3, {ScalarType::Float, ScalarType::BFloat16});
  check_tensor("add", add, 2, {ScalarType::Float});
  task.heads = w.size(1);
  task.num_genes = w.size(2);
  STD_TORCH_CHECK(
      task.num_genes >= 1 && value.size(2) >= 2, "value: expected a gene and a feature at least, got shape ", shape_of(value));
  task.head_dim = value.size(2) - 1;
  const int64_t entries = add.size(0), dim = task.heads * task.head_dim;
  check_size("value", value.size(0), task.heads);
  check_size("value", value.size(1), task.num_genes);
  task.bfloat16 = in_bfloat16(value);
  task.w = floats_of(w);
  task.bias = check_floats("bias", bias, {task.heads, task.num_genes});
  task.add = check_floats("add", add, {entries, dim});
  task.change = check_floats("change", change, {entries, dim});
  task.sets = check_sets("sets", sets, entries);
  task.rows = check_sets("rows", rows, w.size(0));
  task.genes = check_sets("genes", genes, task.num_genes);
  task.num_sets = sets.size(0);
  task.size = sets.size(1);
  for (const Tensor* x : {&rows, &genes}) {
    check_size("sets", x->size(0), task.num_sets);
    check_size("sets", x->size(1), task.size);
  }
  Tensor out = empty_on(add, {task.num_sets, dim}, ScalarType::Float);
  Tensor total = empty_on(add, {task.num_sets, task.heads}, ScalarType::Float);
  if (out.numel() == 0) return {out, total};
  const ScreenLoops loops = screen_loops();
  const Tensor values = widened(value, ScalarType::Float);
  const int64_t each = task.packed_size();
  Aligned packed(task.heads * each);
  float* to = packed.data();
  for_each_task(task.heads, [&](int64_t h) {
    loops.pack_strips(task.bfloat16, floats_of(values) + h * each, task.num_genes, task.head_dim + 1, to + h * each);
  });
  task.packed = to;
  const std::vector<int64_t> slots = slots_of(task.rows, task.num_sets, task.size);
  task.slots = slots.data();
  task.out = static_cast<float*>(out.mutable_data_ptr());
  task.total = static_cast<float*>(total.mutable_data_ptr());
  for_each_set_block(task, static_cast<int64_t>(slots.size()), kSetBlock, loops.cross);
  return {out, total};
}

Tensor screen_mlp(const Tensor& x, const Tensor& up, const Tensor& up_bias, const Tensor& down) {
  Mlp task = {};
  check_tensor("x", x, 2, {ScalarType::Float});
  check_tensor("up", up, 2, {ScalarType::Float, ScalarType::BFloat16});
  task.bfloat16 = in_bfloat16(up);
  task.num_rows = x.size(0);
  task.dim = up.size(1);
  task.hidden = up.size(0);
  STD_TORCH_CHECK(task.dim >= 1 && task.hidden >= 1, "up: expected at least one row and column, got shape ", shape_of(up));
  task.x = check_floats("x", x, {task.num_rows, task.dim});
  Aligned bias = widened_bias(check_floats("up_bias", up_bias, {task.hidden}), task.hidden);
  task.up_bias = bias.data();
  task.down = check_floats("down", down, {task.hidden});
  Tensor out = empty_on(x, {task.num_rows}, ScalarType::Float);
  if (task.num_rows == 0) return out;
  const ScreenLoops loops = screen_loops();
  const PackedWeight packed(loops, up);
  task.up = packed.packed;
  task.out = static_cast<float*>(out.mutable_data_ptr());
  for_each_set_block(task, task.num_rows, kRowBlock, loops.mlp);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cellattn, CPU, m) {
  m.impl("screen_readout", TORCH_BOX(&screen_readout));
  m.impl("screen_cross_attention", TORCH_BOX(&screen_cross_attention));
  m.impl("screen_mlp", TORCH_BOX(&screen_mlp));
}

}  // namespace cellattn
