// What a kernel needs from the machine, under one set of names: nvcc compiles the CUDA half below, and with D2V_EMULATE
// a C++ compiler takes emulator/simt.h instead, so that the same kernels run on a CPU in tests.
#pragma once
#include <cstddef>
#include <cstdint>

#ifdef D2V_EMULATE
#include "../emulator/simt.h"
#else
#define D2V_DEVICE __device__ __forceinline__
#define D2V_KERNEL __global__
#define D2V_BOUNDS(threads, blocks_per_sm) __launch_bounds__(threads, blocks_per_sm)

namespace d2v {

struct alignas(16) Words4 {
  uint32_t x, y, z, w;
};
struct alignas(8) Words2 {
  uint32_t x, y;
};

D2V_DEVICE int thread_id() { return threadIdx.x; }
D2V_DEVICE int num_threads() { return blockDim.x; }
D2V_DEVICE int block_x() { return blockIdx.x; }
D2V_DEVICE int block_y() { return blockIdx.y; }
D2V_DEVICE int block_z() { return blockIdx.z; }
D2V_DEVICE int grid_x() { return gridDim.x; }
D2V_DEVICE int grid_y() { return gridDim.y; }
D2V_DEVICE int grid_z() { return gridDim.z; }

// all threads of the block; of the warp
D2V_DEVICE void block_barrier() { __syncthreads(); }
D2V_DEVICE void warp_barrier() { __syncwarp(); }

D2V_DEVICE float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
D2V_DEVICE double shuffle_xor(double v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
D2V_DEVICE float shuffle(float v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }

D2V_DEVICE float exp2_fast(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
D2V_DEVICE float reciprocal_fast(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
D2V_DEVICE float saturate(float x) { return __saturatef(x); }  // into [0, 1]; NaN becomes 0
D2V_DEVICE float rsqrt_accurate(float x) { return 1.f / __fsqrt_rn(x); }
D2V_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
D2V_DEVICE float bits_float(uint32_t x) { return __uint_as_float(x); }

// two 16-bit elements in a word, the first in the low half; conversions round to nearest even
struct Bf16 {
  D2V_DEVICE static uint32_t pack(float first, float second) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(second), "f"(first));
    return r;
  }
  D2V_DEVICE static float first(uint32_t v) { return __uint_as_float(v << 16); }
  D2V_DEVICE static float second(uint32_t v) { return __uint_as_float(v & 0xffff0000u); }
};
struct F16 {
  D2V_DEVICE static uint32_t pack(float first, float second) {
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(second), "f"(first));
    return r;
  }
  D2V_DEVICE static float first(uint32_t v) {
    float r;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(r) : "r"(v));
    return r;
  }
  D2V_DEVICE static float second(uint32_t v) {
    float r;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(r) : "r"(v));
    return r;
  }
};

// c [16 x 8] += a [16 x 16] b [16 x 8], fragments as in the PTX manual (mma.m16n8k16); T is Bf16 or F16
template <class T>
D2V_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
#define D2V_MMA(T, TYPE)                                                                                              \
  template <>                                                                                                         \
  D2V_DEVICE void mma<T>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {                             \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},"            \
        "{%0,%1,%2,%3};"                                                                                              \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                              \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                          \
  }
D2V_MMA(Bf16, "bf16")
D2V_MMA(F16, "f16")
#undef D2V_MMA

// ldmatrix: lane i gives the address (16-byte aligned, shared) of row i % 8 of 8 x 8 matrix i / 8 of 16-bit elements;
// result r[m]: row lane / 4, columns 2 * (lane % 4) and the next of matrix m (transposed: of its transpose)
D2V_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
D2V_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
D2V_DEVICE void load_matrices(uint32_t (&r)[2], const void* row) {  // lanes 0 to 15 give addresses
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
D2V_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
D2V_DEVICE void load_matrices_transposed(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
// movmatrix: transposes an 8 x 8 matrix of 16-bit elements spread over the warp, one row to four lanes
D2V_DEVICE uint32_t transpose_8x8(uint32_t v) {
  uint32_t r;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
  return r;
}

// cp.async of 16 bytes to shared memory; zeros instead where not valid (the source is not read then)
D2V_DEVICE void async_copy16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
D2V_DEVICE void async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// waits until at most PENDING of this thread's newest groups are under way; a barrier makes them visible to others
template <int PENDING>
D2V_DEVICE void async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

template <class W>
D2V_DEVICE W load_words(const void* p) {  // Words2 or Words4, through the read-only cache
  if constexpr (sizeof(W) == 16) {
    const uint4 v = __ldg(static_cast<const uint4*>(p));
    return W{v.x, v.y, v.z, v.w};
  } else {
    const uint2 v = __ldg(static_cast<const uint2*>(p));
    return W{v.x, v.y};
  }
}
template <class W>
D2V_DEVICE void store_words(void* p, W v) {
  *static_cast<W*>(p) = v;
}

extern __shared__ __align__(16) unsigned char dynamic_shared[];
D2V_DEVICE unsigned char* shared_memory() { return dynamic_shared; }

}  // namespace d2v
#endif
