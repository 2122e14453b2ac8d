// Prefix sums on the device.

#pragma once

#include "common.cuh"

namespace cellattn::cuda {

// data[i] becomes the sum of what stood before it: int64 [n], in place.
void exclusive_sum(const OnDevice& on, const Tensor& data);

}  // namespace cellattn::cuda
