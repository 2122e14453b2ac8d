// Apart from the operators: CUB's scan takes most of the time to compile.

#include "scan.cuh"

#include <cub/device/device_scan.cuh>

namespace cellattn::cuda {

void exclusive_sum(const OnDevice& on, const Tensor& data) {
  if (data.numel() == 0) return;
  int64_t* x = data.mutable_data_ptr<int64_t>();
  size_t num_bytes = 0;  // known from the size alone
  CELLATTN_CUDA_CHECK(cub::DeviceScan::ExclusiveSum(nullptr, num_bytes, x, x, data.numel(), on.stream()));
  const Tensor scratch = empty_on(data, {std::max<int64_t>(1, static_cast<int64_t>(num_bytes))}, ScalarType::Byte);
  CELLATTN_CUDA_CHECK(
      cub::DeviceScan::ExclusiveSum(scratch.mutable_data_ptr(), num_bytes, x, x, data.numel(), on.stream()));
}

}  // namespace cellattn::cuda
