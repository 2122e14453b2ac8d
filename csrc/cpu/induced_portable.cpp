// Induced edges on any processor.

#include "induced.h"

namespace cellattn::portable {
namespace {

using Rank = int32_t;
constexpr int64_t kGroup = 16;
constexpr int64_t kLineBytes = 1, kCarry = 0;  // stores of any length

inline bool any(Word word) { return word != 0; }

// Bit s: the gene is in sample s of the group.
inline unsigned members(const Rank* rank) {
  unsigned samples = 0;
  for (int s = 0; s < kGroup; ++s) samples |= static_cast<unsigned>(rank[s] >= 0) << s;
  return samples;
}

template <class T>
inline void store(T* out, const int32_t* in, int64_t n, int64_t base, bool) {
  for (int64_t k = 0; k < n; ++k) out[k] = static_cast<T>(in[k] + base);
}

inline void finish_stores() {}

#include "induced_impl.h"

template <class T, bool HasSource, bool HasId>
inline void append_row(
    Stage<T, HasSource, HasId>& stage, const WriteTask& task, const Rank* rank_i, unsigned samples, int64_t begin,
    int64_t end, int64_t relation_begin) {
  for (int64_t e = begin; e < end; ++e) {
    append_one(stage, task, rank_i, samples, e, static_cast<int32_t>(e - relation_begin));
  }
}

}  // namespace

void count_edges(
    const int64_t* rowptr, const int32_t* col, const Word* words, int64_t begin, int64_t end, int64_t* counts) {
  BitCounter<Word> counter;
  Word pending[8] = {};
  int num_pending = 0;
  for (int64_t i = begin; i < end; ++i) {
    const Word word = words[i];
    if (word == 0) continue;
    for (int64_t e = rowptr[i]; e < rowptr[i + 1]; ++e) {
      pending[num_pending++] = word & words[col[e]];
      if (num_pending == 8) {
        counter.add(pending);
        num_pending = 0;
      }
    }
  }
  for (int k = num_pending; k < 8; ++k) pending[k] = 0;
  counter.add(pending);
  add_counts(counter.plane, 1, counts);
}

void write_edges32(const WriteTask& task) { write_edges<int32_t>(task); }
void write_edges64(const WriteTask& task) { write_edges<int64_t>(task); }

}  // namespace cellattn::portable
