// Grouped "same" convolutions over frames with what lies between them: forward and backward of one layer.
//
// Rows are frames, [rows, C] with C = groups * width channels, 16-bit (bf16 or fp16), on 16-byte boundaries.
// A tile is up to 256 rows of one segment: `tiles` [num_tiles, 3] int64 holds its first row and the segment's first
// and last + 1; null: segments of `frames` rows each, num_tiles = rows / frames * ceil(frames / 256).
// Weights: [groups, taps, width, width] 16-bit, the convolution's output before its input channels. Outputs are stored
// in an order of their own: place 8 j + 2 q + e of each 16 holds channel 4 q + 2 j + e (e, j < 2, q < 4).
// Returns 0 or an error code of CUDA.
#pragma once
#include <cstddef>
#include <cstdint>

extern "C" {

struct D2vPosConvShape {
  int64_t rows, num_tiles, frames;
  int64_t groups, width, taps;  // width 32, 48, 64 or 80
  int64_t bf16;                 // 1: bf16, 0: fp16
  const int64_t* tiles;
};

// Shared memory in bytes of the kernel that needs most.
size_t d2v_pos_conv_shared_bytes(int64_t width, int64_t taps);

// z = conv(in) + bias. `activate`: in = gelu(norm(x)), where `sums` [rows, groups, 2] fp32 are what the layer below
// left (null: no norm), and `stats` [2, rows] fp32 gets mean and 1 / deviation; otherwise in = x.
// `z_sums` gets mean and sum of squared deviations of each frame and group of z; null: nobody needs them.
int d2v_pos_conv_fwd(const void* x, const float* sums, float* stats, const void* weight, const float* bias, void* z,
                     float* z_sums, int64_t activate, double eps, const D2vPosConvShape* shape, void* stream);

// Gradient towards the input. `grad` is that of z; or, where `sums` [rows, groups, 2] are given (of it, and of its
// product with norm(z)), that of norm(z): `grad_z` gets the gradient of z then.
// below null: `out` is the gradient of the input. Otherwise the input is gelu(norm(below)) with `below_stats` (null: no
// norm): `out` gets the gradient of norm(below), `out_sums` its sums, `below_y` the input itself.
int d2v_pos_conv_dgrad(const void* grad, const void* z, const float* stats, const float* sums, void* grad_z,
                       const void* weight, const void* below, const float* below_stats, void* out, float* out_sums,
                       void* below_y, const D2vPosConvShape* shape, void* stream);

// Gradients of the weights [C, width in, taps] and of the bias [C] (or null), from that of z and the convolution's
// input. Tiles are dealt out to `shares` that are added up in the end: [shares, groups, taps, width out, width in] and
// [shares, C] (or null) hold what each of them found.
int d2v_pos_conv_wgrad(const void* grad, const void* x, float* weight_shares, float* bias_shares, float* grad_weight,
                       float* grad_bias, int64_t shares, const D2vPosConvShape* shape, void* stream);
}
