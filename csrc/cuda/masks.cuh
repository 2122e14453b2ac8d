// Sets as words on the device, for the operators that begin with them.

#pragma once

#include "common.cuh"

namespace cellattn::cuda {

// words [num_nodes, W] of the sets, or of what is outside them.
void write_set_words(
    const OnDevice& on, const Tensor& seeds, const Tensor& ptr, int64_t num_nodes, bool complement, const Tensor& words);

}  // namespace cellattn::cuda
