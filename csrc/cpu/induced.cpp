// Induced subgraphs of a batch on the CPU: sizes, then nodes and edges. The inner loops are in induced_impl.h.

#include "induced.h"

#include <memory>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "isa.h"
#include "values.h"

namespace cellattn {
namespace {

// The loops for this processor, and what they want of the rank table.
struct Loops {
  decltype(&portable::count_edges) count_edges = &portable::count_edges;
  decltype(&portable::write_edges32) write_edges32 = &portable::write_edges32;
  decltype(&portable::write_edges64) write_edges64 = &portable::write_edges64;
  int64_t group = 16;    // samples
  bool narrow = false;  // 16-bit ranks
};

Loops loops_for(int64_t num_nodes) {
  Loops loops;
#if defined(__x86_64__)
  if (use_avx512()) {
    loops.count_edges = &avx512::count_edges;
    if (__builtin_cpu_supports("avx512vbmi2") && num_nodes <= INT16_MAX) {
      loops.write_edges32 = &avx512::write_edges32;
      loops.write_edges64 = &avx512::write_edges64;
      loops.group = 32;
      loops.narrow = true;
    }
  }
#endif
  return loops;
}

// Whether the AVX-512 loops would write the edges of a graph of so many genes, for those who measure them.
bool induced_avx512(int64_t num_nodes) { return loops_for(num_nodes).narrow; }

// Whole rows, about kChunkEdges edges each: what a task reads, and what edge counts are kept for.
std::vector<RowChunk> row_chunks(const int64_t* rowptr, int64_t num_relations, int64_t num_nodes) {
  std::vector<RowChunk> chunks;
  for (int64_t r = 0; r < num_relations; ++r) {
    const int64_t* mine = rowptr + r * num_nodes;
    const int64_t work = mine[num_nodes] - mine[0] + kRowCost * num_nodes;
    const int64_t num_blocks = ceil_div(work, kChunkEdges);
    for (int64_t block = 0, begin = 0; block < num_blocks; ++block) {
      const int64_t end = block_begin(mine, num_nodes, block + 1, num_blocks);
      chunks.push_back({r, begin, end});
      begin = end;
    }
  }
  return chunks;
}

// Word w of every gene, side by side: `words` itself where a gene has one word.
class Column {
 public:
  Column(const Word* words, int64_t num_nodes, int64_t num_words_all)
      : words_(words), num_nodes_(num_nodes), num_words_(num_words_all), copy_(num_words_all > 1 ? num_nodes : 0) {}

  const Word* get(int64_t w) {
    if (num_words_ == 1) return words_;
    for (int64_t i = 0; i < num_nodes_; ++i) copy_[i] = words_[i * num_words_ + w];
    return copy_.data();
  }

