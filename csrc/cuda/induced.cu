// Induced subgraphs of a batch on CUDA: sizes, then nodes and edges.
//
// Work is cut by edges alone: a warp takes a tile of kTile neighbouring edges of a relation and 64 samples (a word of the
// sets), whatever rows they belong to, so that genes with one edge and hubs with thousands cost the same an edge. How many
// tiles there are is known from shapes, E / kTile + K at most; where each relation's begin is worked out on the device.
//
//   1. Count: an edge's word is words[i] & words[j]; 32 of them, transposed as bits over the warp, are a mask for each sample,
//      whose population is its number of edges.
//   2. One prefix sum over the counts in order (relation, sample, tile), in 64 bits: where each tile of each sample begins.
//   3. Write: for each sample in turn, lanes with an edge in it take places in the order of lanes, so edges come out sorted by
//      (sample, source, target). A gene's number within a sample is what stands before it: rank [B, N / 32], the 32 bits
//      of a block of genes and the count before them, is made from the words and small enough to stay in L1.
//
// Bytes decide the time: 24 an edge and sample written (int64 COO with ids; 4 at the least, int32 CSR), against which a step of
// 32 edges reads 128 bytes of columns once for 64 samples, and words and ranks out of L1 and L2. A store covers the kept of 32
// edges of one sample, up to 256 consecutive bytes; what a tile leaves of a sector at either end its neighbour, a warp of the
// same block, fills, and L2 puts them together. A step takes some 80 instructions a sample for int64 COO with ids and 60 for
// int32 CSR (counted in the machine code of sm_80): by the chips' figures less than the stores of the former take, and more
// than those of the latter. Neither was timed.

#include <cstddef>

#include "scan.cuh"

