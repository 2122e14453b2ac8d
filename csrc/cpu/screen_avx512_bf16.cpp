// Scores of sets of genes on processors with AVX-512 and products of bfloat16.

#include "screen.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cmath>
#include <cstring>

// After every include: what a shared header defines must not be compiled for this instruction set.
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,fma,popcnt,bmi,bmi2,prefer-vector-width=512")

namespace cellattn::avx512_bf16 {
#define CELLATTN_VECTOR_BYTES 64
#define CELLATTN_BF16_PAIRS
#include "screen_impl.h"
}  // namespace cellattn::avx512_bf16

#pragma GCC pop_options

#endif
