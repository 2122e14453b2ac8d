// Attention along the edges of graphs on the CPU: which heads are dense enough for blocks of the map, and how these are shared out.

#pragma once

#include <algorithm>
#include <cmath>
#include <map>
#include <utility>
#include <vector>

#include "attention_parts.h"
#include "edge_blocks.h"
#include "edge_problem.h"
#include "isa.h"
#include "room.h"

namespace cellattn {

// From how many genes on, and from which part of all pairs on, blocks of the map with a bit a pair are faster than its entries: by
// processor time on an AMD EPYC with AVX-512, at 2,000 genes and heads of 16, the two cross at a fifth.
constexpr int64_t kFewestGenes = 512, kDenseShare = 5;

// Whether all numbers are finite; the largest magnitude.
template <class T>
inline bool finite(const Tensor& x, T* largest) {
  const T* values = static_cast<const T*>(x.const_data_ptr());
  T check = 0, most = 0;
  for (int64_t i = 0; i < x.numel(); ++i) {
    const T magnitude = values[i] < 0 ? -values[i] : values[i];
    check += T{0} * values[i];
    most = magnitude > most ? magnitude : most;
  }
  *largest = most;
  return check == 0;
}

// Heads of one dense relation without weights or a bias, of which the map is made block by block. What is not finite, or is not
// once it is multiplied, would spread in the products of a block, and scores that overflow have no largest: then there are none.
struct DenseHeads {
  std::vector<int64_t> heads, others;  // of all leading dimensions
  std::vector<const uint64_t*> seen;
  std::vector<const uint8_t*> twice;
  std::vector<int64_t> tie;
  std::map<int64_t, std::pair<std::vector<uint64_t>, std::vector<uint8_t>>> masks;  // by relation

  template <class T>
  DenseHeads(
      const EdgeProblem& about, const EdgeStack& by_row, bool has_bias, bool self_loops, double scale, const Tensor& q, const Tensor& k,
      const Tensor& v, const Tensor* dout, const Tensor* delta, T) {
    const int64_t n = about.num_nodes, all = about.num_leading * about.num_heads;
    std::vector<int64_t> relation(about.num_heads, -1), last(about.num_heads);
    if (!has_bias && !by_row.log_weight && n >= kFewestGenes && about.dim > 0 && about.dim_v > 0) {
      std::vector<int64_t> count(about.num_heads);
      for (int64_t t = 0; t < about.num_ties; ++t) ++count[about.heads[t]], last[about.heads[t]] = t;
      for (int64_t t = 0; t < about.num_ties; ++t) {
        const int64_t* ptr = longs_of(by_row.ptr) + about.relations[t] * n;
        if (count[about.heads[t]] == 1 && ptr[n] - ptr[0] >= n * n / kDenseShare) relation[about.heads[t]] = about.relations[t];
      }
    }
    if (std::any_of(relation.begin(), relation.end(), [](int64_t r) { return r >= 0; })) {
      T sizes[3] = {}, above = 0, other = 0;
      bool fine = finite(q, &sizes[0]) && finite(k, &sizes[1]) && finite(v, &sizes[2]);
      fine = fine && (!dout || (finite(*dout, &above) && finite(*delta, &other)));
      const double scores = std::abs(scale) * static_cast<double>(sizes[0]) * static_cast<double>(sizes[1]) * about.dim;
      const double slopes = static_cast<double>(above) * static_cast<double>(sizes[2]) * about.dim_v;
      if (!fine || !(scores < 1e30 && slopes < 1e30)) std::fill(relation.begin(), relation.end(), -1);
    }
    seen.resize(all);
    twice.resize(all);
    tie.resize(all);
    for (int64_t l = 0; l < all; ++l) {
      const int64_t r = relation[l % about.num_heads];
      (r >= 0 ? heads : others).push_back(l);
      if (r < 0) continue;
      auto found = masks.find(r);
      if (found == masks.end()) found = masks.emplace(r, mask_of(about, by_row, r, self_loops)).first;
      seen[l] = found->second.first.data();
      twice[l] = found->second.second.data();
      tie[l] = last[l % about.num_heads];
    }
  }