namespace cellattn::cuda {
namespace {

constexpr int64_t kTile = 128;     // edges
constexpr int64_t kBlock = kWarp;  // genes of an entry of `rank`
constexpr int kWriteBlocks = 4;    // a multiprocessor, said so that the compiler does not spill for the sake of a fifth

struct Rank {
  unsigned bits;    // which genes of the block are in the sample
  unsigned before;  // how many genes of the sample are in earlier blocks
};

// The stack and the sets. `offsets` of the kernels: the genes of each sample, then the edges of each (relation, sample, tile);
// counts at first, then what stands before each of them.
struct Problem {
  const int64_t* rowptr;
  const int32_t* col;
  const Word* words;
  int64_t num_nodes, num_relations, num_edges, num_sets, num_words;
  int64_t max_tiles;          // room for tiles
  const int64_t* first_tile;  // [K + 1]
  const Rank* rank;           // [num_sets, num_blocks]
  int64_t num_blocks;
};

// Up to 64 numbers of the host, on their way to the device as arguments of a kernel: a copy would not outlive a capture.
struct Numbers {
  static constexpr int64_t kSize = 64;
  int64_t value[kSize];
};

__global__ void __launch_bounds__(kThreads) put_kernel(const __grid_constant__ Numbers numbers, int64_t size, int64_t* out) {
  if (threadIdx.x < size) out[threadIdx.x] = numbers.value[threadIdx.x];
}

// ---------------------------------------------------------------------------------------------------------- tiles

__device__ __forceinline__ int64_t relation_begin(const Problem& p, int64_t r) {
  return clamped(p.rowptr[r * p.num_nodes], 0, p.num_edges);
}

// first_tile [K + 1], by one warp: the tiles of the relations before each. grid: one block.
__global__ void __launch_bounds__(kThreads) first_tile_kernel(const __grid_constant__ Problem p, int64_t* first_tile) {
  if (threadIdx.x >= kWarp) return;
  const int lane = lane_id();
  int64_t before = 0;
  for (int64_t base = 0; base < p.num_relations; base += kWarp) {
    const int64_t r = base + lane;
    int64_t sum = 0;
    if (r < p.num_relations) {
      const int64_t size = relation_begin(p, r + 1) - relation_begin(p, r);
      sum = size > 0 ? ceil_div(size, kTile) : 0;
    }
    const int64_t mine = sum;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int64_t other = __shfl_up_sync(kAllLanes, sum, step);
      if (lane >= step) sum += other;
    }
    if (r < p.num_relations) first_tile[r] = clamped(before + sum - mine, 0, p.max_tiles);
    before += __shfl_sync(kAllLanes, sum, kWarp - 1);
  }
  if (lane == 0) first_tile[p.num_relations] = clamped(before, 0, p.max_tiles);
}

// What a warp works on: a tile of a relation, for the samples of a word.
struct Tile {
  int64_t relation, index, num_tiles;  // of the relation, the tile being number `index`
  int64_t relation_begin, begin, end;  // edges of the stack
};

// False where there is no such tile.
__device__ bool tile_of(const Problem& p, int64_t number, Tile& tile) {
  if (number >= p.first_tile[p.num_relations]) return false;
  tile.relation = set_of(p.first_tile, p.num_relations, number);
  const int64_t first = p.first_tile[tile.relation];
  tile.index = number - first;
  tile.num_tiles = p.first_tile[tile.relation + 1] - first;
  tile.relation_begin = relation_begin(p, tile.relation);
  tile.begin = tile.relation_begin + tile.index * kTile;
  const int64_t end = relation_begin(p, tile.relation + 1);
  tile.end = tile.begin + kTile < end ? tile.begin + kTile : end;
  return tile.index >= 0 && tile.index < tile.num_tiles;
}

// Where in `offsets` tile 0 of sample 0 of a relation, and a tile of a sample, have their entries.
__device__ __forceinline__ int64_t first_entry(const Problem& p, int64_t r) {
  return p.num_sets * (1 + p.first_tile[r]);
}
__device__ __forceinline__ int64_t entry_of(const Problem& p, int64_t r, int64_t b, int64_t index, int64_t num_tiles) {
  return first_entry(p, r) + b * num_tiles + index;
}

// Rows of edges [begin, end) of a relation, by every lane at once.
struct Rows {
  const int64_t* rowptr;  // of the relation, stacked numbering
  int64_t low, size;

  __device__ Rows(const Problem& p, int64_t r, int64_t begin, int64_t end) : rowptr(p.rowptr + r * p.num_nodes) {
    const int64_t mine = set_of(rowptr, p.num_nodes, lane_id() == 0 ? begin : end - 1);
    low = __shfl_sync(kAllLanes, mine, 0);
    size = __shfl_sync(kAllLanes, mine, 1) - low + 1;
  }

  __device__ int64_t of(int64_t edge) const { return low + set_of(rowptr + low, size, edge); }
};

// ---------------------------------------------------------------------------------------------------------- sizes

// rank[b].bits of 64 samples and a block of genes, a warp: the words' bits, transposed. grid: blocks of genes, words.
__global__ void __launch_bounds__(kThreads) rank_bits_kernel(const __grid_constant__ Problem p, Rank* rank) {
  const int64_t w = blockIdx.y, q = warp_index(), gene = q * kBlock + lane_id();
  if (q >= p.num_blocks) return;
  const Word word = gene < p.num_nodes ? p.words[gene * p.num_words + w] : 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const unsigned bits = transposed_bits(static_cast<unsigned>(word >> (32 * half)));
    const int64_t b = w * kWordBits + half * 32 + lane_id();
    if (b < p.num_sets) rank[b * p.num_blocks + q].bits = bits;
  }
}

