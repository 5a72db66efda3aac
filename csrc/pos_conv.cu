#include "pos_conv.h"

#include <algorithm>
#include <type_traits>

#include "kernels/pos_conv.cuh"
#include "kernels/pos_conv_wgrad.cuh"
#include "launch.h"

namespace {

using namespace d2v;

template <int D>
using Width = std::integral_constant<int, D>;

// Calls run(element type, width) for what the shape says.
template <class F>
int for_shape(const D2vPosConvShape& shape, F run) {
  const auto with_width = [&](auto type) {
    switch (shape.width) {
      case 32: return run(type, Width<32>{});
      case 48: return run(type, Width<48>{});
      case 64: return run(type, Width<64>{});
      case 80: return run(type, Width<80>{});
      default: return int(INVALID_ARGUMENT);
    }
  };
  return shape.bf16 ? with_width(Bf16{}) : with_width(F16{});
}

Tiles tiles_of(const D2vPosConvShape& shape) { return {shape.tiles, int(shape.frames), int(shape.num_tiles)}; }

int run_conv(ConvArgs args, const D2vPosConvShape& shape, void* stream) {
  args.tiles = tiles_of(shape);
  args.rows = shape.rows;
  args.groups = int(shape.groups);
  args.taps = int(shape.taps);
  return for_shape(shape, [&](auto type, auto width) {
    const auto kernel = pos_conv_kernel<decltype(type), width()>;
    const size_t shared = conv_shared_bytes<width()>(args.taps);
    return launch(kernel, {shape.num_tiles, shape.groups, 1}, CONV_THREADS, shared, stream, args);
  });
}

const uint16_t* elements(const void* p) { return static_cast<const uint16_t*>(p); }
uint16_t* elements(void* p) { return static_cast<uint16_t*>(p); }

}  // namespace

size_t d2v_pos_conv_shared_bytes(int64_t width, int64_t taps) {
  D2vPosConvShape shape{};
  shape.width = width;
  return size_t(for_shape(shape, [&](auto, auto width) {
    const size_t conv = conv_shared_bytes<width()>(int(taps)), wgrad = wgrad_shared_bytes<width()>(WGRAD_MAX_WARPS);
    return int(std::max({conv, wgrad, wgrad_sum_shared_bytes(width(), int(taps))}));
  }));
}

int d2v_pos_conv_fwd(const void* x, const float* sums, float* stats, const void* weight, const float* bias, void* z,
                     float* z_sums, int64_t activate, double eps, const D2vPosConvShape* shape, void* stream) {
  ConvArgs args{};
  args.padding = int(shape->taps / 2);
  args.eps = float(eps);
  args.input = activate ? ACTIVATION : AS_IT_IS;
  args.output = WITH_SUMS;
  args.x = elements(x);
  args.weight = elements(weight);
  args.sums = sums;
  args.stats = stats;
  args.bias = bias;
  args.out = elements(z);
  args.out_sums = z_sums;
  return run_conv(args, *shape, stream);
}

int d2v_pos_conv_dgrad(const void* grad, const void* z, const float* stats, const float* sums, void* grad_z,
                       const void* weight, const void* below, const float* below_stats, void* out, float* out_sums,
                       void* below_y, const D2vPosConvShape* shape, void* stream) {
  ConvArgs args{};
  args.padding = int(shape->taps - 1 - shape->taps / 2);
  args.flipped = true;
  args.input = sums ? NORM_GRAD : AS_IT_IS;
  args.output = below ? THROUGH_GELU : RESULT;
  args.x = elements(grad);
  args.weight = elements(weight);
  args.z = elements(z);
  args.sums = sums;
  args.stats = const_cast<float*>(stats);
  args.in_copy = elements(grad_z);
  args.out = elements(out);
  args.out_sums = out_sums;
  args.below = elements(below);
  args.below_stats = below_stats;
  args.below_copy = elements(below_y);
  return run_conv(args, *shape, stream);
}

int d2v_pos_conv_wgrad(const void* grad, const void* x, float* weight_shares, float* bias_shares, float* grad_weight,
                       float* grad_bias, int64_t shares, const D2vPosConvShape* shape, void* stream) {
  const int groups = int(shape->groups), taps = int(shape->taps), width = int(shape->width);
  const int blocks = (taps + WGRAD_MAX_WARPS - 1) / WGRAD_MAX_WARPS;
  const int warps = (taps + blocks - 1) / blocks;
  const WgradArgs args{tiles_of(*shape), groups,        taps,       taps / 2, elements(grad),
                       elements(x),      weight_shares, bias_shares};
  const int code = for_shape(*shape, [&](auto type, auto width) {
    const auto kernel = pos_conv_wgrad_kernel<decltype(type), width()>;
    const size_t shared = wgrad_shared_bytes<width()>(warps);
    return launch(kernel, {blocks, groups, shares}, 32 * warps, shared, stream, args);
  });
  if (code != 0) return code;
  const WgradSumArgs sum{int(shares), groups, taps, width, weight_shares, bias_shares, grad_weight, grad_bias};
  return launch(pos_conv_wgrad_sum_kernel, {shape->groups * width, 1, 1}, WGRAD_SUM_THREADS,
                wgrad_sum_shared_bytes(width, taps), stream, sum);
}
