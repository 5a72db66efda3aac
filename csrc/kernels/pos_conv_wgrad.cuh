// Gradient of the weights of a grouped convolution over frames, channels last:
//   grad_weight[tap][o][i] = sum over rows of grad[row, o] x[row + tap - padding, i]
// A block takes some taps (one to a warp), one group and a share of the tiles, whose frames pass through shared memory
// 128 at a time; sums stay in registers and are written once. A second kernel adds up the shares in order.
#pragma once
#include "pos_conv_tiles.cuh"

namespace d2v {

constexpr int WGRAD_FRAMES = 128;   // at once
constexpr int WGRAD_MAX_WARPS = 8;  // taps of a block

struct WgradArgs {
  Tiles tiles;
  int groups, taps, padding;
  const uint16_t* grad;  // [rows, C]
  const uint16_t* x;     // [rows, C]
  float* weight_shares;  // [grid_z, groups, taps, D, D]
  float* bias_shares;    // [grid_z, C] or null
};

// Two stages of rows, and a row of sums for each warp.
template <int D>
constexpr size_t wgrad_shared_bytes(int warps) {
  return 2 * size_t(2 * WGRAD_FRAMES + warps - 1) * PITCH<D> + sizeof(float) * warps * D;
}

// Where a block is in its share of the tiles: at row `frame` of tile `index`. The tile itself is looked up again when
// needed: the registers are for sums.
struct WgradPlace {
  int index, frame;

