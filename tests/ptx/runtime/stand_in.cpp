// A CUDA runtime without a GPU, as far as csrc/cuda asks for one: what is launched goes to the machine for PTX.
//
// Memory is the host's, there is one stream, and everything is done when a call returns. What is not here does not link.

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <map>

namespace {

using Launched = int (*)(const char* kernel, const unsigned* grid_and_block, void** arguments, size_t shared_bytes);
using Filled = void (*)(void* data, size_t size);

Launched launched = nullptr;
Filled filled = nullptr;
int capability = 80;
cudaError_t last = cudaSuccess;
std::map<const void*, const char*>& kernels() {
  static std::map<const void*, const char*> known;
  return known;
}
struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
} pushed;

}  // namespace

extern "C" {

// What the tests call.
void machine_connect(Launched on_launch, Filled on_fill, int chip) {
  launched = on_launch;
  filled = on_fill;
  capability = chip;
}

// What nvcc makes of <<<>>> and of a file with kernels.
void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  kernels()[host] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  pushed = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared = pushed.shared;
  *static_cast<void**>(stream) = pushed.stream;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  const auto found = kernels().find(host);
  const unsigned sizes[] = {grid.x, grid.y, grid.z, block.x, block.y, block.z};
  if (found == kernels().end()) return last = cudaErrorInvalidDeviceFunction;
  return last = launched(found->second, sizes, arguments, shared) == 0 ? cudaSuccess : cudaErrorLaunchFailure;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t on) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, on);
}

// What PyTorch would say. The first is aoti_torch_empty_strided by another name, of tensors that are contiguous.
AOTITorchError aoti_torch_empty_strided(
    int64_t ndim, const int64_t* sizes, const int64_t*, int32_t dtype, int32_t, int32_t, AtenTensorHandle* made) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  const torch::stable::Tensor x = torch::stable::empty(
      torch::headeronly::IntHeaderOnlyArrayRef(sizes, static_cast<size_t>(ndim)),
      to<torch::headeronly::ScalarType>(from(dtype)));
  return aoti_torch_new_tensor_handle(x.get(), made);
}
int aoti_torch_get_current_cuda_stream(int, void** stream) {
  *stream = nullptr;
  return 0;
}

cudaError_t cudaMemsetAsync(void* data, int value, size_t size, cudaStream_t) {
  std::memset(data, value, size);
  filled(data, size);
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  const cudaError_t error = last;
  last = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return last; }
const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "a fault of a kernel"; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  switch (which) {
    case cudaDevAttrComputeCapabilityMajor: *value = capability / 10; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = capability % 10; return cudaSuccess;
    case cudaDevAttrMultiProcessorCount: *value = 108; return cudaSuccess;
    case cudaDevAttrMaxGridDimX: *value = 0x7FFFFFFF; return cudaSuccess;
    default: return last = cudaErrorInvalidValue;
  }
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* about, const void*) {
  std::memset(about, 0, sizeof(*about));
  about->ptxVersion = about->binaryVersion = capability;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  *blocks = 2;
  return cudaSuccess;
}

}  // extern "C"
