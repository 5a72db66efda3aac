// Forward: one warp computes 64 frames x 64 channels of y at a time, u as matrix products [frames, slots] x [slots,
// channels], GELU in registers, 16 bytes a store.
#pragma once
#include "conv0.cuh"

namespace d2v {

// Channel of column n of matrix tile j (of 8 channels): lane q, which holds columns 2 q and 2 q + 1 of all tiles, has
// eight channels in a row of tiles 0 to 3, and eight of tiles 4 to 7.
D2V_DEVICE int conv0_fwd_channel(int j, int n) { return j / 4 * 32 + n / 2 * 8 + j % 4 * 2 + n % 2; }

// B fragments of a warp's 64 channels in shared memory: Words4 of a lane, two words high and two low.
template <class S>
struct Conv0FwdWeights {
  static constexpr int SIZE = 8 * S::STEPS * 32;
  D2V_DEVICE static int index(int j, int step) { return (j * S::STEPS + step) * 32 + thread_id() % 32; }
  // weights [2 (high, low), C, WIDTH] bfloat16 of a segment; `channel`: the first of the warp
  D2V_DEVICE static void fill(Words4* to, const uint32_t* weights, int64_t C, int64_t channel) {
    const int g = thread_id() % 32 / 4, q = thread_id() % 4;
#pragma unroll 1
    for (int j = 0; j < 8; ++j)
      for (int step = 0; step < S::STEPS; ++step) {
        const uint32_t* high = weights + (channel + conv0_fwd_channel(j, g)) * (S::WIDTH / 2) + 8 * step + q;
        const uint32_t* low = high + C * (S::WIDTH / 2);
        to[index(j, step)] = Words4{high[0], high[4], low[0], low[4]};
      }
  }
};

// 16 frames x 64 channels: y points at the warp's first channel of frame `lane / 4`; `left` frames of 16 exist
template <class S, class T>
D2V_DEVICE void conv0_fwd_group(const Words4* fragments, int group, const Words4* weights, uint16_t* y, int64_t C,
                                int left) {
  const int lane = thread_id() % 32, g = lane / 4, q = lane % 4;
  uint32_t high[S::STEPS][4], low[S::STEPS][4];
#pragma unroll
  for (int step = 0; step < S::STEPS; ++step) {
    const Words4* from = fragments + Conv0Fragments<S>::index(group, step, lane);
    load_fragment(high[step], from);
    load_fragment(low[step], from + Conv0Fragments<S>::PART);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t out[2][4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float u[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int step = 0; step < S::STEPS; ++step) {
        const Words4 w = weights[Conv0FwdWeights<S>::index(4 * half + j, step)];
        mma_split(u, high[step], low[step], {w.x, w.y}, {w.z, w.w});
      }
      out[0][j] = T::pack(conv0_gelu<T>(u[0]), conv0_gelu<T>(u[1]));
      out[1][j] = T::pack(conv0_gelu<T>(u[2]), conv0_gelu<T>(u[3]));
    }
#pragma unroll
    for (int h = 0; h < 2; ++h)
      if (g + 8 * h < left)
        store_words(y + 8 * h * C + 32 * half + 8 * q, Words4{out[h][0], out[h][1], out[h][2], out[h][3]});
  }
}

// Grid: x programs that share the tiles, y blocks of channels, a warp for each 64.
// Shared memory: fragments of two tiles, weights of each warp, (layer norm) the Cholesky factor.
template <class S, class T, bool LAYER>
D2V_KERNEL void D2V_BOUNDS(32 * CONV0_MAX_WARPS, S::STEPS == 1 ? 3 : 2)
    conv0_fwd(Conv0Input in, const uint32_t* weights /*[segments or 1, 2, C, WIDTH]*/, const float* factor,
              const float* means, float eps, int64_t C, uint16_t* y /*[frames, C]*/, float* rstd) {
  using Fragments = Conv0Fragments<S>;
  using Weights = Conv0FwdWeights<S>;
  const int warp = thread_id() / 32, warps = num_threads() / 32;
  Words4* fragments = reinterpret_cast<Words4*>(shared_memory());
  Words4* shared_weights = fragments + 2 * Fragments::SIZE + warp * Weights::SIZE;
  float* shared_factor = reinterpret_cast<float*>(fragments + 2 * Fragments::SIZE + warps * Weights::SIZE);
  if constexpr (LAYER) {
    for (int i = thread_id(); i < 4 * S::FACTOR_SIZE; i += num_threads()) shared_factor[i] = factor[i];
    block_barrier();
  }
  const Conv0Layout layout{shared_factor, rstd, nullptr, means, eps};
  const int64_t channel = (int64_t(block_y()) * warps + warp) * CONV0_CHANNELS;
  if (LAYER) in.table = nullptr;  // as it is; now the compiler knows
  const Conv0Share share = Conv0Share::of(in, block_x(), grid_x());
  if (share.tiles == 0) return;
  Conv0Tile tile;
  tile.seek(in, share.first);
  if (LAYER && channel < C) Weights::fill(shared_weights, weights, C, channel);
  int loaded = -1;
  for (int tiles = share.tiles; tiles > 0; --tiles, tile.advance(in)) {
    // The other buffer is read until the next barrier: one barrier a tile is enough.
    Words4* mine = fragments + tiles % 2 * Fragments::SIZE;
    lay_out<S, LAYER, false>(in, tile, layout, mine);
    if (!LAYER && tile.segment != loaded && channel < C) {
      loaded = tile.segment;
      Weights::fill(shared_weights, weights + loaded * C * S::WIDTH, C, channel);
    }
    block_barrier();
    if (channel >= C) continue;
    uint16_t* out = y + (tile.frame(in) + thread_id() % 32 / 4) * C + channel;
    const int left = tile.left(in);
#pragma unroll 1
    for (int group = 0; group < CONV0_FRAMES / 16 && 16 * group < left; ++group)
      conv0_fwd_group<S, T>(mine, group, shared_weights, out + 16 * group * C, C, left - 16 * group);
  }
}

// Zeros where no segment is: block x clears its share (of grid y) of the frames before segment x, the last those after
// all.
D2V_KERNEL void conv0_clear(Conv0Input in, int64_t frames, int64_t C, uint16_t* y) {
  const int64_t segment = block_x();
  const int64_t before = segment == 0 ? 0 : in.first(segment - 1) + in.size(segment - 1);
  const int64_t end = segment == in.count ? frames : in.first(segment);
  Words4* words = reinterpret_cast<Words4*>(y);
  const int64_t step = int64_t(grid_y()) * num_threads();
  for (int64_t i = before * C / 8 + int64_t(block_y()) * num_threads() + thread_id(); i < end * C / 8; i += step)
    store_words(words + i, Words4{0, 0, 0, 0});
}

}  // namespace d2v
