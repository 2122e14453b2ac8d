// k-hop neighbourhoods of a whole batch at once, on the CPU.
//
// A gene's word holds 64 samples, so one OR along an edge carries 64 traversals. A hop pulls: gene i joins the samples of its
// neighbours j, word[i] |= word[j], which writes each word once and needs no atomics; rows whose word is full stop early. The
// first hop, from a handful of seeds, is pushed instead: it touches the edges of the seeds alone.
//
// Words are handled in chunks of C, kept side by side ([N, C], C = 8: a cache line a gene), so that memory is bounded
// whatever the batch: two states of [relations, N, C].

#include "values.h"

namespace cellattn {
namespace {

// Along which arrays a traversal goes from a gene to those it is reached from (pull) and to those it reaches (push).
struct Side {
  const int64_t* pull_ptr;
  const int32_t* pull;
  const int64_t* push_ptr;
  const int32_t* push;
};

struct Traversal {
  int64_t num_nodes, num_relations, num_hops, num_sets;
  bool mixed;
  std::vector<Side> sides;
  const int64_t* seeds;
  const int64_t* ptr;

  int64_t num_states() const { return mixed ? 1 : num_relations; }
};

template <int C>
struct Chunk {
  int64_t first;  // word
  Word full[C];   // all samples of the batch

  Chunk(int64_t first_word, int64_t num_sets) : first(first_word) {
    for (int c = 0; c < C; ++c) full[c] = valid_bits(num_sets, first + c);
  }
};

// acc |= the words of a row's neighbours; false as soon as nothing can be added.
template <int C>
bool pull_row(const int32_t* col, int64_t begin, int64_t end, const Word* state, const Word* full, Word* acc) {
  constexpr int64_t kStep = 16;  // edges between two looks at whether acc is full
  while (begin < end) {
    const int64_t stop = std::min(begin + kStep, end);
    for (; begin < stop; ++begin) {
      const Word* from = state + static_cast<int64_t>(col[begin]) * C;
      for (int c = 0; c < C; ++c) acc[c] |= from[c];
    }
    bool is_full = true;
    for (int c = 0; c < C; ++c) is_full = is_full && acc[c] == full[c];
    if (is_full) return false;
  }
  return true;
}

// One hop: next = now, and the genes reached along an edge. Whether anything joined.
template <int C>
bool pull_hop(const Traversal& t, const Chunk<C>& chunk, const Word* now, Word* next) {
  std::atomic<bool> changed{false};
  const auto rows = [&](int64_t begin, int64_t end) {
    bool mine = false;
    for (int64_t i = begin; i < end; ++i) {  // a row of the states
      Word acc[C];
      std::copy_n(now + i * C, C, acc);
      const int64_t gene = i % t.num_nodes;
      const Word* state = now + (i - gene) * C;
      bool more = !std::equal(acc, acc + C, chunk.full);
      for (int64_t r = 0; more && r < (t.mixed ? t.num_relations : 1); ++r) {
        const int64_t row = i + r * t.num_nodes;
        for (const Side& side : t.sides) {
          more = more && pull_row<C>(side.pull, side.pull_ptr[row], side.pull_ptr[row + 1], state, chunk.full, acc);
        }
      }
      mine = mine || !std::equal(acc, acc + C, now + i * C);
      std::copy_n(acc, C, next + i * C);
    }
    if (mine) changed.store(true, std::memory_order_relaxed);
  };
  const int64_t num_rows = t.num_states() * t.num_nodes;
  if (t.mixed) {
    for_each_block(num_rows, 64, rows);
  } else {
    for_each_row_block(t.sides[0].pull_ptr, num_rows, rows);
  }
  return changed.load();
}

// The first hop: from each seed along its own edges.
template <int C>
void push_hop(const Traversal& t, const Chunk<C>& chunk, int64_t first_set, int64_t last_set, Word* next) {
  for_each_task(t.num_states(), [&](int64_t s) {
    Word* state = next + s * t.num_nodes * C;
    for (int64_t r = s; r < (t.mixed ? t.num_relations : s + 1); ++r) {
      for (int64_t b = first_set; b < last_set; ++b) {
        const Word bit = Word{1} << (b % kWordBits);
        Word* word = state + (b / kWordBits - chunk.first);
        for (int64_t p = t.ptr[b]; p < t.ptr[b + 1]; ++p) {
          const int64_t row = r * t.num_nodes + t.seeds[p];
          for (const Side& side : t.sides) {
            for (int64_t e = side.push_ptr[row]; e < side.push_ptr[row + 1]; ++e) {
              word[static_cast<int64_t>(side.push[e]) * C] |= bit;
            }
          }
        }
      }
    }
  });
}

template <int C>
void traverse(const Traversal& t, int64_t first, Word* words, int64_t num_words_all) {
  const Chunk<C> chunk(first, t.num_sets);
  const int64_t n = t.num_nodes, size = n * C;
  const int64_t first_set = first * kWordBits, last_set = std::min(t.num_sets, (first + C) * kWordBits);
  std::vector<Word> seeds(size, 0);
  for (int64_t b = first_set; b < last_set; ++b) {
    for (int64_t p = t.ptr[b]; p < t.ptr[b + 1]; ++p) {
      seeds[t.seeds[p] * C + (b / kWordBits - first)] |= Word{1} << (b % kWordBits);
    }
  }
  const int64_t num_states = t.num_states();
  std::vector<Word> now, next;
  if (t.num_hops > 0 && num_states > 0) {
    now.resize(num_states * size);
    for_each_task(num_states, [&](int64_t s) { std::copy(seeds.begin(), seeds.end(), now.begin() + s * size); });
    int64_t hop = 0;
    const int64_t num_seeds = t.ptr[last_set] - t.ptr[first_set];
    if (num_seeds < n * C / 4) {  // else a pull, 64 samples at a time, is the cheaper one here too
      push_hop<C>(t, chunk, first_set, last_set, now.data());
      ++hop;
    }
    if (hop < t.num_hops) next.resize(now.size());
    for (; hop < t.num_hops; ++hop) {
      const bool changed = pull_hop<C>(t, chunk, now.data(), next.data());
      now.swap(next);
      if (!changed) break;
    }
  }
  for_each_block(n, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int c = 0; c < C; ++c) {
        Word all = seeds[i * C + c];
        for (int64_t s = 0; s < (now.empty() ? 0 : num_states); ++s) all |= now[s * size + i * C + c];
        words[i * num_words_all + first + c] = all;
      }
    }
  });
}

