// Which instruction set the CPU loops use.

#pragma once

#include <cstdlib>
#include <cstring>

namespace cellattn {

// CELLATTN_ISA asks for less than this processor has: "portable" for the loops that every processor runs, "avx2" for those of
// one without AVX-512.
inline bool asked_for(const char* isa) {
  const char* given = std::getenv("CELLATTN_ISA");
  return given != nullptr && std::strcmp(given, isa) == 0;
}

inline bool use_avx512() {
#if defined(__x86_64__)
  return !asked_for("portable") && !asked_for("avx2") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi2");
#else
  return false;
#endif
}

inline bool use_avx512_bf16() {
#if defined(__x86_64__)
  return use_avx512() && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

inline bool use_avx2() {
#if defined(__x86_64__)
  return !asked_for("portable") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi2");
#else
  return false;
#endif
}

}  // namespace cellattn
