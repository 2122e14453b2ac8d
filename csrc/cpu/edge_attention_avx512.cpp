// Attention along edges on processors with AVX-512.

#include "edge_attention.h"

#if defined(__x86_64__)

#include <immintrin.h>

// After every include: what a shared header defines must not be compiled for this instruction set.
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,fma,popcnt,bmi,bmi2,prefer-vector-width=512")

namespace cellattn::avx512 {
namespace {
#define CELLATTN_VECTOR_BYTES 64
#include "edge_attention_impl.h"
}  // namespace
CELLATTN_DEFINE_EDGES(float)
CELLATTN_DEFINE_EDGES(double)
}  // namespace cellattn::avx512

#pragma GCC pop_options

#endif
