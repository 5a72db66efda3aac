// Gradient of the weights of a grouped convolution over frames, channels last:
//   grad_weight[tap][o][i] = sum over rows of grad[row, o] x[row + tap - padding, i]
// A block takes some taps (one to a warp), one group and a share of the tiles, whose frames pass through shared memory
// 64 at a time; sums stay in registers and are written once, for a second stage to add up in order.
#pragma once
#include "pos_conv_tiles.cuh"

namespace d2v {

constexpr int WGRAD_FRAMES = 64;    // at once
constexpr int WGRAD_MAX_WARPS = 8;  // taps of a block

struct WgradArgs {
  Tiles tiles;
  int groups, taps, padding;
  const uint16_t* grad;  // [rows, C]
  const uint16_t* x;     // [rows, C]
  float* grad_weight;    // [grid_z, groups, taps, D, D]
  float* grad_bias;      // [grid_z, C] or null
};

template <int D>
D2V_DEVICE constexpr size_t wgrad_stage_bytes(int warps) {
  return size_t(2 * WGRAD_FRAMES + warps - 1) * PITCH<D>;
}

// Where a block is in its share of the tiles.
struct WgradPlace {
  int64_t index;
  int frame;
  Tile tile;
  bool valid;
};

D2V_DEVICE WgradPlace wgrad_place(const Tiles& tiles, int64_t index) {
  for (; index < tiles.count; index += grid_z()) {
    const Tile tile = tiles.at(index);
    if (tile.frames() > 0) return {index, 0, tile, true};
  }
  return {index, 0, {0, 0, 0}, false};
}

D2V_DEVICE WgradPlace wgrad_next(const Tiles& tiles, const WgradPlace& place) {
  WgradPlace next = place;
  next.frame += WGRAD_FRAMES;
  return next.frame < place.tile.frames() ? next : wgrad_place(tiles, place.index + grid_z());
}

// 64 rows of the gradient, 0 behind the tile; below them those of x that the block's taps meet, 0 outside the segment
template <int D>
D2V_DEVICE void wgrad_load(const WgradArgs& args, const WgradPlace& place, int first_tap, unsigned char* stage) {
  const int rows = 2 * WGRAD_FRAMES + num_threads() / 32 - 1;
  const int64_t channels = int64_t(args.groups) * D;
  const int64_t column = int64_t(block_y()) * D;
  const int64_t start = place.tile.first + place.frame;
  for (int i = thread_id(); i < rows * (D / 8); i += num_threads()) {
    const int r = i / (D / 8), chunk = i % (D / 8);
    const bool of_grad = r < WGRAD_FRAMES;
    const int64_t row = of_grad ? start + r : start + r - WGRAD_FRAMES + first_tap - args.padding;
    const bool inside = of_grad ? place.frame + r < place.tile.frames() : place.tile.inside(row);
    const uint16_t* from = (of_grad ? args.grad : args.x) + (inside ? row * channels + column + chunk * 8 : 0);
    async_copy16(stage + r * PITCH<D> + chunk * 16, from, inside);
  }
}

// acc [o, i] += 64 rows of grad, transposed, times those of x
template <class T, int D>
D2V_DEVICE void wgrad_multiply(const unsigned char* grad, const unsigned char* x, float (&acc)[D / 16][D / 8][4]) {
  const int lane = thread_id() % 32;
  const unsigned char* a_row = grad + (lane / 16 * 8 + lane % 8) * PITCH<D> + lane / 8 % 2 * 16;
  const unsigned char* b_row = x + lane % 16 * PITCH<D> + lane / 16 * 16;
#pragma unroll
  for (int k = 0; k < WGRAD_FRAMES; k += 16) {
    uint32_t a[D / 16][4];
#pragma unroll
    for (int m = 0; m < D / 16; ++m) load_matrices_transposed(a[m], a_row + k * PITCH<D> + m * 32);
#pragma unroll
    for (int pair = 0; pair < D / 16; ++pair) {
      uint32_t b[4];
      load_matrices_transposed(b, b_row + k * PITCH<D> + pair * 32);
#pragma unroll
      for (int m = 0; m < D / 16; ++m) {
        mma<T>(acc[m][2 * pair], a[m], {b[0], b[1]});
        mma<T>(acc[m][2 * pair + 1], a[m], {b[2], b[3]});
      }
    }
  }
}

// Sums over rows of two neighbouring channels at a time: a lane has pairs lane and lane + 32, a warp every n-th row.
template <class T, int D>
D2V_DEVICE void wgrad_add_bias(const unsigned char* grad, float (&sums)[2][2]) {
  const int warps = num_threads() / 32;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int pair = thread_id() % 32 + 32 * i;
    if (pair >= D / 2) continue;
    for (int r = thread_id() / 32; r < WGRAD_FRAMES; r += warps) {
      const uint32_t v = *reinterpret_cast<const uint32_t*>(grad + r * PITCH<D> + pair * 4);
      sums[i][0] += T::first(v);
      sums[i][1] += T::second(v);
    }
  }
}