// rank[b].before of a sample, a warp; the sample's number of genes too, where it is asked for.
__global__ void __launch_bounds__(kThreads)
    rank_before_kernel(const __grid_constant__ Problem p, Rank* rank, int64_t* num_genes) {
  const int64_t b = warp_index();
  if (b >= p.num_sets) return;
  const int lane = lane_id();
  Rank* mine = rank + b * p.num_blocks;
  unsigned before = 0;
  for (int64_t base = 0; base < p.num_blocks; base += kWarp) {
    const int64_t q = base + lane;
    const unsigned count = q < p.num_blocks ? __popc(mine[q].bits) : 0;
    unsigned sum = count;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const unsigned other = __shfl_up_sync(kAllLanes, sum, step);
      if (lane >= step) sum += other;
    }
    if (q < p.num_blocks) mine[q].before = before + sum - count;
    before += __shfl_sync(kAllLanes, sum, kWarp - 1);
  }
  if (lane == 0 && num_genes != nullptr) num_genes[b] = before;
}

struct Counts {
  unsigned low, high;  // of samples `lane` and `lane + 32` of a word
};

__device__ Counts count_edges(const Problem& p, int64_t r, int64_t begin, int64_t end, int64_t w) {
  const Rows rows(p, r, begin, end);
  Counts counts = {0, 0};
  for (int64_t base = begin; base < end; base += kWarp) {
    const int64_t e = base + lane_id();
    const int32_t j = e < end ? p.col[e] : -1;
    const Word word = is_gene(j, p.num_nodes) ? p.words[rows.of(e) * p.num_words + w] & p.words[j * p.num_words + w] : 0;
    counts.low += __popc(transposed_bits(static_cast<unsigned>(word)));
    counts.high += __popc(transposed_bits(static_cast<unsigned>(word >> 32)));
  }
  return counts;
}

// grid: tiles, words.
__global__ void __launch_bounds__(kThreads) induced_count_kernel(const __grid_constant__ Problem p, int64_t* offsets) {
  const int64_t w = blockIdx.y;
  Tile tile;
  if (!tile_of(p, warp_index(), tile)) return;
  const Counts counts = count_edges(p, tile.relation, tile.begin, tile.end, w);
  const int64_t b = w * kWordBits + lane_id();
  if (b < p.num_sets) offsets[entry_of(p, tile.relation, b, tile.index, tile.num_tiles)] = counts.low;
  if (b + 32 < p.num_sets) offsets[entry_of(p, tile.relation, b + 32, tile.index, tile.num_tiles)] = counts.high;
}

// node_ptr [B + 1] and edge_ptr [K, B + 1] from the summed offsets, a thread an entry.
__global__ void __launch_bounds__(kThreads) induced_ptr_kernel(
    const __grid_constant__ Problem p, const int64_t* offsets, int64_t* node_ptr, int64_t* edge_ptr) {
  const int64_t at = thread_index(), size = p.num_sets + 1;
  if (at >= size * (p.num_relations + 1)) return;
  const int64_t r = at / size - 1, b = at - (r + 1) * size;
  if (r < 0) {
    node_ptr[b] = offsets[b];
  } else {
    const int64_t num_tiles = p.first_tile[r + 1] - p.first_tile[r];
    edge_ptr[r * size + b] = offsets[entry_of(p, r, b, 0, num_tiles)] - offsets[first_entry(p, r)];
  }
}

// -------------------------------------------------------------------------------------------------------- writing

struct Output {
  const int64_t* node_ptr;
  const int64_t* edge_ptr;
  const int64_t* offsets;
  const Word* seed_words;
  const int64_t* first_edge;  // [K + 1]: where each relation's places for edges begin
  int64_t num_places;         // for genes
  void* node;
  bool* seed_mask;
  void* edge_index;
  void* edge_id;
  void* csr_rowptr;
};

// A gene's entry of `rank` and the bits below its own: worked out once for 64 samples.
struct Spot {
  unsigned block, below;

  __device__ explicit Spot(int64_t gene)
      : block(static_cast<unsigned>(gene / kBlock)), below(bits_below(static_cast<int>(gene % kBlock))) {}

