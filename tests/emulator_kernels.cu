// Kernels with one fault each, and good ones beside them: what test_emulator.py shows to be caught.
#include "launch.h"

using namespace d2v;

namespace faults {

D2V_DEVICE float* shared_floats() { return reinterpret_cast<float*>(shared_memory()); }

// y = x with the block's threads reversed, through shared memory; racy without the barrier
D2V_KERNEL void reverse_kernel(const float* x, float* y, int with_barrier) {
  const int t = thread_id(), n = num_threads();
  shared_floats()[t] = x[block_x() * n + t];
  if (with_barrier) block_barrier();
  y[block_x() * n + t] = shared_floats()[n - 1 - t];
}

// adds up two tiles in one buffer; without the second barrier the buffer is overwritten while others still read it
D2V_KERNEL void reuse_kernel(const float* x, float* y, int with_barrier) {
  const int t = thread_id(), n = num_threads();
  float sum = 0;
  for (int tile = 0; tile < 2; ++tile) {
    shared_floats()[t] = x[tile * n + t];
    block_barrier();
    sum += shared_floats()[n - 1 - t];
    if (with_barrier) block_barrier();
  }
  y[t] = sum;
}

D2V_KERNEL void leave_kernel(float* y, int leaver) {
  if (thread_id() == leaver) return;
  block_barrier();
  y[thread_id()] = 1;
}

D2V_KERNEL void diverge_kernel(float* y, int apart) {
  if (apart && thread_id() % 2) warp_barrier();
  else y[thread_id()] = shuffle_xor(1.f, 2);
}

D2V_KERNEL void write_shared_kernel(float* y, int index) {
  shared_floats()[index] = 1;
  y[0] = shared_floats()[index];
}

D2V_KERNEL void write_global_kernel(float* y, int index) { y[index] = 1; }

D2V_KERNEL void matrix_row_kernel(float* y, int shift) {
  uint32_t r[4];
  store_words(shared_memory() + 16 * thread_id(), Words4{1, 2, 3, 4});
  warp_barrier();
  load_matrices(r, shared_memory() + 16 * thread_id() + shift);
  y[thread_id()] = float(r[0]);
}

// copies through shared memory; reads before the wait without it
D2V_KERNEL void copy_kernel(const float* x, float* y, int with_wait) {
  const int t = thread_id();
  async_copy16(shared_memory() + 16 * t, x + 4 * t, true);
  async_commit();
  if (with_wait) async_wait<0>();
  for (int i = 0; i < 4; ++i) y[4 * t + i] = shared_floats()[4 * t + i];
}

// the block's own part of y, and `extra` elements of the next block's
D2V_KERNEL void overlap_kernel(float* y, int extra) {
  const int t = thread_id(), n = num_threads();
  y[block_x() * n + t] = float(t);
  if (t < extra) y[(block_x() + 1) * n + t] = float(t);
}

// the order in which threads come by, without any synchronisation: for the seed only
D2V_KERNEL void order_kernel(float* y, int* counter) {
  y[thread_id()] = float((*counter)++);
  block_barrier();
}

}  // namespace faults

#define LAUNCHER(name, blocks, threads, shared, ...)                                       \
  extern "C" int name([[maybe_unused]] const float* x, float* y, int argument) {           \
    return launch(faults::name##_kernel, {blocks}, threads, shared, nullptr, __VA_ARGS__); \
  }

LAUNCHER(reverse, 3, 96, 96 * 4, x, y, argument)
LAUNCHER(reuse, 1, 64, 64 * 4, x, y, argument)
LAUNCHER(leave, 2, 64, 0, y, argument)
LAUNCHER(diverge, 1, 32, 0, y, argument)
LAUNCHER(write_shared, 1, 1, 64, y, argument)
LAUNCHER(write_global, 1, 1, 0, y, argument)
LAUNCHER(matrix_row, 1, 32, 512, y, argument)
LAUNCHER(copy, 1, 32, 512, x, y, argument)
LAUNCHER(overlap, 2, 32, 0, y, argument)

extern "C" int ask_for_shared(const float*, float* y, int bytes) {
  return launch(faults::write_global_kernel, {1}, 1, size_t(bytes), nullptr, y, 0);
}

extern "C" int order(float* y, int* counter) {
  return launch(faults::order_kernel, {1}, 64, 0, nullptr, y, counter);
}
