// Induced edges of every sample and relation, on the CPU: what the two instruction sets share.
//
// Counted 64 samples at a time, written a group of 16 or 32 at a time. For the group a table rank [N, group] holds the position
// of each gene among a sample's genes, -1 where it is not one of them; it is a cache line a gene (int32 or int16) and is made
// anew for each group, so that memory does not grow with the batch. A chunk of rows of one relation is then read once for
// the group: an edge (i, j) belongs to the samples where neither rank is negative. Each sample's edges go through a staging
// buffer that is widened to the index type, moved to its place in `node` and written past the caches, a whole line at a time:
// a batch writes more bytes than anything else here, and every byte is written once.

#pragma once

#include <cstdint>

#include "../bits.h"

namespace cellattn {

constexpr int64_t kMostSamples = 32;  // of a group
constexpr int64_t kStaged = 256;      // edges of a sample that are staged
constexpr int64_t kSlack = 16;        // a vector may be stored past them
constexpr int64_t kChunkEdges = 1 << 15;

// Rows [begin, end) of a relation: the edges of a task.
struct RowChunk {
  int64_t relation, begin, end;
};

constexpr int kPlanes = 40;           // of bit-sliced counters: plane k holds bit k of 64 of them

// What a task writes, for the samples of a group.
struct WriteTask {
  const int64_t* rowptr;  // of the relation: [N + 1], stacked numbering
  const int32_t* col;     // of the stack
  const void* rank;       // [N, group]
  int64_t first_row, last_row;
  int64_t group_size;
  int64_t position[kMostSamples];  // where each sample's next edge goes, within the relation
  int64_t node_base[kMostSamples];
  int64_t capacity;   // places of the relation
  int64_t num_places; // of `node`
  void* source;       // null in CSR layout
  void* target;
  void* edge_id;     // may be null
  void* csr_rowptr;  // of the relation; null in COO layout
};

#define CELLATTN_INDUCED_FUNCTIONS                                                                                  \
  /* counts[b] += the edges of rows [begin, end) with both ends in sample b; words [N], one column of the sets. */ \
  void count_edges(                                                                                                 \
      const int64_t* rowptr, const int32_t* col, const Word* words, int64_t begin, int64_t end, int64_t* counts);   \
  void write_edges32(const WriteTask& task);                                                                        \
  void write_edges64(const WriteTask& task);

namespace portable {
CELLATTN_INDUCED_FUNCTIONS
}
#if defined(__x86_64__)
namespace avx512 {
CELLATTN_INDUCED_FUNCTIONS
}
#endif

}  // namespace cellattn