  // The gene's number within a sample that it is in.
  __device__ unsigned rank_in(const Rank* ranks) const {
    const Rank rank = ranks[block];
    return rank.before + __popc(rank.bits & below);
  }
};

__device__ __forceinline__ const Rank* ranks_of(const Problem& p, int64_t b) {
  // Both factors fit 32 bits, which makes this one multiplication.
  return p.rank + int64_t{static_cast<unsigned>(b)} * static_cast<unsigned>(p.num_blocks);
}

// Genes of a block in a sample, a warp. grid: blocks of genes times samples.
template <class T>
__global__ void __launch_bounds__(kThreads)
    induced_nodes_kernel(const __grid_constant__ Problem p, const __grid_constant__ Output out) {
  const int64_t task = warp_index(), b = task / p.num_blocks;
  if (b >= p.num_sets) return;
  const int64_t q = task - b * p.num_blocks, gene = q * kBlock + lane_id();
  const Rank rank = p.rank[task];
  if (gene >= p.num_nodes || ((rank.bits >> lane_id()) & 1) == 0) return;
  const int64_t place = out.node_ptr[b] + rank.before + __popc(rank.bits & bits_below(lane_id()));
  if (!within(place, out.num_places)) return;
  static_cast<T*>(out.node)[place] = static_cast<T>(gene);
  out.seed_mask[place] = has_bit(out.seed_words[gene * p.num_words + b / kWordBits], static_cast<int>(b % kWordBits));
}

// The edges of a tile, for the samples of a word, a warp. grid: tiles, words.
template <class T, bool HasSource, bool HasId>
__global__ void __launch_bounds__(kThreads, kWriteBlocks)
    induced_edges_kernel(const __grid_constant__ Problem p, const __grid_constant__ Output out) {
  const int64_t w = blockIdx.y;
  Tile tile;
  if (!tile_of(p, warp_index(), tile)) return;
  const int lane = lane_id();
  const Rows rows(p, tile.relation, tile.begin, tile.end);
  const Word valid = valid_bits(p.num_sets, w);
  const int64_t first = out.first_edge[tile.relation], capacity = out.first_edge[tile.relation + 1] - first;
  T* const source = HasSource ? static_cast<T*>(out.edge_index) + 2 * first : nullptr;
  T* const target = HasSource ? source + capacity : static_cast<T*>(out.edge_index) + first;
  T* const id = HasId ? static_cast<T*>(out.edge_id) + first : nullptr;
  T* const row_begins = HasSource ? nullptr : static_cast<T*>(out.csr_rowptr) + tile.relation * (out.num_places + 1);

  // Where the next edges of samples `lane` and `lane + 32` go, within the relation.
  int64_t position[2] = {0, 0};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t b = w * kWordBits + half * 32 + lane;
    if (b < p.num_sets) {
      position[half] = out.offsets[entry_of(p, tile.relation, b, tile.index, tile.num_tiles)] -
                       out.offsets[first_entry(p, tile.relation)];
    }
  }

  for (int64_t base = tile.begin; base < tile.end; base += kWarp) {
    const int64_t e = base + lane;
    const bool inside = e < tile.end;
    const int32_t j = inside ? p.col[e] : -1;
    const int64_t i = inside ? rows.of(e) : 0;
    const Word word_i = inside ? p.words[i * p.num_words + w] & valid : 0;
    const Word word = is_gene(j, p.num_nodes) ? word_i & p.words[j * p.num_words + w] : 0;
    const bool begins_row = !HasSource && inside && rows.rowptr[i] == e;
    const Spot spot_i(i), spot_j(word != 0 ? j : 0);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned kept_in = static_cast<unsigned>(word >> (32 * half));
      const unsigned row_in = begins_row ? static_cast<unsigned>(word_i >> (32 * half)) : 0;
      for (unsigned left = __reduce_or_sync(kAllLanes, kept_in | row_in); left != 0; left &= left - 1) {
        const int s = __ffs(static_cast<int>(left)) - 1;
        const int64_t b = w * kWordBits + half * 32 + s, node_begin = out.node_ptr[b];
        const Rank* ranks = ranks_of(p, b);
        const bool kept = (kept_in >> s) & 1;
        const unsigned mask = __ballot_sync(kAllLanes, kept);
        const int64_t at = __shfl_sync(kAllLanes, position[half], s) + __popc(mask & bits_below(lane));
        if (kept && within(at, capacity)) {
          target[at] = static_cast<T>(node_begin) + static_cast<T>(spot_j.rank_in(ranks));
          if (HasSource) source[at] = static_cast<T>(node_begin) + static_cast<T>(spot_i.rank_in(ranks));
          if (HasId) id[at] = static_cast<T>(e - tile.relation_begin);
        }
        if (!HasSource && ((row_in >> s) & 1) != 0) {
          const int64_t place = node_begin + spot_i.rank_in(ranks);
          if (within(place, out.num_places)) row_begins[place] = static_cast<T>(at);
        }
        if (lane == s) position[half] += __popc(mask);
      }
    }
  }
}

