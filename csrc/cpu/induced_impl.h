// The body of induced_portable.cpp and induced_avx512.cpp, which say before it what a Rank is and how many samples a kGroup has,
// how long a kLineBytes is that is better written at once, kCarry entries of which wait for the rest; and differ in
// `append_row` and `store`.
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

// The edges of a group's samples on their way out. A line of the output that is not full yet waits here for its other edges:
// writing it twice would read it in between. So the first kCarry entries are those before `position`.
template <class T, bool HasSource, bool HasId>
struct Stage {
  static constexpr bool kHasSource = HasSource, kHasId = HasId;
  static constexpr int64_t kSize = kCarry + kStaged + kSlack;
  alignas(64) Rank source[HasSource ? kGroup : 1][kSize];
  alignas(64) Rank target[kGroup][kSize];
  alignas(64) int32_t edge[HasId ? kGroup : 1][kSize];
  int64_t end[kGroup];       // of the entries
  int64_t position[kGroup];  // where entry kCarry goes, within the relation
  int64_t room = kStaged;    // edges for which every sample has a place, whoever gets them

  explicit Stage(const WriteTask& task) {
    for (int64_t s = 0; s < kGroup; ++s) {
      end[s] = kCarry;
      position[s] = task.position[s];
    }
  }

  // Where the next edge of sample s goes.
  int64_t next_position(int64_t s) const { return position[s] + end[s] - kCarry; }

  // Takes the places of n edges more, n <= kStaged / 2, for every sample.
  void reserve(const WriteTask& task, int64_t n) {
    if (room < n) make_room(task);
    room -= n;
  }

  void make_room(const WriteTask& task) {
    constexpr int64_t kHalf = kCarry + kStaged / 2;
    int64_t most = kCarry;
    for (int64_t s = 0; s < kGroup; ++s) {
      if (end[s] > kHalf) flush(task, s);
      if (most < end[s]) most = end[s];
    }
    room = kCarry + kStaged - most;
  }

  void flush(const WriteTask& task, int64_t s) {
    write_all(task, s, false);
    for (int64_t k = 0, from = end[s] - kCarry; k < kCarry; ++k, ++from) {
      target[s][k] = target[s][from];
      if (HasSource) source[s][k] = source[s][from];
      if (HasId) edge[s][k] = edge[s][from];
    }
    position[s] = next_position(s);
    end[s] = kCarry;
  }

  void write_all(const WriteTask& task, int64_t s, bool last) const {
    const int64_t base = task.node_base[s];
    write(task.target, target[s], base, task, s, last);
    if (HasSource) write(task.source, source[s], base, task, s, last);
    if (HasId) write(task.edge_id, edge[s], 0, task, s, last);
  }

  // What is not written yet, as far as there is room: whole lines, or if they are the `last` edges all of it.
  template <class In>
  void write(void* array, const In* staged, int64_t base, const WriteTask& task, int64_t s, bool last) const {
    constexpr uintptr_t kLanes = kLineBytes > sizeof(T) ? kLineBytes / sizeof(T) : 1;
    const int64_t at = position[s], next = next_position(s), to = next < task.capacity ? next : task.capacity;
    const uintptr_t in_line = (reinterpret_cast<uintptr_t>(array) / sizeof(T) + static_cast<uintptr_t>(at)) % kLanes;
    const int64_t first = task.position[s] < 0 ? 0 : task.position[s];
    int64_t from = at - static_cast<int64_t>(in_line);  // the line's beginning was kept back
    if (from < first) from = first;
    if (from >= to) return;
    store(static_cast<T*>(array) + from, staged + kCarry + (from - at), to - from, base, !last && to == next);
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
  stage.reserve(task, 1);
  for (; samples != 0; samples &= samples - 1) {
    const int s = __builtin_ctz(samples);
    const int64_t at = stage.end[s];
    stage.target[s][at] = rank_j[s];
    if (S::kHasSource) stage.source[s][at] = rank_i[s];
    if (S::kHasId) stage.edge[s][at] = edge;
    stage.end[s] = at + (rank_j[s] >= 0);
  }
}

template <class T, bool HasSource, bool HasId>
void write_task(const WriteTask& task) {
  Stage<T, HasSource, HasId> stage(task);
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
        if (place >= 0 && place < task.num_places) row_begins[place] = static_cast<T>(stage.next_position(s));
      }
    }
    append_row(stage, task, rank_i, samples, begin, end, relation_begin);
  }
  for (int64_t s = 0; s < task.group_size; ++s) stage.write_all(task, s, true);
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