template <int D>
D2V_DEVICE void wgrad_write_bias(const WgradArgs& args, const float (&sums)[2][2], float* shared) {
  const int warps = num_threads() / 32;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int pair = thread_id() % 32 + 32 * i;
    if (pair >= D / 2) continue;
    shared[thread_id() / 32 * D + 2 * pair] = sums[i][0];
    shared[thread_id() / 32 * D + 2 * pair + 1] = sums[i][1];
  }
  block_barrier();
  for (int c = thread_id(); c < D; c += num_threads()) {
    float sum = 0.f;
    for (int w = 0; w < warps; ++w) sum += shared[w * D + c];
    args.grad_bias[(int64_t(block_z()) * args.groups + block_y()) * D + c] = sum;
  }
}

template <class T, int D>
D2V_KERNEL void D2V_BOUNDS(32 * WGRAD_MAX_WARPS, 1) pos_conv_wgrad_kernel(const WgradArgs args) {
  const int warps = num_threads() / 32, warp = thread_id() / 32, lane = thread_id() % 32;
  const int first_tap = block_x() * warps, tap = first_tap + warp;
  const bool sums_bias = args.grad_bias != nullptr && block_x() == 0;
  const auto stage = [&](int buffer) { return shared_memory() + buffer * wgrad_stage_bytes<D>(warps); };

  float acc[D / 16][D / 8][4] = {}, bias[2][2] = {};
  WgradPlace place = wgrad_place(args.tiles, block_z());
  if (place.valid) wgrad_load<D>(args, place, first_tap, stage(0));
  async_commit();
  for (int buffer = 0; place.valid; buffer ^= 1) {
    const WgradPlace next = wgrad_next(args.tiles, place);
    if (next.valid) wgrad_load<D>(args, next, first_tap, stage(buffer ^ 1));
    async_commit();
    async_wait<1>();
    block_barrier();
    const unsigned char* grad = stage(buffer);
    if (tap < args.taps) wgrad_multiply<T, D>(grad, grad + (WGRAD_FRAMES + warp) * PITCH<D>, acc);
    if (sums_bias) wgrad_add_bias<T, D>(grad, bias);
    block_barrier();
    place = next;
  }
  if (sums_bias) wgrad_write_bias<D>(args, bias, reinterpret_cast<float*>(shared_memory()));
  if (tap >= args.taps) return;
  float* out = args.grad_weight + ((int64_t(block_z()) * args.groups + block_y()) * args.taps + tap) * D * D;
#pragma unroll
  for (int m = 0; m < D / 16; ++m)
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int o = m * 16 + half * 8 + lane / 4, i = n * 8 + lane % 4 * 2;
        store_words(out + o * D + i, Words2{float_bits(acc[m][n][2 * half]), float_bits(acc[m][n][2 * half + 1])});
      }
}

}  // namespace d2v
