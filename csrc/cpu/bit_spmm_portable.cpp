// Products of bits with features on any processor.

#include <cstring>

#include "bit_spmm.h"

namespace cellattn::portable {
namespace {
#define CELLATTN_VECTOR_BYTES 16
#include "bit_spmm_impl.h"
}  // namespace
CELLATTN_DEFINE_BIT_SPMM(float)
CELLATTN_DEFINE_BIT_SPMM(double)
}  // namespace cellattn::portable
