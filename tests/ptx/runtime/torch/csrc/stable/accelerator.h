// In the place of PyTorch's: tensors of these tests are on the CPU, where there is no device to make the current one.

#pragma once

#include <torch/csrc/stable/c/shim.h>

namespace torch::stable::accelerator {

using DeviceIndex = int32_t;

class DeviceGuard {
 public:
  explicit DeviceGuard(DeviceIndex) {}
};

}  // namespace torch::stable::accelerator
