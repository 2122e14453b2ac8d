// Sets as words, words as masks, on CUDA. All of it is bound by the bytes of the larger side, the one it writes or (packing)
// reads: a warp moves 32 neighbouring bytes of a mask at a time, and partial sectors of neighbours meet in L2.

#include "masks.cuh"

namespace cellattn::cuda {
namespace {

// Bits of samples of the batch, in every word.
__global__ void __launch_bounds__(kThreads)
    fill_words_kernel(Word* words, int64_t size, int64_t num_words_all, int64_t num_sets) {
  const int64_t at = thread_index();
  if (at < size) words[at] = valid_bits(num_sets, at % num_words_all);
}

// A thread a seed. Words are touched as their 32-bit halves; ANDs and ORs commute, so the order of threads does not show.
__global__ void __launch_bounds__(kThreads) set_words_kernel(
    const int64_t* seeds, const int64_t* ptr, int64_t num_seeds, int64_t num_sets, int64_t num_nodes, int64_t num_words_all,
    bool complement, unsigned* halves) {
  const int64_t at = thread_index();
  if (at >= num_seeds) return;
  const int64_t b = set_of(ptr, num_sets, at), gene = seeds[at];
  if (at < ptr[b] || at >= ptr[b + 1] || !within(gene, num_nodes)) return;
  const unsigned bit = 1u << (b % 32);
  unsigned* half = halves + gene * num_words_all * 2 + b / 32;
  if (complement) {
    atomicAnd(half, ~bit);
  } else {
    atomicOr(half, bit);
  }
}

// Threads of a block: neighbouring rows, one word of them; blocks: first over words, which share their sectors.
struct Place {
  int64_t row, word;
};

__device__ Place place_of_thread(int64_t num_words_all) {
  const int64_t tile = blockIdx.x / num_words_all;
  return {tile * kThreads + threadIdx.x, blockIdx.x - tile * num_words_all};
}

__global__ void __launch_bounds__(kThreads) unpack_words_kernel(
    const Word* words, int64_t num_rows, int64_t num_words_all, int64_t num_sets, bool* keep) {
  const Place at = place_of_thread(num_words_all);
  if (at.row >= num_rows) return;
  const Word word = words[at.row * num_words_all + at.word];
  const int64_t first = at.word * kWordBits;
  const int size = static_cast<int>(num_sets - first < kWordBits ? num_sets - first : kWordBits);
  bool* out = keep + first * num_rows + at.row;
#pragma unroll 8
  for (int bit = 0; bit < size; ++bit) out[bit * num_rows] = has_bit(word, bit);
}

__global__ void __launch_bounds__(kThreads) pack_words_kernel(
    const uint8_t* keep, int64_t num_rows, int64_t num_words_all, int64_t num_sets, Word* words) {
  const Place at = place_of_thread(num_words_all);
  if (at.row >= num_rows) return;
  const int64_t first = at.word * kWordBits;
  const int size = static_cast<int>(num_sets - first < kWordBits ? num_sets - first : kWordBits);
  const uint8_t* in = keep + first * num_rows + at.row;
  Word word = 0;
#pragma unroll 8
  for (int bit = 0; bit < size; ++bit) word |= Word{in[bit * num_rows] != 0} << bit;
  words[at.row * num_words_all + at.word] = word;
}

// A warp: a row's edges, C words of each; lanes are C words times 32 / C edges, so that they write side by side.
template <int C>
__global__ void __launch_bounds__(kThreads) edge_words_kernel(
    const int64_t* rowptr, const int32_t* col, const Word* words, int64_t num_nodes, int64_t num_edges, int64_t num_words_all,
    Word* out) {
  constexpr int kSlots = kWarp / C;
  const int64_t i = warp_index();
  const int64_t w = int64_t{blockIdx.y} * C + lane_id() % C;
  if (i >= num_nodes || w >= num_words_all) return;
  const int64_t begin = clamped(rowptr[i], 0, num_edges), end = clamped(rowptr[i + 1], 0, num_edges);
  const Word mine = words[i * num_words_all + w];
  for (int64_t e = begin + lane_id() / C; e < end; e += kSlots) {
    const int32_t j = col[e];
    out[e * num_words_all + w] = is_gene(j, num_nodes) ? mine & words[j * num_words_all + w] : 0;
  }
}

Tensor set_words(const Tensor& seeds, const Tensor& ptr, int64_t num_nodes, bool complement) {
  check_ragged(seeds, ptr);
  STD_TORCH_CHECK(num_nodes >= 0 && num_nodes <= INT32_MAX, "num_nodes: expected 0 to 2147483647, got ", num_nodes);
  const OnDevice on(seeds);
  Tensor words = empty_on(seeds, {num_nodes, num_words(ptr.numel() - 1)}, ScalarType::Long);
  write_set_words(on, seeds, ptr, num_nodes, complement, words);
  return words;
}

Tensor unpack_words(const Tensor& words, int64_t num_sets) {
  check_words("words", words);
  check_num_sets(words, num_sets);
  const OnDevice on(words);
  const int64_t m = words.size(0), w = words.size(1);
  Tensor keep = empty_on(words, {num_sets, m}, ScalarType::Bool);
  launch(
      on, unpack_words_kernel, blocks_for(ceil_div(m, kThreads) * w, 1), 1, const_words_of(words), m, w, num_sets,
      static_cast<bool*>(keep.mutable_data_ptr()));
  return keep;
}

Tensor pack_words(const Tensor& keep) {
  check_tensor("keep", keep, 2, {ScalarType::Bool});
  const OnDevice on(keep);
  const int64_t num_sets = keep.size(0), m = keep.size(1), w = num_words(num_sets);
  Tensor words = empty_on(keep, {m, w}, ScalarType::Long);
  launch(
      on, pack_words_kernel, blocks_for(ceil_div(m, kThreads) * w, 1), 1, static_cast<const uint8_t*>(keep.const_data_ptr()),
      m, w, num_sets, words_of(words));
  return words;
}

Tensor edge_words(const Tensor& rowptr, const Tensor& col, const Tensor& words) {
  check_words("words", words);
  const int64_t n = words.size(0), w = words.size(1), num_edges = col.numel();
  check_size("relations of rowptr", check_stack(rowptr, col, n), 1);
  check_same_device("words", words, rowptr);
  const OnDevice on(rowptr);
  Tensor out = empty_on(words, {num_edges, w}, ScalarType::Long);
  const auto run = [&](auto* kernel, int64_t c) {
    launch(
        on, kernel, blocks_for_warps(n), ceil_div(w, c), longs_of(rowptr), ints_of(col), const_words_of(words), n, num_edges, w,
        words_of(out));
  };
  if (w <= 1) {
    run(edge_words_kernel<1>, 1);
  } else if (w <= 2) {
    run(edge_words_kernel<2>, 2);
  } else if (w <= 4) {
    run(edge_words_kernel<4>, 4);
  } else {
    run(edge_words_kernel<8>, 8);  // 64 bytes of a gene: whole sectors
  }
  return out;
}

}  // namespace

void write_set_words(
    const OnDevice& on, const Tensor& seeds, const Tensor& ptr, int64_t num_nodes, bool complement, const Tensor& words) {
  const int64_t num_sets = ptr.numel() - 1, w = num_words(num_sets), size = num_nodes * w;
  if (complement) {
    launch(on, fill_words_kernel, blocks_for_threads(size), 1, words_of(words), size, w, num_sets);
  } else {
    on.fill_bytes(words_of(words), 0, size * sizeof(Word));
  }
  if (size == 0) return;
  launch(
      on, set_words_kernel, blocks_for_threads(seeds.numel()), 1, longs_of(seeds), longs_of(ptr), seeds.numel(), num_sets,
      num_nodes, w, complement, reinterpret_cast<unsigned*>(words_of(words)));
}

STABLE_TORCH_LIBRARY_IMPL(cellattn, CUDA, m) {
  m.impl("set_words", TORCH_BOX(&set_words));
  m.impl("unpack_words", TORCH_BOX(&unpack_words));
  m.impl("pack_words", TORCH_BOX(&pack_words));
  m.impl("edge_words", TORCH_BOX(&edge_words));
}

}  // namespace cellattn::cuda