// Where rows without edges begin, a warp a row of the stack and a word: what its tile had before it is counted again, so that
// no thread has to walk over a run of such rows. grid: rows of the stack, words.
template <class T>
__global__ void __launch_bounds__(kThreads)
    empty_rows_kernel(const __grid_constant__ Problem p, const __grid_constant__ Output out) {
  const int64_t row = warp_index(), w = blockIdx.y;
  if (row >= p.num_relations * p.num_nodes || p.rowptr[row] != p.rowptr[row + 1]) return;
  const int64_t r = row / p.num_nodes, i = row - r * p.num_nodes;
  const Word word = p.words[i * p.num_words + w] & valid_bits(p.num_sets, w);
  if (word == 0) return;
  const int64_t begin = relation_begin(p, r), end = relation_begin(p, r + 1), e = clamped(p.rowptr[row], begin, end);
  const int64_t num_tiles = p.first_tile[r + 1] - p.first_tile[r], index = (e - begin) / kTile;
  const bool past = e >= end || index >= num_tiles;  // no edge of the relation comes after the row
  const Counts counts = past ? Counts{0, 0} : count_edges(p, r, begin + index * kTile, e, w);
  T* row_begins = static_cast<T*>(out.csr_rowptr) + r * (out.num_places + 1);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int s = half * 32 + lane_id();
    if (!has_bit(word, s)) continue;
    const int64_t b = w * kWordBits + s;
    const int64_t place = out.node_ptr[b] + Spot(i).rank_in(ranks_of(p, b));
    if (!within(place, out.num_places)) continue;
    const int64_t position = past ? out.edge_ptr[r * (p.num_sets + 1) + b + 1]
                                  : out.offsets[entry_of(p, r, b, index, num_tiles)] - out.offsets[first_entry(p, r)] +
                                        (half == 0 ? counts.low : counts.high);
    row_begins[place] = static_cast<T>(position);
  }
}

// Places past the last gene hold the number of edges. grid: relations times (places + 1).
template <class T>
__global__ void __launch_bounds__(kThreads)
    rest_of_rowptr_kernel(const __grid_constant__ Problem p, const __grid_constant__ Output out) {
  const int64_t at = thread_index(), size = out.num_places + 1, r = at / size;
  if (r >= p.num_relations || at - r * size < clamped(out.node_ptr[p.num_sets], 0, out.num_places)) return;
  static_cast<T*>(out.csr_rowptr)[at] = static_cast<T>(out.edge_ptr[r * (p.num_sets + 1) + p.num_sets]);
}

// ------------------------------------------------------------------------------------------------------- operators

int64_t max_tiles(int64_t num_edges, int64_t num_relations) {
  return num_relations == 0 ? 0 : num_edges / kTile + num_relations;
}

