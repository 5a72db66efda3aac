// First convolution of the speech front-end (one channel in) with norm and GELU: forward and backward.
//
// waveforms: rows of float32 samples; frame t of row b reads `taps` samples from b * row_stride + t * stride on. Frames
// of all rows in order make the rows of y [rows * frames_per_row, C], 16-bit (bf16 or fp16), on 16-byte boundaries.
// Layer norm: over the C channels of a frame. Group norm: of each channel over the frames of each segment; frames
// outside are 0. Segments [num_segments, 2] int64 (first frame, frames) are apart, each in one row, and are cut to it;
// table [num_segments + 1, 4] int64 is memory for what is worked out from them. Null: every row is a segment.
// Sizes TAPS, WIDTH, COLUMNS, FACTOR_SIZE: 10, 16, 16, 24 for 10 taps, otherwise 16, 32, 24, 60 (up to 16 taps).
// Returns 0 or an error code of CUDA.
#pragma once
#include <cstdint>

extern "C" {

struct D2vConv0 {
  const float* waveforms;
  int64_t row_stride, rows, frames_per_row, stride;
  const int64_t* segments;
  int64_t* table;
  int64_t num_segments;  // rows, where segments is null
  const float* weight;   // [C, taps]
  const float* bias;     // [C] or null: none
  const float* gamma;    // [C] or null: 1
  const float* beta;     // [C] or null: 0
  int64_t C, taps;       // C a multiple of 64
  double eps;
  int64_t layer;     // 1: layer norm, 0: group norm
  int64_t bf16;      // type of y and of its gradient; 1: bf16, 0: fp16
  int64_t programs;  // blocks that share the frames
};

// Memory to work in.
struct D2vConv0Fold {
  void* folded;     // [num_segments (layer norm: 1), 2, C, WIDTH] 16-bit
  float* table;     // layer norm: [4, FACTOR_SIZE]; group norm: [num_segments, TAPS]
  double* scratch;  // layer norm: [TAPS + 1]; group norm: [num_segments, shares, (taps + 1) (taps + 2) / 2], in forward
  int64_t shares;   // into how many the frames of a segment are cut for its moments
};

// What backward adds up. Layer norm: programs rows and one segment; group norm: programs + num_segments - 1 rows.
struct D2vConv0Sums {
  float* outer;      // [rows, C, COLUMNS]
  float* outer_sum;  // [segments, C, COLUMNS]
  float* inner;      // layer norm: [programs, C / 64, WIDTH, COLUMNS]
  float* inner_sum;  // layer norm: [WIDTH, COLUMNS]
};

// stats, for backward. Layer norm: 1 / deviation of every frame, float32. Group norm: mean and covariance of the taps,
// [num_segments, taps + taps * taps] float64.
int d2v_conv0_fwd(const D2vConv0* problem, const D2vConv0Fold* fold, void* y, void* stats, void* stream);

// grads [C, taps + 3] float32: of weight, bias, gamma, beta. dy: gradient of y.
int d2v_conv0_bwd(const D2vConv0* problem, const D2vConv0Fold* fold, const D2vConv0Sums* sums, const void* dy,
                  const void* stats, float* grads, void* stream);
}
