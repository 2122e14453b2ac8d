// What the CUDA operators share: the device and stream of a call, launches, and what a warp does with words.
//
// Nothing here or in the operators waits for the device, reads a value on the host or allocates a size that is not known from
// shapes, so every operator can be captured into a CUDA graph. Values are not checked: a seed or column that is no gene is
// skipped, positions in index arrays are clamped to the arrays they point into, and writes are held to their capacities.

#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "../checks.h"

// In libtorch_cuda alone: weak, so that the extension still loads where PyTorch was built for CPUs.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace cellattn::cuda {

#define CELLATTN_CUDA_CHECK(call)                                                                          \
  do {                                                                                                     \
    const cudaError_t error = (call);                                                                      \
    STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error), " (", #call, ")");          \
  } while (false)

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kMaxLayers = 65535;  // of a grid's second dimension; as words, 4 million samples
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// The device of a tensor made the current one, and its current stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& x) : guard_(x.get_device_index()) {
    // The extension has a CUDA runtime of its own; PyTorch's, which the guard speaks to, is another.
    CELLATTN_CUDA_CHECK(cudaSetDevice(x.get_device_index()));
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "CUDA: this PyTorch was built without it");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

  void fill_bytes(void* data, int value, int64_t num_bytes) const {
    if (num_bytes > 0) CELLATTN_CUDA_CHECK(cudaMemsetAsync(data, value, num_bytes, stream_));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// Blocks for that many threads, or warps.
inline int64_t blocks_for(int64_t count, int64_t a_block) {
  const int64_t blocks = ceil_div(count, a_block);
  STD_TORCH_CHECK(blocks <= INT32_MAX, "too large for one launch: ", blocks, " blocks");
  return blocks;
}
inline int64_t blocks_for_threads(int64_t count) { return blocks_for(count, kThreads); }
inline int64_t blocks_for_warps(int64_t count) { return blocks_for(count, kWarps); }

// kernel<<<[num_blocks, layers], kThreads>>>(args...); nothing where there are no blocks.
template <class... Params, class... Args>
void launch(const OnDevice& on, void (*kernel)(Params...), int64_t num_blocks, int64_t layers, const Args&... args) {
  if (num_blocks == 0 || layers == 0) return;
  STD_TORCH_CHECK(layers <= kMaxLayers, "too large for one launch: ", layers, " layers of blocks, at most ", kMaxLayers);
  const dim3 grid(static_cast<unsigned>(num_blocks), static_cast<unsigned>(layers));
  kernel<<<grid, kThreads, 0, on.stream()>>>(static_cast<Params>(args)...);
  CELLATTN_CUDA_CHECK(cudaGetLastError());
}

// ------------------------------------------------------------------------------------------------------ on the device

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x % kWarp); }
__device__ __forceinline__ int64_t thread_index() { return int64_t{blockIdx.x} * kThreads + threadIdx.x; }
__device__ __forceinline__ int64_t warp_index() { return int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp; }

__device__ __forceinline__ unsigned bits_below(int bit) { return (1u << bit) - 1; }

__device__ __forceinline__ bool has_bit(Word word, int bit) { return (word >> bit) & 1; }

__device__ __forceinline__ int64_t clamped(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

// Whether x is in [0, end).
__device__ __forceinline__ bool within(int64_t x, int64_t end) {
  return static_cast<uint64_t>(x) < static_cast<uint64_t>(end);
}
__device__ __forceinline__ bool is_gene(int32_t x, int64_t num_nodes) {
  return static_cast<uint32_t>(x) < static_cast<uint32_t>(num_nodes);
}

// Lane l's bit k becomes lane k's bit l, by swapping ever smaller blocks.
__device__ __forceinline__ unsigned transposed_bits(unsigned x) {
  const unsigned lane = lane_id();
  unsigned mask = 0x0000FFFFu;
#pragma unroll
  for (unsigned width = 16; width != 0; width >>= 1, mask ^= mask << width) {
    const unsigned other = __shfl_xor_sync(kAllLanes, x, width);
    x = lane & width ? (x & ~mask) | ((other >> width) & mask) : (x & mask) | ((other << width) & ~mask);
  }
  return x;
}

}  // namespace cellattn::cuda