// Rows of `offsets` [rows, B]: nodes, a row a tile, and one whose first entry is the end.
int64_t offset_rows(int64_t num_tiles) { return num_tiles + 2; }

// A problem with its tiles; `fill_ranks` adds the ranks.
Problem problem_of(
    const OnDevice& on, const Tensor& rowptr, const Tensor& col, const Tensor& words, int64_t num_relations, int64_t num_sets,
    const Tensor& first_tile) {
  Problem p = {};
  p.rowptr = longs_of(rowptr);
  p.col = ints_of(col);
  p.words = const_words_of(words);
  p.num_nodes = words.size(0);
  p.num_relations = num_relations;
  p.num_edges = col.numel();
  p.num_sets = num_sets;
  p.num_words = words.size(1);
  p.max_tiles = max_tiles(p.num_edges, num_relations);
  p.num_blocks = ceil_div(p.num_nodes, kBlock);
  p.first_tile = longs_of(first_tile);
  launch(on, first_tile_kernel, 1, 1, p, first_tile.mutable_data_ptr<int64_t>());
  return p;
}

// Room for ranks: as int64, 8 bytes each.
Tensor empty_ranks(const Tensor& words, int64_t num_sets) {
  static_assert(sizeof(Rank) == sizeof(int64_t) && offsetof(Rank, before) == 4);
  return empty_on(words, {num_sets, ceil_div(words.size(0), kBlock)}, ScalarType::Long);
}

void fill_ranks(const OnDevice& on, Problem& p, const Tensor& ranks, int64_t* num_genes) {
  Rank* rank = static_cast<Rank*>(ranks.mutable_data_ptr());
  launch(on, rank_bits_kernel, blocks_for_warps(p.num_blocks), p.num_words, p, rank);
  launch(on, rank_before_kernel, blocks_for_warps(p.num_sets), 1, p, rank, num_genes);
  p.rank = rank;
}

std::tuple<Tensor, Tensor, Tensor> induced_sizes(
    const Tensor& rowptr, const Tensor& col, const Tensor& words, int64_t num_sets) {
  check_words("words", words);
  check_num_sets(words, num_sets);
  const int64_t num_relations = check_stack(rowptr, col, words.size(0));
  check_same_device("words", words, rowptr);
  const OnDevice on(rowptr);
  const int64_t rows = offset_rows(max_tiles(col.numel(), num_relations));
  Tensor node_ptr = empty_on(words, {num_sets + 1}, ScalarType::Long);
  Tensor edge_ptr = empty_on(words, {num_relations, num_sets + 1}, ScalarType::Long);
  Tensor offsets = empty_on(words, {rows, num_sets}, ScalarType::Long);
  if (num_sets == 0) {
    on.fill_bytes(node_ptr.mutable_data_ptr(), 0, sizeof(int64_t));
    on.fill_bytes(edge_ptr.mutable_data_ptr(), 0, edge_ptr.numel() * sizeof(int64_t));
    return {node_ptr, edge_ptr, offsets};
  }
  int64_t* counts = offsets.mutable_data_ptr<int64_t>();
  const Tensor first_tile = empty_on(words, {num_relations + 1}, ScalarType::Long);
  const Tensor ranks = empty_ranks(words, num_sets);
  Problem p = problem_of(on, rowptr, col, words, num_relations, num_sets, first_tile);
  on.fill_bytes(counts, 0, offsets.numel() * sizeof(int64_t));
  fill_ranks(on, p, ranks, counts);
  launch(on, induced_count_kernel, blocks_for_warps(p.max_tiles), p.num_words, p, counts);
  exclusive_sum(on, offsets);
  launch(
      on, induced_ptr_kernel, blocks_for_threads((num_sets + 1) * (num_relations + 1)), 1, p, counts,
      node_ptr.mutable_data_ptr<int64_t>(), edge_ptr.mutable_data_ptr<int64_t>());
  return {node_ptr, edge_ptr, offsets};
}

