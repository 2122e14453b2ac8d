// Scores of sets of genes on processors with AVX2.

#include "screen.h"

#if defined(__x86_64__)

#include <cmath>
#include <cstring>

// After every include: what a shared header defines must not be compiled for this instruction set.
#pragma GCC push_options
#pragma GCC target("avx2,fma,popcnt,bmi,bmi2")

namespace cellattn::avx2 {
#define CELLATTN_VECTOR_BYTES 32
#include "screen_impl.h"
}  // namespace cellattn::avx2

#pragma GCC pop_options

#endif
