#include "conv0.h"

#include "kernels/conv0_bwd.cuh"
#include "kernels/conv0_finish.cuh"
#include "kernels/conv0_fwd.cuh"
#include "kernels/conv0_prepare.cuh"
#include "launch.h"

namespace {

using namespace d2v;

constexpr int MAX_TAPS = 16;
constexpr int CLEAR_THREADS = 128, CLEAR_SHARES = 8;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Threads of a block: a warp a thing, at most `most`.
int threads_for(int64_t things, int most) { return 32 * int(things < most ? things : most); }

Conv0Input input_of(const D2vConv0& p) {
  return {p.waveforms, p.row_stride, p.frames_per_row, p.stride, p.segments ? p.table : nullptr,
          p.num_segments, int(p.taps)};
}

Conv0Parameters parameters_of(const D2vConv0& p) { return {p.weight, p.bias, p.gamma, p.beta, p.C, int(p.taps)}; }

// Warps of a block, at most `most`, and blocks for all channels.
struct Channels {
  int64_t warps, blocks;
  Channels(int64_t C, int64_t most) {
    const int64_t all = C / CONV0_CHANNELS;
    blocks = ceil_div(all, most);
    warps = ceil_div(all, blocks);
  }
};

// Calls run(Conv0Shape, element type) for what the problem says.
template <class F>
int for_problem(const D2vConv0& p, F run) {
  if (p.taps < 1 || p.taps > MAX_TAPS || p.C % CONV0_CHANNELS || p.programs < 1) return INVALID_ARGUMENT;
  const auto with_type = [&](auto shape) { return p.bf16 ? run(shape, Bf16{}) : run(shape, F16{}); };
  return p.taps == 10 ? with_type(Conv0Shape<10>{}) : with_type(Conv0Shape<MAX_TAPS>{});
}

size_t pair_bytes(int columns, int threads) {
  const int rows = columns * CONV0_LAID_OUT_ROWS;
  return sizeof(double) * size_t(rows > threads ? rows : threads);
}

int find_moments(const D2vConv0& p, const D2vConv0Fold& fold, double* moments, void* stream) {
  const int n = int(p.taps) + 1;
  const size_t shared = pair_bytes(n, CONV0_PREPARE_THREADS);
  const Conv0Input in = input_of(p);
  const int error = launch(conv0_products, {p.num_segments, fold.shares}, CONV0_PREPARE_THREADS, shared, stream, in,
                           fold.scratch);
  if (error) return error;
  return launch(conv0_moments, {p.num_segments}, CONV0_PREPARE_THREADS, shared, stream, in, fold.scratch, fold.shares,
                moments);
}

int find_table(const D2vConv0& p, void* stream) {
  if (!p.segments) return 0;
  const int threads = threads_for(ceil_div(p.num_segments, 32), CONV0_PREPARE_THREADS / 32);
  return launch(conv0_segment_table, {1}, threads, threads * sizeof(int64_t), stream, input_of(p), p.segments, p.rows,
                p.table);
}

template <class S>
int fold_weights(const D2vConv0& p, const D2vConv0Fold& fold, const double* moments, float scale, void* stream) {
  uint32_t* folded = static_cast<uint32_t*>(fold.folded);
  if (p.layer) {
    constexpr int N = S::TAPS + 1;
    const size_t shared = pair_bytes(N + 1, CONV0_LAYER_THREADS) + sizeof(double) * (N * N + N);
    return launch(conv0_layer_weights<S>, {1}, CONV0_LAYER_THREADS, shared, stream, parameters_of(p), scale,
                  fold.scratch, fold.table, folded);
  }
  const Grid grid{p.num_segments, ceil_div(p.C, CONV0_PREPARE_THREADS / 32)};
  return launch(conv0_group_weights<S>, grid, CONV0_PREPARE_THREADS, 0, stream, parameters_of(p), moments, float(p.eps),
                scale, folded, fold.table);
}

template <class S, class T, bool LAYER>
int run_forward(const D2vConv0& p, const D2vConv0Fold& fold, void* y, void* stats, void* stream) {
  const Channels channels(p.C, CONV0_MAX_WARPS);
  size_t shared = (2 * Conv0Fragments<S>::SIZE + size_t(channels.warps) * Conv0FwdWeights<S>::SIZE) * sizeof(Words4);
  if (LAYER) shared += 4 * S::FACTOR_SIZE * sizeof(float);
  float* rstd = LAYER ? static_cast<float*>(stats) : nullptr;
  return launch(conv0_fwd<S, T, LAYER>, {p.programs, channels.blocks}, int(32 * channels.warps), shared, stream,
                input_of(p), static_cast<const uint32_t*>(fold.folded), fold.table, fold.table, float(p.eps), p.C,
                static_cast<uint16_t*>(y), rstd);
}

template <class S, class T, bool LAYER>
int run_backward(const D2vConv0& p, const D2vConv0Fold& fold, const D2vConv0Sums& sums, const void* dy,
                 const void* stats, void* stream) {
  const Channels channels(p.C, CONV0_BWD_WARPS<S>);
  const size_t shared =
      (2 * Conv0Fragments<S>::SIZE + size_t(channels.warps) * Conv0BwdWeights<S, LAYER>::SIZE) * sizeof(Words4);
  const float* rstd = LAYER ? static_cast<const float*>(stats) : nullptr;
  return launch(conv0_bwd<S, T, LAYER>, {p.programs, channels.blocks}, int(32 * channels.warps), shared, stream,
                input_of(p), static_cast<const uint32_t*>(fold.folded), p.gamma, fold.table, rstd, p.C,
                static_cast<const uint16_t*>(dy), sums.outer, sums.inner);
}

template <class S>
int finish(const D2vConv0& p, const D2vConv0Fold& fold, const D2vConv0Sums& sums, const void* stats, float* grads,
           void* stream) {
  const int64_t segments = p.layer ? 1 : p.num_segments;
  const int64_t outer_columns = p.C * S::COLUMNS, inner_columns = p.layer ? S::WIDTH * S::COLUMNS : 0;
  const int64_t outer_blocks = ceil_div(outer_columns, 32);
  const Grid grid{outer_blocks + ceil_div(inner_columns, 32), segments};
  const int64_t rows = p.layer ? p.programs * (p.C / CONV0_CHANNELS) : p.programs;
  const int threads = threads_for(ceil_div(rows, CONV0_ROWS_AT_ONCE), CONV0_REDUCE_WARPS);
  const int error = launch(conv0_reduce, grid, threads, threads * sizeof(double), stream, input_of(p), p.programs,
                           bool(p.layer), sums.outer, outer_columns, outer_blocks, sums.inner, inner_columns,
                           p.C / CONV0_CHANNELS, sums.outer_sum, sums.inner_sum);
  if (error) return error;
  if (p.layer) {
    const Grid elements{ceil_div(p.C * (p.taps + 3), 32 * CONV0_GRADS_WARPS)};
    return launch(conv0_layer_grads<S>, elements, 32 * CONV0_GRADS_WARPS, 0, stream, parameters_of(p), fold.scratch,
                  sums.outer_sum, sums.inner_sum, grads);
  }
  const int group_threads = threads_for(p.num_segments, CONV0_GRADS_WARPS);
  return launch(conv0_group_grads<S>, {p.C}, group_threads, group_threads * sizeof(double), stream, parameters_of(p),
                static_cast<const double*>(stats), float(p.eps), p.num_segments, sums.outer_sum, grads);
}

}  // namespace

