// k-hop neighbourhoods of a whole batch at once, on CUDA: the pull of csrc/cpu/khop.cpp with a warp for each gene.
//
// Words are handled in chunks of C, kept side by side: states [chunk, relation, gene, C] (one state for all relations where
// hops mix them). A warp's lanes are C words times 32 / C edges; they OR the words of the gene's neighbours, then each other's.
// A hop reads one buffer and writes each word of another once, without atomics: the order of warps does not show.
//
// C is at most 8: 64 bytes of a gene, two whole sectors of a gather. More would save reading columns (4 bytes of 68), and cost
// edges in flight: a row of 3,600 edges is 900 steps of 4 edges at C = 8, four steps in flight, and 113 steps at C = 1. Such
// rows are not split: that would be a second pass over partial words, to save latency that other chunks of the launch cover,
// and that ends as soon as a row is full, as hubs are first. Chunks share a launch as far as their states stay within
// kStateBytes: enough warps to fill the device, little enough to stay in L2, and bounded memory for any batch.
//
// How many hops change something is known on the device alone. Each hop sets a flag for each chunk that it changed, and a hop
// after one that changed nothing returns at once: both buffers hold the same then, so either is the result.

#include "masks.cuh"

namespace cellattn::cuda {
namespace {

constexpr int64_t kStateBytes = 32 << 20;
constexpr int kPullBlocks = 5;  // a multiprocessor, said so that the compiler does not spill for the sake of a sixth

// The edges along which a traversal pulls: from row i of `ptr` to the genes that i is reached from.
struct Side {
  const int64_t* ptr;
  const int32_t* col;
  int64_t num_edges;
};

struct Traversal {
  int64_t num_nodes, num_relations, num_states, num_sets, num_words;
  int64_t first_word;  // of the launch's first chunk
  int num_sides;
  Side sides[2];
};

struct Hop {
  const Word* now;
  Word* next;
  const int* changed_before;  // [chunk]
  volatile int* changed;      // written by many warps at once, which the memory model allows of volatile accesses alone
};

// Each lane's word together with those of the lanes that hold the same word of other edges.
template <int C>
__device__ __forceinline__ Word or_over_slots(Word x) {
#pragma unroll
  for (int step = C; step < kWarp; step *= 2) x |= __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// acc |= the words of a row's neighbours, the same in every slot in the end; whether a further row could add anything.
template <int C>
__device__ bool pull_row(const Side& side, int64_t row, const Word* state, int64_t num_nodes, Word full, Word& acc) {
  constexpr int kSlots = kWarp / C, kUnroll = 4, kStepsToLook = 8;
  const int c = lane_id() % C, slot = lane_id() / C;
  int64_t begin = clamped(side.ptr[row], 0, side.num_edges);
  const int64_t end = clamped(side.ptr[row + 1], 0, side.num_edges);
  for (int steps = 1; begin < end; begin += kUnroll * kSlots, ++steps) {
    int32_t j[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t e = begin + u * kSlots + slot;
      j[u] = e < end ? side.col[e] : -1;
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (is_gene(j[u], num_nodes)) acc |= state[int64_t{j[u]} * C + c];
    }
    if (steps % kStepsToLook == 0 && __all_sync(kAllLanes, or_over_slots<C>(acc) == full)) break;
  }
  acc = or_over_slots<C>(acc);
  return !__all_sync(kAllLanes, acc == full);
}

// One hop. grid: rows of a chunk's states, chunks.
template <int C>
__global__ void __launch_bounds__(kThreads, kPullBlocks)
    khop_pull_kernel(const __grid_constant__ Traversal t, const __grid_constant__ Hop hop) {
  const int64_t chunk = blockIdx.y;
  if (hop.changed_before[chunk] == 0) return;
  const int64_t num_rows = t.num_states * t.num_nodes, row = warp_index();
  if (row >= num_rows) return;
  const int c = lane_id() % C;
  const int64_t gene = row % t.num_nodes;
  const Word* states = hop.now + chunk * num_rows * C;
  const Word* state = states + (row - gene) * C;
  const Word full = valid_bits(t.num_sets, t.first_word + chunk * C + c);
  const Word before = states[row * C + c];
  Word acc = before;
  bool more = !__all_sync(kAllLanes, acc == full);
  const int64_t num_pulled = t.num_states == t.num_relations ? 1 : t.num_relations;
  for (int64_t r = 0; more && r < num_pulled; ++r) {
    for (int s = 0; more && s < t.num_sides; ++s) {
      more = pull_row<C>(t.sides[s], row + r * t.num_nodes, state, t.num_nodes, full, acc);
    }
  }
  if (lane_id() < C) hop.next[(chunk * num_rows + row) * C + c] = acc;
  // Every warp would store the same 1: a look first keeps them from queueing up for it.
  if (__any_sync(kAllLanes, acc != before) && lane_id() == 0 && hop.changed[chunk] == 0) hop.changed[chunk] = 1;
}

// The seeds of each chunk as the first states of all its relations. grid: words of a chunk's states, chunks.
template <int C>
__global__ void __launch_bounds__(kThreads)
    khop_begin_kernel(const __grid_constant__ Traversal t, const Word* words, Word* state) {
  const int64_t size = t.num_states * t.num_nodes * C, at = thread_index();
  if (at >= size) return;
  const int64_t gene = at / C % t.num_nodes, w = t.first_word + int64_t{blockIdx.y} * C + at % C;
  state[blockIdx.y * size + at] = w < t.num_words ? words[gene * t.num_words + w] : 0;
}

// The union of a chunk's states, which hold the seeds too. grid: words of a state, chunks.
template <int C>
__global__ void __launch_bounds__(kThreads)
    khop_end_kernel(const __grid_constant__ Traversal t, const Word* state, Word* words) {
  const int64_t size = t.num_nodes * C, at = thread_index();
  const int64_t w = t.first_word + int64_t{blockIdx.y} * C + at % C;
  if (at >= size || w >= t.num_words) return;
  Word all = 0;
  for (int64_t s = 0; s < t.num_states; ++s) all |= state[(blockIdx.y * t.num_states + s) * size + at];
  words[at / C * t.num_words + w] = all;
}

// `words` holds the seeds, and the result afterwards.
template <int C>
void traverse(const OnDevice& on, Traversal t, int64_t num_hops, const Tensor& words) {
  const int64_t num_chunks = ceil_div(t.num_words, C), size = t.num_states * t.num_nodes * C;
  const int64_t fitting = kStateBytes / (2 * size * static_cast<int64_t>(sizeof(Word)));
  const int64_t layers = std::min({num_chunks, std::max<int64_t>(1, fitting), kMaxLayers});
  const Tensor states = empty_on(words, {2, layers * size}, ScalarType::Long);
  const Tensor flags = empty_on(words, {num_hops + 1, layers}, ScalarType::Int);
  int* changed = static_cast<int*>(flags.mutable_data_ptr());
  const int64_t flag_bytes = layers * static_cast<int64_t>(sizeof(int));
  for (int64_t chunk = 0; chunk < num_chunks; chunk += layers) {
    const int64_t now_chunks = std::min(layers, num_chunks - chunk);
    Word* now = words_of(states);
    Word* next = now + layers * size;
    t.first_word = chunk * C;
    on.fill_bytes(changed, 1, flag_bytes);  // before the first hop
    on.fill_bytes(changed + layers, 0, num_hops * flag_bytes);
    launch(on, khop_begin_kernel<C>, blocks_for_threads(size), now_chunks, t, const_words_of(words), now);
    for (int64_t h = 0; h < num_hops; ++h, std::swap(now, next)) {
      const Hop hop{now, next, changed + h * layers, changed + (h + 1) * layers};
      launch(on, khop_pull_kernel<C>, blocks_for_warps(t.num_states * t.num_nodes), now_chunks, t, hop);
    }
    launch(on, khop_end_kernel<C>, blocks_for_threads(t.num_nodes * C), now_chunks, t, now, words_of(words));
  }
}

Tensor khop_words(
    const Tensor& rowptr, const Tensor& col, const Tensor& colptr, const Tensor& row, const Tensor& seeds,
    const Tensor& ptr, int64_t num_nodes, int64_t num_hops, bool mixed, bool incoming, bool outgoing) {
  const int64_t num_relations =
      check_khop_words(rowptr, col, colptr, row, seeds, ptr, num_nodes, num_hops, incoming, outgoing);
  const OnDevice on(rowptr);
  Traversal t = {};
  t.num_nodes = num_nodes;
  t.num_relations = num_relations;
  t.num_states = mixed ? 1 : num_relations;
  t.num_sets = ptr.numel() - 1;
  t.num_words = num_words(t.num_sets);
  if (incoming) t.sides[t.num_sides++] = {longs_of(rowptr), ints_of(col), col.numel()};
  if (outgoing) t.sides[t.num_sides++] = {longs_of(colptr), ints_of(row), row.numel()};

  const Tensor words = empty_on(rowptr, {num_nodes, t.num_words}, ScalarType::Long);
  write_set_words(on, seeds, ptr, num_nodes, false, words);
  if (num_hops == 0 || num_relations == 0 || t.num_words == 0) return words;
  const int64_t hops = std::min(num_hops, num_nodes);  // no path without a cycle is longer
  if (t.num_words == 1) {
    traverse<1>(on, t, hops, words);
  } else if (t.num_words == 2) {
    traverse<2>(on, t, hops, words);
  } else if (t.num_words <= 4) {
    traverse<4>(on, t, hops, words);
  } else {
    traverse<8>(on, t, hops, words);
  }
  return words;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cellattn, CUDA, m) { m.impl("khop_words", TORCH_BOX(&khop_words)); }

}  // namespace cellattn::cuda
