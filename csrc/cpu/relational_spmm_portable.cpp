// Products with several relations on any processor.

#include "relational_spmm.h"

namespace cellattn::portable {
namespace {

#define CELLATTN_VECTOR_BYTES 16
#include "relational_list_impl.h"
#include "relational_spmm_impl.h"

}  // namespace

CELLATTN_DEFINE_RELATIONAL(float)
CELLATTN_DEFINE_RELATIONAL(double)

int64_t count_senders(const int32_t* col, int64_t n, const int32_t* place) { return count_one_by_one(col, n, place); }

}  // namespace cellattn::portable
