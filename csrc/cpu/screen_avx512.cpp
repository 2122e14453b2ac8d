// Scores of sets of genes on processors with AVX-512.

#include "screen.h"

#if defined(__x86_64__)

#include <cmath>
#include <cstring>

// After every include: what a shared header defines must not be compiled for this instruction set.
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,fma,popcnt,bmi,bmi2,prefer-vector-width=512")

namespace cellattn::avx512 {
#define CELLATTN_VECTOR_BYTES 64
#include "screen_impl.h"
}  // namespace cellattn::avx512

#pragma GCC pop_options

#endif
