// Cross-entropy of rows of scores on processors with AVX2.

#include "attention_bce.h"

#if defined(__x86_64__)

// After every include: what a shared header defines must not be compiled for this instruction set.
#pragma GCC push_options
#pragma GCC target("avx2,fma,popcnt,bmi,bmi2")

namespace cellattn::avx2 {
namespace {
#define CELLATTN_VECTOR_BYTES 32
#include "attention_bce_impl.h"
}  // namespace
CELLATTN_DEFINE_BCE(float)
CELLATTN_DEFINE_BCE(double)
}  // namespace cellattn::avx2

#pragma GCC pop_options

#endif
