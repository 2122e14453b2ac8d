// Attention on processors with AVX2.

#include "attention_rows.h"

#include <type_traits>

#if defined(__x86_64__)

#include <immintrin.h>

// After every include: what a shared header defines must not be compiled for this instruction set.
#pragma GCC push_options
#pragma GCC target("avx2,fma,popcnt,bmi,bmi2")

namespace cellattn::avx2 {
namespace {
#define CELLATTN_VECTOR_BYTES 32
#include "attention_rows_impl.h"
}  // namespace
CELLATTN_DEFINE_ATTENTION(float)
CELLATTN_DEFINE_ATTENTION(double)
}  // namespace cellattn::avx2

#pragma GCC pop_options

#endif
