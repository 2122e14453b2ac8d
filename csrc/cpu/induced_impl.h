// The body of induced_portable.cpp and induced_avx512.cpp, which say before it what a Rank is and how many samples a kGroup has,
// and differ in `append_row` and `store`.
// It is compiled once for each instruction set, so nothing in here may come from a header that others include too.

// ------------------------------------------------------------------------------------------------------------- counts

// a + b + c of one-bit numbers, 64 of them at once: sum and carry.
template <class V>
inline void add_bits(V a, V b, V c, V& sum, V& carry) {
  const V half = a ^ b;
  carry = (a & b) | (half & c);
  sum = half ^ c;
}

// Eight words a step into bit-sliced counters: a tree of full adders brings the weights up to 8, the rest ripples.
template <class V>
struct BitCounter {
  V plane[kPlanes] = {};

  void add(const V* m) {
    V two_a, two_b, four_a, four_b, eight;
    add_bits(plane[0], m[0], m[1], plane[0], two_a);
    add_bits(plane[0], m[2], m[3], plane[0], two_b);
    add_bits(plane[1], two_a, two_b, plane[1], four_a);
    add_bits(plane[0], m[4], m[5], plane[0], two_a);
    add_bits(plane[0], m[6], m[7], plane[0], two_b);
    add_bits(plane[1], two_a, two_b, plane[1], four_b);
    add_bits(plane[2], four_a, four_b, plane[2], eight);
    for (int k = 3; k < kPlanes; ++k) {
      const V carry = plane[k] & eight;
      plane[k] ^= eight;
      eight = carry;
      if (!any(eight)) break;
    }
  }
};

inline void add_counts(const Word* planes, int stride, int64_t* counts) {
  for (int k = 0; k < kPlanes; ++k) {
    const Word plane = planes[k * stride];
    if (plane == 0) continue;
    for (int b = 0; b < kWordBits; ++b) counts[b] += static_cast<int64_t>((plane >> b) & 1) << k;
  }
}

// ------------------------------------------------------------------------------------------------------------ writing

// The edges of a group's samples on their way out.
template <class T, bool HasSource, bool HasId>
struct Stage {
  static constexpr bool kHasSource = HasSource, kHasId = HasId;
  alignas(64) Rank source[HasSource ? kGroup : 1][kStaged + kSlack];
  alignas(64) Rank target[kGroup][kStaged + kSlack];
  alignas(64) int32_t edge[HasId ? kGroup : 1][kStaged + kSlack];
  int64_t fill[kGroup];
  int64_t position[kGroup];

  // Writes what sample s has staged, as far as there is room.
  void flush(const WriteTask& task, int64_t s) {
    const int64_t at = position[s], room = task.capacity - at;
    const int64_t n = room < fill[s] ? (room < 0 ? 0 : room) : fill[s];
    const int64_t base = task.node_base[s];
    if (at >= 0 && n > 0) {
      store(static_cast<T*>(task.target) + at, target[s], n, base);
      if (HasSource) store(static_cast<T*>(task.source) + at, source[s], n, base);
      if (HasId) store(static_cast<T*>(task.edge_id) + at, edge[s], n, 0);
    }
    position[s] += fill[s];
    fill[s] = 0;
  }
};

// A gene's positions in the samples of the group.
inline const Rank* ranks_of(const WriteTask& task, int64_t gene) {
  return static_cast<const Rank*>(task.rank) + gene * kGroup;
}

// One edge, for each of the group's samples that has both its ends.
template <class S>
inline void append_one(
    S& stage, const WriteTask& task, const Rank* rank_i, unsigned samples, int64_t e, int32_t edge) {
  const Rank* rank_j = ranks_of(task, task.col[e]);
  for (; samples != 0; samples &= samples - 1) {
    const int s = __builtin_ctz(samples);
    const int64_t at = stage.fill[s];
    stage.target[s][at] = rank_j[s];
    if (S::kHasSource) stage.source[s][at] = rank_i[s];
    if (S::kHasId) stage.edge[s][at] = edge;
    stage.fill[s] = at + (rank_j[s] >= 0);
    if (stage.fill[s] >= kStaged) stage.flush(task, s);
  }
}

template <class T, bool HasSource, bool HasId>
void write_task(const WriteTask& task) {
  Stage<T, HasSource, HasId> stage;
  for (int64_t s = 0; s < kGroup; ++s) {
    stage.fill[s] = 0;
    stage.position[s] = task.position[s];
  }
  const int64_t relation_begin = task.rowptr[0];
  for (int64_t i = task.first_row; i < task.last_row; ++i) {
    const int64_t begin = task.rowptr[i], end = task.rowptr[i + 1];
    if (HasSource && begin == end) continue;
    const Rank* rank_i = ranks_of(task, i);
    const unsigned samples = members(rank_i);
    if (samples == 0) continue;
    if (!HasSource) {
      T* row_begins = static_cast<T*>(task.csr_rowptr);
      for (unsigned left = samples; left != 0; left &= left - 1) {
        const int s = __builtin_ctz(left);
        const int64_t place = task.node_base[s] + rank_i[s];
        if (place >= 0 && place < task.num_places) row_begins[place] = static_cast<T>(stage.position[s] + stage.fill[s]);
      }
    }
    append_row(stage, task, rank_i, samples, begin, end, relation_begin);
  }
  for (int64_t s = 0; s < task.group_size; ++s) stage.flush(task, s);
  finish_stores();
}

template <class T>
void write_edges(const WriteTask& task) {
  if (task.csr_rowptr == nullptr) {
    task.edge_id != nullptr ? write_task<T, true, true>(task) : write_task<T, true, false>(task);
  } else {
    task.edge_id != nullptr ? write_task<T, false, true>(task) : write_task<T, false, false>(task);
  }
}
