// Cross-entropy between rows of a graph and rows of scores of all its genes, on the CPU: what the instruction sets share.

#pragma once

#include <cstdint>

namespace cellattn {

// Rows [begin, end) of a block of scores, which are overwritten. A pair that is in no sum is given a score of -inf, which weighs
// nothing on either side: unknown genes; a row's edges, whose terms are made apart; its sharp entry. T is float or double.
template <class T>
struct BceRows {
  T* scores;                // [B, N]
  const T* total;           // [B], the log-sum-exp of each row; null for the sigmoid link
  const int64_t* rows;      // [B], the genes whose rows they are
  const int64_t* rowptr;    // [N + 1]
  const int32_t* col;
  const T* weight;          // of the edges; null where each has the target 1
  const T* inv_mass;        // [N]
  const int64_t* unknown;   // genes
  int64_t num_genes, num_unknown;
  T least, most;            // log a above which a row's largest entry is sharp; log a of no other is above `most`
  int64_t* sharp;           // [B], the gene whose log a is above `least`, or -1; an input of the backward
  T *loss, *sharp_positive, *sharp_negative;  // [B]: without the sharp entry; its t and 1 - t
  const T* dloss;           // [B]
  T* dtotal;                // [B], for the softmax link

  // t of one of the row's `degree` edges; the only one has 1 to the last bit
  T target(int64_t edge, int64_t degree, T inverse) const {
    return weight == nullptr || degree == 1 ? T{1} : static_cast<T>(weight[edge]) * inverse;
  }
};

#define CELLATTN_BCE_FUNCTIONS(T)                                                       \
  /* `edge` has room for the longest row */                                             \
  void bce_forward(const BceRows<T>& task, int64_t begin, int64_t end, T* edge);        \
  void bce_backward(const BceRows<T>& task, int64_t begin, int64_t end, T* edge);

namespace portable {
CELLATTN_BCE_FUNCTIONS(float)
CELLATTN_BCE_FUNCTIONS(double)
}  // namespace portable
#if defined(__x86_64__)
namespace avx2 {
CELLATTN_BCE_FUNCTIONS(float)
CELLATTN_BCE_FUNCTIONS(double)
}  // namespace avx2
namespace avx512 {
CELLATTN_BCE_FUNCTIONS(float)
CELLATTN_BCE_FUNCTIONS(double)
}  // namespace avx512
#endif

}  // namespace cellattn
