// Attention along edges on processors with AVX2.

#include "edge_attention.h"

#if defined(__x86_64__)

#include <immintrin.h>

// After every include: what a shared header defines must not be compiled for this instruction set.
#pragma GCC push_options
#pragma GCC target("avx2,fma,popcnt,bmi,bmi2")

namespace cellattn::avx2 {
namespace {
#define CELLATTN_VECTOR_BYTES 32
#include "edge_attention_impl.h"
}  // namespace
CELLATTN_DEFINE_EDGES(float)
CELLATTN_DEFINE_EDGES(double)
}  // namespace cellattn::avx2

#pragma GCC pop_options

#endif