Tensor khop_words(
    const Tensor& rowptr, const Tensor& col, const Tensor& colptr, const Tensor& row, const Tensor& seeds,
    const Tensor& ptr, int64_t num_nodes, int64_t num_hops, bool mixed, bool incoming, bool outgoing) {
  Traversal t;
  t.num_nodes = num_nodes;
  t.num_relations =
      check_khop_words(rowptr, col, colptr, row, seeds, ptr, num_nodes, num_hops, incoming, outgoing);
  check_ragged_values(seeds, ptr, num_nodes);
  t.num_hops = num_hops;
  t.num_sets = ptr.numel() - 1;
  t.mixed = mixed;
  t.seeds = longs_of(seeds);
  t.ptr = longs_of(ptr);
  check_stack_values(rowptr, col, num_nodes);
  check_stack_values(colptr, row, num_nodes);
  const int64_t* by_row = longs_of(rowptr);
  const int64_t* by_col = longs_of(colptr);
  if (incoming) t.sides.push_back({by_row, ints_of(col), by_col, ints_of(row)});
  if (outgoing) t.sides.push_back({by_col, ints_of(row), by_row, ints_of(col)});

  const int64_t w = num_words(t.num_sets);
  Tensor words = empty_on(rowptr, {num_nodes, w}, ScalarType::Long);
  Word* out = words_of(words);
  int64_t first = 0;
  for (; first + 8 <= w; first += 8) traverse<8>(t, first, out, w);
  for (; first + 4 <= w; first += 4) traverse<4>(t, first, out, w);
  for (; first + 2 <= w; first += 2) traverse<2>(t, first, out, w);
  for (; first < w; ++first) traverse<1>(t, first, out, w);
  return words;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cellattn, CPU, m) { m.impl("khop_words", TORCH_BOX(&khop_words)); }

}  // namespace cellattn