template <class T>
void write(const OnDevice& on, const Problem& p, const Output& out) {
  const int64_t blocks = blocks_for_warps(p.max_tiles);
  launch(on, induced_nodes_kernel<T>, blocks_for_warps(p.num_blocks * p.num_sets), 1, p, out);
  if (out.csr_rowptr == nullptr) {
    const auto kernel = out.edge_id ? induced_edges_kernel<T, true, true> : induced_edges_kernel<T, true, false>;
    launch(on, kernel, blocks, p.num_words, p, out);
    return;
  }
  const auto kernel = out.edge_id ? induced_edges_kernel<T, false, true> : induced_edges_kernel<T, false, false>;
  launch(on, kernel, blocks, p.num_words, p, out);
  const int64_t num_rows = p.num_relations * p.num_nodes;
  launch(on, empty_rows_kernel<T>, blocks_for_warps(num_rows), p.num_words, p, out);
  launch(on, rest_of_rowptr_kernel<T>, blocks_for_threads(p.num_relations * (out.num_places + 1)), 1, p, out);
}

void induced_write(
    const Tensor& rowptr, const Tensor& col, const Tensor& words, const Tensor& seed_words, const Tensor& node_ptr,
    const Tensor& edge_ptr, const Tensor& offsets, Tensor node, Tensor seed_mask, Tensor edge_index,
    std::optional<Tensor> edge_id, std::optional<Tensor> csr_rowptr, std::vector<int64_t> edge_capacity) {
  const Induced about = check_induced_write(
      rowptr, col, words, seed_words, node_ptr, edge_ptr, offsets, node, seed_mask, edge_index, edge_id, csr_rowptr,
      edge_capacity);
  const int64_t num_relations = about.num_relations;
  check_size("offsets", offsets.size(0), offset_rows(max_tiles(col.numel(), num_relations)));
  const OnDevice on(rowptr);

  const Tensor first_tile = empty_on(words, {num_relations + 1}, ScalarType::Long);
  const Tensor first_edge = empty_on(words, {num_relations + 1}, ScalarType::Long);
  const Tensor ranks = empty_ranks(words, about.num_sets);
  Problem p = problem_of(on, rowptr, col, words, num_relations, about.num_sets, first_tile);
  fill_ranks(on, p, ranks, nullptr);
  int64_t sum = 0;
  for (int64_t base = 0; base <= num_relations; base += Numbers::kSize) {
    const int64_t size = std::min(Numbers::kSize, num_relations + 1 - base);
    Numbers numbers = {};
    for (int64_t k = 0; k < size; ++k) {
      numbers.value[k] = sum;
      if (base + k < num_relations) sum += edge_capacity[base + k];
    }
    launch(on, put_kernel, 1, 1, numbers, size, first_edge.mutable_data_ptr<int64_t>() + base);
  }

  Output out = {};
  out.node_ptr = longs_of(node_ptr);
  out.edge_ptr = longs_of(edge_ptr);
  out.offsets = longs_of(offsets);
  out.seed_words = const_words_of(seed_words);
  out.first_edge = longs_of(first_edge);
  out.num_places = about.num_places;
  out.node = node.mutable_data_ptr();
  out.seed_mask = static_cast<bool*>(seed_mask.mutable_data_ptr());
  out.edge_index = edge_index.mutable_data_ptr();
  if (edge_id) out.edge_id = edge_id->mutable_data_ptr();
  if (csr_rowptr) out.csr_rowptr = csr_rowptr->mutable_data_ptr();
  about.wide ? write<int64_t>(on, p, out) : write<int32_t>(on, p, out);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cellattn, CUDA, m) {
  m.impl("induced_sizes", TORCH_BOX(&induced_sizes));
  m.impl("induced_write", TORCH_BOX(&induced_write));
}

}  // namespace cellattn::cuda
