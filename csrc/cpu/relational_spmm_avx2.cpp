// Products with several relations on processors with AVX2.

#include "relational_spmm.h"

#if defined(__x86_64__)

// After every include: what a shared header defines must not be compiled for this instruction set.
#pragma GCC push_options
#pragma GCC target("avx2,fma,popcnt,bmi,bmi2")

namespace cellattn::avx2 {
namespace {

#define CELLATTN_VECTOR_BYTES 32
#include "relational_list_impl.h"
#include "relational_spmm_impl.h"

}  // namespace

CELLATTN_DEFINE_RELATIONAL(float)
CELLATTN_DEFINE_RELATIONAL(double)

int64_t count_senders(const int32_t* col, int64_t n, const int32_t* place) { return count_one_by_one(col, n, place); }

}  // namespace cellattn::avx2

#pragma GCC pop_options

#endif
