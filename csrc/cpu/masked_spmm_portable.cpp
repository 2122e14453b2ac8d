// Masked products on any processor.

#include "masked_spmm.h"

namespace cellattn::portable {
namespace {
#define CELLATTN_VECTOR_BYTES 16
#include "masked_spmm_impl.h"
}  // namespace
CELLATTN_DEFINE_SPMM(float)
CELLATTN_DEFINE_SPMM(double)
}  // namespace cellattn::portable