  static std::pair<std::vector<uint64_t>, std::vector<uint8_t>> mask_of(
      const EdgeProblem& about, const EdgeStack& by_row, int64_t relation, bool self_loops) {
    const int64_t n = about.num_nodes, prefix = about.num_prefix, words = ceil_div(prefix + n, kMapKeys);
    std::vector<uint64_t> seen(n * words);
    std::vector<uint8_t> twice(n);
    const int64_t* ptr = longs_of(by_row.ptr) + relation * n;
    const int32_t* col = ints_of(by_row.neighbour);
    for_each_block(n, 64, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        uint64_t* row = seen.data() + i * words;
        const auto set = [&](int64_t token) { row[token / 64] |= uint64_t{1} << token % 64; };
        for (int64_t token = 0; token < prefix; ++token) set(token);
        for (int64_t e = ptr[i]; e < ptr[i + 1]; ++e) set(prefix + col[e]);
        const int64_t own = prefix + i;
        twice[i] = self_loops && (row[own / 64] >> own % 64 & 1);
        if (self_loops) set(own);
      }
    });
    return {std::move(seen), std::move(twice)};
  }

  template <class T>
  EdgeBlocks<T> task(
      const EdgeProblem& about, const Tensor& q, const Tensor& k, const Tensor& v, bool self_loops, double scale,
      const EdgeDropout& dropout) const {
    EdgeBlocks<T> task = {};
    AttentionRows<T>& rows = task.rows;
    rows.q = static_cast<const T*>(q.const_data_ptr());
    rows.k = static_cast<const T*>(k.const_data_ptr());
    rows.v = static_cast<const T*>(v.const_data_ptr());
    rows.num_heads = about.num_leading * about.num_heads;
    rows.num_queries = about.num_nodes;
    rows.num_keys = about.num_prefix + about.num_nodes;
    rows.dim = about.dim;
    rows.dim_v = about.dim_v;
    rows.scale = static_cast<T>(scale);
    rows.rescale = rescale_of<T>(dropout.threshold);
    rows.bits = dropout.bits();
    task.seen = seen.data();
    task.twice = twice.data();
    task.tie = tie.data();
    task.num_prefix = about.num_prefix;
    task.self_loops = self_loops;
    return task;
  }
};

template <class T>
struct BlockLoops {
  int64_t vector_bytes = 16;
  void (*pack)(const EdgeBlocks<T>&, int64_t) = &portable::blocks_pack;
  void (*forward)(const EdgeBlocks<T>&, int64_t, int64_t, int64_t, T*) = &portable::blocks_forward;
  void (*backward)(const EdgeBlocks<T>&, int64_t, int64_t, int64_t, T*, T*, T*) = &portable::blocks_backward;

  BlockLoops() {
#if defined(__x86_64__)
    if (use_avx512()) {
      vector_bytes = 64;
      pack = &avx512::blocks_pack;
      forward = &avx512::blocks_forward;
      backward = &avx512::blocks_backward;
    } else if (use_avx2()) {
      vector_bytes = 32;
      pack = &avx2::blocks_pack;
      forward = &avx2::blocks_forward;
      backward = &avx2::blocks_backward;
    }
#endif
  }

  void set_widths(AttentionRows<T>& rows) const {
    const int64_t lanes = vector_bytes / static_cast<int64_t>(sizeof(T));
    rows.width = ceil_div(rows.dim, lanes) * lanes;
    rows.width_v = ceil_div(rows.dim_v, lanes) * lanes;
    rows.padded_keys = ceil_div(rows.num_keys, kMapKeys) * kMapKeys;
  }
};

template <class T>
inline void attend_blocks(EdgeBlocks<T> task, const std::vector<int64_t>& heads) {
  const BlockLoops<T> loops;
  AttentionRows<T>& rows = task.rows;
  loops.set_widths(rows);
  Room<T> k_columns(rows.num_heads * rows.dim * rows.padded_keys), v_rows(rows.num_heads * rows.padded_keys * rows.width_v);
  rows.k_columns = k_columns.data();
  rows.v_rows = v_rows.data();
  const int64_t count = static_cast<int64_t>(heads.size());
  for_each_task(count, [&](int64_t h) { loops.pack(task, heads[h]); });
  const int64_t step = 4 * kMapRows, blocks = ceil_div(rows.num_queries, step);
  for_each_task(count * blocks, [&](int64_t t) {
    Room<T> room(attention_room(rows));
    const int64_t begin = t % blocks * step;
    loops.forward(task, heads[t / blocks], begin, std::min(begin + step, rows.num_queries), room.data());
  });
}

// dk [L, Tk, D], dv [L, Tk, DV] of these heads.
template <class T>
inline void attend_blocks_backward(EdgeBlocks<T> task, const std::vector<int64_t>& heads, T* dk, T* dv) {
  constexpr int64_t kParts = 8;  // of a head's queries, each with a dk and a dv of its own: as many for any number of threads
  const BlockLoops<T> loops;
  AttentionRows<T>& rows = task.rows;
  loops.set_widths(rows);
  const int64_t all = rows.num_heads, count = static_cast<int64_t>(heads.size()), padded = rows.padded_keys;
  Room<T> k_columns(all * rows.dim * padded), v_columns(all * rows.dim_v * padded), k_rows(all * padded * rows.width);
  rows.k_columns = k_columns.data();
  rows.v_columns = v_columns.data();
  rows.k_rows = k_rows.data();
  for_each_task(count, [&](int64_t h) { loops.pack(task, heads[h]); });
  const int64_t blocks = ceil_div(rows.num_queries, kMapRows), parts = std::min(blocks, kParts);
  const auto backward = [&](int64_t head, int64_t begin, int64_t end, T* dk_part, T* dv_part, T* room) {
    loops.backward(task, head, begin, end, dk_part, dv_part, room);
  };
  backward_by_parts(
      rows, torch::stable::get_num_threads(), count, parts, [&](int64_t h) { return heads[h]; }, backward, dk, dv);
}

}  // namespace cellattn
