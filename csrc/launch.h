// Launches a kernel of kernels/*.cuh, on a stream or in the emulator. No torch headers: nvcc needs seconds.
#pragma once
#include "kernels/simt.cuh"
#ifndef D2V_EMULATE
#include <cuda_runtime.h>
#endif

namespace d2v {

struct Grid {
  int64_t x = 1, y = 1, z = 1;
};

#ifdef D2V_EMULATE

constexpr int INVALID_ARGUMENT = 1;  // cudaErrorInvalidValue

inline int multiprocessors(int* count) {
  *count = 2;
  return 0;
}

template <class... P, class... A>
int launch(void (*kernel)(P...), Grid grid, int threads, size_t shared_bytes, void*, A... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return 0;
  const int blocks[3] = {int(grid.x), int(grid.y), int(grid.z)};
  return emulator::launch(reinterpret_cast<const void*>(kernel), blocks, threads, shared_bytes,
                          [&] { kernel(static_cast<P>(arguments)...); });
}

#else

constexpr int INVALID_ARGUMENT = cudaErrorInvalidValue;

inline int multiprocessors(int* count) {  // of the current device
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error ? error : cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

template <class... P, class... A>
int launch(void (*kernel)(P...), Grid grid, int threads, size_t shared_bytes, void* stream, A... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return 0;
  if (grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffff) return cudaErrorInvalidConfiguration;
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error) return error;
  }
  kernel<<<dim3(unsigned(grid.x), unsigned(grid.y), unsigned(grid.z)), threads, shared_bytes,
           static_cast<cudaStream_t>(stream)>>>(static_cast<P>(arguments)...);
  return cudaGetLastError();
}

#endif

}  // namespace d2v