int d2v_conv0_fwd(const D2vConv0* problem, const D2vConv0Fold* fold, void* y, void* stats, void* stream) {
  const D2vConv0& p = *problem;
  return for_problem(p, [&](auto shape, auto type) {
    using S = decltype(shape);
    using T = decltype(type);
    double* moments = p.layer ? nullptr : static_cast<double*>(stats);
    if (const int error = find_table(p, stream)) return error;
    if (!p.layer) {
      if (const int error = find_moments(p, *fold, moments, stream)) return error;
      if (p.segments) {
        const Grid grid{p.num_segments + 1, CLEAR_SHARES};
        const int error = launch(conv0_clear, grid, CLEAR_THREADS, 0, stream, input_of(p), p.rows * p.frames_per_row,
                                 p.C, static_cast<uint16_t*>(y));
        if (error) return error;
      }
    }
    if (const int error = fold_weights<S>(p, *fold, moments, 1.f, stream)) return error;
    return p.layer ? run_forward<S, T, true>(p, *fold, y, stats, stream)
                   : run_forward<S, T, false>(p, *fold, y, stats, stream);
  });
}

int d2v_conv0_bwd(const D2vConv0* problem, const D2vConv0Fold* fold, const D2vConv0Sums* sums, const void* dy,
                  const void* stats, float* grads, void* stream) {
  const D2vConv0& p = *problem;
  return for_problem(p, [&](auto shape, auto type) {
    using S = decltype(shape);
    using T = decltype(type);
    const double* moments = p.layer ? nullptr : static_cast<const double*>(stats);
    if (const int error = find_table(p, stream)) return error;
    if (const int error = fold_weights<S>(p, *fold, moments, CONV0_BWD_SCALE, stream)) return error;
    const int error = p.layer ? run_backward<S, T, true>(p, *fold, *sums, dy, stats, stream)
                              : run_backward<S, T, false>(p, *fold, *sums, dy, stats, stream);
    return error ? error : finish<S>(p, *fold, *sums, stats, grads, stream);
  });
}