  D2V_DEVICE bool valid(const Tiles& tiles) const { return index < tiles.count; }
  D2V_DEVICE void skip_empty(const Tiles& tiles) {
    while (index < tiles.count && tiles.at(index).frames() <= 0) index += grid_z();
  }
  D2V_DEVICE void advance(const Tiles& tiles) {
    frame += WGRAD_FRAMES;
    if (frame < tiles.at(index).frames()) return;
    frame = 0;
    index += grid_z();
    skip_empty(tiles);
  }
};

// Rows of the gradient, 0 behind the tile; below them those of x that the block's taps meet, 0 outside the segment.
// Returns how many rows of the gradient there are.
template <int D>
D2V_DEVICE int wgrad_load(const WgradArgs& args, const WgradPlace& place, int first_tap, unsigned char* stage) {
  const int64_t channels = int64_t(args.groups) * D, column = int64_t(block_y()) * D;
  const Tile tile = args.tiles.at(place.index);
  const int64_t start = tile.first + place.frame;
  const int left = tile.frames() - place.frame, rows = left < WGRAD_FRAMES ? left : WGRAD_FRAMES;
  copy_rows<D>(stage, args.grad + column, channels, start, WGRAD_FRAMES, start, start + rows);
  copy_rows<D>(stage + WGRAD_FRAMES * PITCH<D>, args.x + column, channels, start + first_tap - args.padding,
               WGRAD_FRAMES + num_threads() / 32 - 1, tile.begin, tile.end);
  return rows;
}

// acc [o, i] += rows of grad, transposed, times those of x
template <class T, int D>
D2V_DEVICE void wgrad_multiply(const unsigned char* grad, const unsigned char* x, int rows,
                               float (&acc)[D / 16][D / 8][4]) {
  const int lane = thread_id() % 32;
  const unsigned char* a_row = grad + (lane / 16 * 8 + lane % 8) * PITCH<D> + lane / 8 % 2 * 16;
  const unsigned char* b_row = x + lane % 16 * PITCH<D> + lane / 16 * 16;
#pragma unroll 1
  for (int k = 0; k < rows; k += 16, a_row += 16 * PITCH<D>, b_row += 16 * PITCH<D>) {
    uint32_t a[D / 16][4];
#pragma unroll
    for (int m = 0; m < D / 16; ++m) load_matrices_transposed(a[m], a_row + m * 32);
#pragma unroll
    for (int pair = 0; pair < D / 16; ++pair) {
      uint32_t b[4];
      load_matrices_transposed(b, b_row + pair * 32);
#pragma unroll
      for (int m = 0; m < D / 16; ++m) {
        mma<T>(acc[m][2 * pair], a[m], {b[0], b[1]});
        mma<T>(acc[m][2 * pair + 1], a[m], {b[2], b[3]});
      }
    }
  }
}

// Sums over rows, [warps, D] in shared memory: a warp has every n-th row, a lane the same pairs of channels throughout.
template <class T, int D>
D2V_DEVICE void wgrad_add_bias(const unsigned char* grad, int rows, float* sums) {
  const int warp = thread_id() / 32, warps = num_threads() / 32;
  for (int pair = thread_id() % 32; pair < D / 2; pair += 32) {
    float first = 0.f, second = 0.f;
    for (int r = warp; r < rows; r += warps) {
      const uint32_t v = *reinterpret_cast<const uint32_t*>(grad + r * PITCH<D> + pair * 4);
      first += T::first(v);
      second += T::second(v);
    }
    sums[warp * D + 2 * pair] += first;
    sums[warp * D + 2 * pair + 1] += second;
  }
}

template <int D>
D2V_DEVICE void wgrad_write_bias(const WgradArgs& args, const float* sums) {
  block_barrier();
  for (int c = thread_id(); c < D; c += num_threads()) {
    float sum = 0.f;
    for (int w = 0; w < num_threads() / 32; ++w) sum += sums[w * D + c];
    args.bias_shares[(int64_t(block_z()) * args.groups + block_y()) * D + c] = sum;
  }
}

template <class T, int D>
D2V_KERNEL void D2V_BOUNDS(32 * WGRAD_MAX_WARPS, D <= 48 ? 2 : 1) pos_conv_wgrad_kernel(const WgradArgs args) {
  const int warps = num_threads() / 32, warp = thread_id() / 32, lane = thread_id() % 32;
  const int first_tap = block_x() * warps, tap = first_tap + warp;
  const bool sums_bias = args.bias_shares != nullptr && block_x() == 0;
  const auto stage = [&](int buffer) { return shared_memory() + buffer * (2 * WGRAD_FRAMES + warps - 1) * PITCH<D>; };
  float* bias = reinterpret_cast<float*>(stage(2));

  float acc[D / 16][D / 8][4] = {};
  for (int c = lane; c < D; c += 32) bias[warp * D + c] = 0.f;
  WgradPlace place{block_z(), 0};
  place.skip_empty(args.tiles);
  int rows = place.valid(args.tiles) ? wgrad_load<D>(args, place, first_tap, stage(0)) : 0;
  async_commit();
  for (int buffer = 0; rows > 0; buffer ^= 1) {
    place.advance(args.tiles);
    const int next_rows = place.valid(args.tiles) ? wgrad_load<D>(args, place, first_tap, stage(buffer ^ 1)) : 0;
    async_commit();
    async_wait<1>();
    block_barrier();
    const unsigned char* grad = stage(buffer);
    if (tap < args.taps) wgrad_multiply<T, D>(grad, grad + (WGRAD_FRAMES + warp) * PITCH<D>, rows, acc);
    if (sums_bias) wgrad_add_bias<T, D>(grad, rows, bias);
    block_barrier();
    rows = next_rows;
  }
  if (sums_bias) wgrad_write_bias<D>(args, bias);
  if (tap >= args.taps) return;
  float* out = args.weight_shares + ((int64_t(block_z()) * args.groups + block_y()) * args.taps + tap) * D * D;
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

struct WgradSumArgs {
  int shares, groups, taps, width;
  const float* weight_shares;  // [shares, groups, taps, width, width]
  const float* bias_shares;    // [shares, C] or null
  float* grad_weight;          // [C, width, taps]
  float* grad_bias;            // [C] or null
};

constexpr int WGRAD_SUM_THREADS = 128;

constexpr size_t wgrad_sum_shared_bytes(int width, int taps) { return sizeof(float) * width * (taps | 1); }

// A block has one output channel: [taps, width] in, [width, taps] out.
D2V_KERNEL void D2V_BOUNDS(WGRAD_SUM_THREADS, 8) pos_conv_wgrad_sum_kernel(const WgradSumArgs args) {
  float* tile = reinterpret_cast<float*>(shared_memory());  // [width, pitch]
  const int pitch = args.taps | 1;  // odd, so that neighbouring inputs lie in different banks
  const int width = args.width, group = block_x() / width, o = block_x() % width;
  const int64_t share = int64_t(args.groups) * args.taps * width * width;
  for (int e = thread_id(); e < args.taps * width; e += WGRAD_SUM_THREADS) {
    const int tap = e / width, i = e % width;
    const float* from = args.weight_shares + ((int64_t(group) * args.taps + tap) * width + o) * width + i;
    float sum = 0.f;
#pragma unroll 4
    for (int s = 0; s < args.shares; ++s) sum += from[s * share];
    tile[i * pitch + tap] = sum;
  }
  if (args.grad_bias != nullptr && thread_id() == 0) {
    float sum = 0.f;
    for (int s = 0; s < args.shares; ++s) sum += args.bias_shares[int64_t(s) * args.groups * width + block_x()];
    args.grad_bias[block_x()] = sum;
  }
  block_barrier();
  float* out = args.grad_weight + int64_t(block_x()) * width * args.taps;
  for (int e = thread_id(); e < width * args.taps; e += WGRAD_SUM_THREADS)
    out[e] = tile[e / args.taps * pitch + e % args.taps];
}

}  // namespace d2v