 private:
  const Word* words_;
  int64_t num_nodes_, num_words_;
  std::vector<Word> copy_;
};

std::tuple<Tensor, Tensor, Tensor> induced_sizes(
    const Tensor& rowptr, const Tensor& col, const Tensor& words, int64_t num_sets) {
  check_words("words", words);
  check_num_sets(words, num_sets);
  const int64_t n = words.size(0);
  const int64_t num_relations = check_stack(rowptr, col, n);
  check_stack_values(rowptr, col, n);
  const int64_t* rows = longs_of(rowptr);
  const Loops loops = loops_for(n);
  const std::vector<RowChunk> chunks = row_chunks(rows, num_relations, n);
  const int64_t num_chunks = static_cast<int64_t>(chunks.size());

  Tensor node_ptr = empty_on(words, {num_sets + 1}, ScalarType::Long);
  Tensor edge_ptr = empty_on(words, {num_relations, num_sets + 1}, ScalarType::Long);
  Tensor offsets = empty_on(words, {num_chunks, num_sets}, ScalarType::Long);
  int64_t* nodes = node_ptr.mutable_data_ptr<int64_t>();
  int64_t* edges = edge_ptr.mutable_data_ptr<int64_t>();
  int64_t* starts = offsets.mutable_data_ptr<int64_t>();

  Column column(const_words_of(words), n, words.size(1));
  nodes[0] = 0;
  for (int64_t w = 0; w < words.size(1); ++w) {
    const Word* mine = column.get(w);
    const int64_t first = w * kWordBits, size = std::min(kWordBits, num_sets - first);
    for_each_task(num_chunks + 1, [&](int64_t task) {
      int64_t counts[kWordBits] = {};
      if (task == num_chunks) {
        for (int64_t i = 0; i < n; ++i) {
          for (Word left = mine[i]; left != 0; left &= left - 1) ++counts[__builtin_ctzll(left)];
        }
        std::copy_n(counts, size, nodes + 1 + first);
        return;
      }
      const RowChunk& chunk = chunks[task];
      loops.count_edges(rows + chunk.relation * n, ints_of(col), mine, chunk.begin, chunk.end, counts);
      std::copy_n(counts, size, starts + task * num_sets + first);
    });
  }
  for (int64_t b = 0; b < num_sets; ++b) nodes[b + 1] += nodes[b];

  // Counts become positions: within a relation by sample, then by chunk of rows.
  for (int64_t r = 0, begin = 0; r < num_relations; ++r) {
    int64_t end = begin;
    while (end < num_chunks && chunks[end].relation == r) ++end;
    int64_t position = 0;
    int64_t* mine = edges + r * (num_sets + 1);
    for (int64_t b = 0; b < num_sets; ++b) {
      mine[b] = position;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t count = starts[task * num_sets + b];
        starts[task * num_sets + b] = position;
        position += count;
      }
    }
    mine[num_sets] = position;
    begin = end;
  }
  return {node_ptr, edge_ptr, offsets};
}

// Fresh memory costs more than the writing: ask for large pages, of which there are 512 times fewer to be faulted in.
void prefer_large_pages(const Tensor& x, int64_t element_size) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLargePage = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(x.mutable_data_ptr());
  const uintptr_t end = begin + static_cast<uintptr_t>(x.numel() * element_size);
  const uintptr_t first = (begin + kLargePage - 1) & ~(kLargePage - 1), last = end & ~(kLargePage - 1);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: it may be refused
#endif
}

template <class T>
T* at_element(const Tensor& x, int64_t element) {
  return static_cast<T*>(x.mutable_data_ptr()) + element;
}

// One group of samples: their rank table, and their part of `node` and `seed_mask`.
struct Numbering {
  const Word* words;  // of the group's first sample
  const Word* seeds;
  int64_t num_nodes, num_words, shift, group_size;
  const int64_t* node_ptr;  // of the group
  int64_t num_places;
  bool* seed_mask;

  template <int kGroup, class Rank, class T>
  void fill(Rank* rank, T* node) const {
    const Word mask = (Word{1} << group_size) - 1;
    Rank next[kGroup] = {};
    std::fill_n(rank, num_nodes * kGroup, Rank{-1});
    for (int64_t i = 0; i < num_nodes; ++i) {
      const Word seed = seeds[i * num_words] >> shift;
      for (Word left = (words[i * num_words] >> shift) & mask; left != 0; left &= left - 1) {
        const int s = __builtin_ctzll(left);
        const Rank mine = next[s]++;
        rank[i * kGroup + s] = mine;
        const int64_t place = node_ptr[s] + mine;
        if (place >= 0 && place < num_places) {
          node[place] = static_cast<T>(i);
          seed_mask[place] = (seed >> s) & 1;
        }
      }
    }
  }

  template <class T>
  void fill(bool narrow, void* rank, T* node) const {
    narrow ? fill<32>(static_cast<int16_t*>(rank), node) : fill<16>(static_cast<int32_t*>(rank), node);
  }
};

