// Which instruction set the CPU loops use.

#pragma once

#include <cstdlib>
#include <cstring>

namespace cellattn {

// AVX-512 where the processor has it; CELLATTN_ISA=portable asks for the loops that every processor runs.
inline bool use_avx512() {
#if defined(__x86_64__)
  const char* isa = std::getenv("CELLATTN_ISA");
  if (isa != nullptr && std::strcmp(isa, "portable") == 0) return false;
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
#else
  return false;
#endif
}

}  // namespace cellattn