void induced_write(
    const Tensor& rowptr, const Tensor& col, const Tensor& words, const Tensor& seed_words, const Tensor& node_ptr,
    const Tensor& edge_ptr, const Tensor& offsets, Tensor node, Tensor seed_mask, Tensor edge_index,
    std::optional<Tensor> edge_id, std::optional<Tensor> csr_rowptr, std::vector<int64_t> edge_capacity) {
  const Induced about = check_induced_write(
      rowptr, col, words, seed_words, node_ptr, edge_ptr, offsets, node, seed_mask, edge_index, edge_id, csr_rowptr,
      edge_capacity);
  const int64_t n = about.num_nodes, num_sets = about.num_sets, num_relations = about.num_relations;
  check_stack_values(rowptr, col, n);
  const int64_t* rows = longs_of(rowptr);
  const std::vector<RowChunk> chunks = row_chunks(rows, num_relations, n);
  const int64_t num_chunks = static_cast<int64_t>(chunks.size());
  check_size("offsets", offsets.size(0), num_chunks);
  for (int64_t r = 0; r < num_relations; ++r) {
    STD_TORCH_CHECK(
        rows[(r + 1) * n] - rows[r * n] <= INT32_MAX, "col: expected at most 2147483647 edges a relation, got ",
        rows[(r + 1) * n] - rows[r * n]);
  }

  const int64_t element = about.wide ? 8 : 4;
  for (const Tensor* x : {&edge_index, edge_id ? &*edge_id : nullptr}) {
    if (x != nullptr) prefer_large_pages(*x, element);
  }
  const auto place = [&](const Tensor& x, int64_t at) -> void* {
    return static_cast<char*>(x.mutable_data_ptr()) + at * element;
  };
  std::vector<int64_t> first_edge(num_relations + 1, 0);
  for (int64_t r = 0; r < num_relations; ++r) first_edge[r + 1] = first_edge[r] + edge_capacity[r];

  const Loops loops = loops_for(n);
  const int64_t* nodes = longs_of(node_ptr);
  const int64_t* starts = longs_of(offsets);
  bool* seeds = static_cast<bool*>(seed_mask.mutable_data_ptr());
  constexpr int64_t kLine = 64;  // bytes, of a gene; one more to align the table, one that a wide gather may read into
  std::unique_ptr<char[]> memory(new char[(n + 2) * kLine]);
  char* rank = memory.get();
  rank += -reinterpret_cast<uintptr_t>(rank) % kLine;

  for (int64_t first = 0; first < num_sets; first += loops.group) {
    const int64_t size = std::min(loops.group, num_sets - first);
    const Numbering numbering = {
        const_words_of(words) + first / kWordBits, const_words_of(seed_words) + first / kWordBits, n, words.size(1),
        first % kWordBits, size, nodes + first, about.num_places, seeds};
    if (about.wide) {
      numbering.fill(loops.narrow, rank, at_element<int64_t>(node, 0));
    } else {
      numbering.fill(loops.narrow, rank, at_element<int32_t>(node, 0));
    }
    for_each_task(num_chunks, [&](int64_t t) {
      const RowChunk& chunk = chunks[t];
      const int64_t r = chunk.relation;
      WriteTask task = {};
      task.rowptr = rows + r * n;
      task.col = ints_of(col);
      task.rank = rank;
      task.first_row = chunk.begin;
      task.last_row = chunk.end;
      task.group_size = size;
      std::copy_n(starts + t * num_sets + first, size, task.position);
      std::copy_n(nodes + first, size, task.node_base);
      task.capacity = edge_capacity[r];
      task.num_places = about.num_places;
      if (about.csr) {
        task.target = place(edge_index, first_edge[r]);
        task.csr_rowptr = place(*csr_rowptr, r * (about.num_places + 1));
      } else {
        task.source = place(edge_index, 2 * first_edge[r]);
        task.target = place(edge_index, 2 * first_edge[r] + edge_capacity[r]);
      }
      if (edge_id) task.edge_id = place(*edge_id, first_edge[r]);
      about.wide ? loops.write_edges64(task) : loops.write_edges32(task);
    });
  }
  if (about.csr) {
    const int64_t filled = std::max<int64_t>(0, std::min(nodes[num_sets], about.num_places));
    for (int64_t r = 0; r < num_relations; ++r) {
      const int64_t end = longs_of(edge_ptr)[r * (num_sets + 1) + num_sets];
      for (int64_t v = filled; v <= about.num_places; ++v) {
        void* entry = place(*csr_rowptr, r * (about.num_places + 1) + v);
        if (about.wide) {
          *static_cast<int64_t*>(entry) = end;
        } else {
          *static_cast<int32_t*>(entry) = static_cast<int32_t>(end);
        }
      }
    }
  }
}

}  // namespace

// It takes no tensor that would choose a backend.
STABLE_TORCH_LIBRARY_FRAGMENT(cellattn, m) { m.def("induced_avx512(int num_nodes) -> bool"); }
STABLE_TORCH_LIBRARY_IMPL(cellattn, CompositeExplicitAutograd, m) { m.impl("induced_avx512", TORCH_BOX(&induced_avx512)); }

STABLE_TORCH_LIBRARY_IMPL(cellattn, CPU, m) {
  m.impl("induced_sizes", TORCH_BOX(&induced_sizes));
  m.impl("induced_write", TORCH_BOX(&induced_write));
}

}  // namespace cellattn
