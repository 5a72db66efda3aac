// Backward: one pass over the gradient of y, in which u is computed again, times CONV0_BWD_SCALE. With du the gradient
// of u (twice that: conv0.cuh)
//   outer [C, slots] = sum over frames of du X^T
// and for layer norm, with D = du [gamma * W''; gamma] (over channels, times CONV0_BWD_SCALE as well), m2 = X . D
// without slot ONE, m1 = D[ONE]:
//   inner [slots, slots] = sum over frames of [m2 X; m1] X^T, where m1 is row ONE
// from which conv0_finish.cuh makes the gradients. All of it is linear in the channels: a warp adds up what its 64
// channels give, in registers, and writes it once. Only the fragments of X are shared, one barrier a tile.
#pragma once
#include "conv0.cuh"

namespace d2v {

// Here the rows of u are channels: row r of matrix tile i (of 16 channels), so that lane / 4 has 8 channels in a row.
D2V_DEVICE int conv0_bwd_channel(int i, int r) { return r % 8 * 8 + 2 * i + r / 8; }

// The warp's weights in shared memory, as fragments that a lane loads 16 bytes at a time.
template <class S, bool LAYER>
struct Conv0BwdWeights {
  static constexpr int INNER = LAYER ? (S::TILES + 1) / 2 : 0;  // Words4 a lane, for D: B fragments, two tiles each
  static constexpr int TILE = 2 * (S::STEPS + INNER) * 32;      // Words4: high and low
  static constexpr int SIZE = 4 * TILE;
  D2V_DEVICE static int outer(int i, int part, int step) { return i * TILE + (part * S::STEPS + step) * 32; }
  D2V_DEVICE static int inner(int i, int part, int pair) {
    return i * TILE + (2 * S::STEPS + part * INNER + pair) * 32;
  }

  // weights [2, C, WIDTH] bfloat16 of a segment, gamma [C] or null; `channel`: the first of the warp
  D2V_DEVICE static void fill(Words4* to, const uint32_t* weights, const float* gamma, int64_t C, int64_t channel) {
    const int lane = thread_id() % 32, g = lane / 4, q = lane % 4;
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(weights);
    const auto gradient_weight = [&](int part, int64_t c, int slot) -> uint32_t {
      if (slot != S::ONE) return slot < S::WIDTH ? halves[(part * C + c) * S::WIDTH + slot] : 0;
      const SplitPair words = split(CONV0_BWD_SCALE * (gamma ? gamma[c] : 1.f), 0.f);
      return (part ? words.low : words.high) & 0xffff;
    };
#pragma unroll 1
    for (int i = 0; i < 4; ++i)
#pragma unroll 1
      for (int part = 0; part < 2; ++part) {
        for (int step = 0; step < S::STEPS; ++step) {
          const auto word = [&](int r, int p) {
            return weights[(part * C + channel + conv0_bwd_channel(i, r)) * (S::WIDTH / 2) + 8 * step + 4 * p + q];
          };
          to[outer(i, part, step) + lane] = Words4{word(g, 0), word(g + 8, 0), word(g, 1), word(g + 8, 1)};
        }
        for (int pair = 0; pair < INNER; ++pair) {
          const auto word = [&](int tile, int r) {  // rows (channels) r and r + 1, column (slot) g of `tile`
            const int slot = 8 * tile + g;
            return gradient_weight(part, channel + conv0_bwd_channel(i, r), slot) |
                   gradient_weight(part, channel + conv0_bwd_channel(i, r + 1), slot) << 16;
          };
          to[inner(i, part, pair) + lane] = Words4{word(2 * pair, 2 * q), word(2 * pair, 2 * q + 8),
                                                   word(2 * pair + 1, 2 * q), word(2 * pair + 1, 2 * q + 8)};
        }
      }
  }
};

// The sums of a warp, as accumulators of matrix instructions.
template <class S, bool LAYER>
struct Conv0Sums {
  float outer[4][S::TILES][4];                     // rows: channels, columns: slots
  float inner[LAYER ? S::STEPS : 1][S::TILES][4];  // rows and columns: slots
  D2V_DEVICE void clear() {
#pragma unroll
    for (int n = 0; n < S::TILES; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
#pragma unroll
        for (int i = 0; i < 4; ++i) outer[i][n][e] = 0.f;
#pragma unroll
        for (int i = 0; i < (LAYER ? S::STEPS : 1); ++i) inner[i][n][e] = 0.f;
      }
  }
  // outer_out [C, COLUMNS], at the warp's first channel
  D2V_DEVICE void store_outer(float* out) const {
    const int g = thread_id() % 32 / 4, q = thread_id() % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int n = 0; n < S::TILES; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float* to = out + conv0_bwd_channel(i, g + 8 * h) * S::COLUMNS + 8 * n + 2 * q;
          store_words(to, Words2{float_bits(outer[i][n][2 * h]), float_bits(outer[i][n][2 * h + 1])});
        }
  }
  // inner_out [WIDTH, COLUMNS]
  D2V_DEVICE void store_inner(float* out) const {
    const int g = thread_id() % 32 / 4, q = thread_id() % 4;
#pragma unroll
    for (int i = 0; i < S::STEPS; ++i)
#pragma unroll
      for (int n = 0; n < S::TILES; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float* to = out + (16 * i + g + 8 * h) * S::COLUMNS + 8 * n + 2 * q;
          store_words(to, Words2{float_bits(inner[i][n][2 * h]), float_bits(inner[i][n][2 * h + 1])});
        }
  }
};

// Whether du and X keep 16 bits in `outer`: 8 are enough for gradients in bfloat16, not for those in float16.
template <class T>
constexpr bool CONV0_WIDE = false;
template <>
constexpr bool CONV0_WIDE<F16> = true;

// X of 16 frames: as it lies in shared memory, and transposed: B fragments [frames, slots]
template <class S, bool WIDE>
struct Conv0GroupInput {
  uint32_t high[S::STEPS][4], low[S::STEPS][4];
  uint32_t across[S::TILES][2], across_low[WIDE ? S::TILES : 1][2];
  D2V_DEVICE void load(const Words4* fragments, int group) {
#pragma unroll
    for (int step = 0; step < S::STEPS; ++step) {
      const Words4* from = fragments + Conv0Fragments<S>::index(group, step, thread_id() % 32);
      load_fragment(high[step], from);
      load_fragment(low[step], from + Conv0Fragments<S>::PART);
    }
#pragma unroll
    for (int n = 0; n < S::TILES; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        across[n][h] = transpose_8x8(high[n / 2][n % 2 + 2 * h]);
        if constexpr (WIDE) across_low[n][h] = transpose_8x8(low[n / 2][n % 2 + 2 * h]);
      }
  }
};

// du of 16 channels x 16 frames as A fragment: word h + 2 n holds channel row lane / 4 + 8 h and frames
// 8 n + 2 * (lane % 4) and the next. dy: for these four frames, the word of the lane's channels of this tile.
template <class S, class T>
D2V_DEVICE void conv0_du(const Conv0GroupInput<S, CONV0_WIDE<T>>& x, const Words4* high_weights,
                         const Words4* low_weights, const uint32_t (&dy)[4], uint32_t (&high)[4], uint32_t (&low)[4]) {
  uint32_t w_high[S::STEPS][4], w_low[S::STEPS][4];
#pragma unroll
  for (int step = 0; step < S::STEPS; ++step) {
    load_fragment(w_high[step], high_weights + step * 32 + thread_id() % 32);
    load_fragment(w_low[step], low_weights + step * 32 + thread_id() % 32);
  }
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    float u[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int step = 0; step < S::STEPS; ++step)
      mma_split(u, w_high[step], w_low[step], {x.high[step][2 * n], x.high[step][2 * n + 1]},
                {x.low[step][2 * n], x.low[step][2 * n + 1]});
    const uint32_t even = dy[2 * n], odd = dy[2 * n + 1];
    const float grad[4] = {T::first(even), T::first(odd), T::second(even), T::second(odd)};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float a = conv0_gelu_twice_grad<T>(grad[2 * h], u[2 * h]);
      const float b = conv0_gelu_twice_grad<T>(grad[2 * h + 1], u[2 * h + 1]);
      if constexpr (CONV0_WIDE<T>) {
        const SplitPair words = split(a, b);
        high[h + 2 * n] = words.high;
        low[h + 2 * n] = words.low;
      } else {
        high[h + 2 * n] = Bf16::pack(a, b);
      }
    }
  }
}

// D [frames, slots] += du^T [frames, channels] [gamma * W''; gamma] of 16 channels
template <class S>
D2V_DEVICE void add_inner_products(float (&products)[S::TILES][4], const uint32_t (&du)[4], const Words4* high_weights,
                                   const Words4* low_weights) {
  const uint32_t across[4] = {transpose_8x8(du[0]), transpose_8x8(du[2]), transpose_8x8(du[1]), transpose_8x8(du[3])};
#pragma unroll
  for (int pair = 0; pair < (S::TILES + 1) / 2; ++pair) {
    uint32_t high[4], low[4];
    load_fragment(high, high_weights + pair * 32 + thread_id() % 32);
    load_fragment(low, low_weights + pair * 32 + thread_id() % 32);
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      if (2 * pair + t >= S::TILES) continue;
      mma<Bf16>(products[2 * pair + t], across, {low[2 * t], low[2 * t + 1]});
      mma<Bf16>(products[2 * pair + t], across, {high[2 * t], high[2 * t + 1]});
    }
  }
}

// inner += [m2 X; m1] X^T of 16 frames
template <class S, bool WIDE>
D2V_DEVICE void add_inner(float (&inner)[S::STEPS][S::TILES][4], const Conv0GroupInput<S, WIDE>& x,
                          const float (&products)[S::TILES][4]) {
  static_assert(S::ONE % 2 == 1, "ONE is the second slot of its word");
  const bool holds_one = thread_id() % 4 == S::ONE % 8 / 2;
  uint32_t rows[2][2 * S::STEPS];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float first[S::TILES], second[S::TILES], m2 = 0.f;
#pragma unroll
    for (int n = 0; n < S::TILES; ++n) {
      const uint32_t word = x.high[n / 2][n % 2 + 2 * h];
      first[n] = Bf16::first(word);
      second[n] = n == S::ONE / 8 && holds_one ? 0.f : Bf16::second(word);
      m2 = fmaf(first[n], products[n][2 * h], fmaf(second[n], products[n][2 * h + 1], m2));
    }
    m2 += shuffle_xor(m2, 1);
    m2 += shuffle_xor(m2, 2);
#pragma unroll
    for (int n = 0; n < 2 * S::STEPS; ++n) {
      if (n >= S::TILES) {
        rows[h][n] = 0;
        continue;
      }
      const float other = n == S::ONE / 8 && holds_one ? products[n][2 * h + 1] : m2 * second[n];
      rows[h][n] = transpose_8x8(Bf16::pack(m2 * first[n], other));
    }
  }
#pragma unroll
  for (int i = 0; i < S::STEPS; ++i)
#pragma unroll
    for (int n = 0; n < S::TILES; ++n)
      mma<Bf16>(inner[i][n], {rows[0][2 * i], rows[0][2 * i + 1], rows[1][2 * i], rows[1][2 * i + 1]}, x.across[n]);
}

// Adds 16 frames x 64 channels to the sums. dy points at the lane's channels of the first frame; `left` > 0 are there.
template <class S, class T, bool LAYER>
D2V_DEVICE void conv0_bwd_group(const Words4* fragments, int group, const Words4* weights, const uint16_t* dy,
                                int64_t C, int left, Conv0Sums<S, LAYER>& sums) {
  using Weights = Conv0BwdWeights<S, LAYER>;
  uint32_t words[4][4];  // [tile, frame]
#pragma unroll
  for (int f = 0; f < 4; ++f) {
    // Frames past the last have X = 0, so that any gradient does: that of the last.
    const int frame = 8 * (f / 2) + 2 * (thread_id() % 4) + f % 2;
    const Words4 v = load_words<Words4>(dy + (frame < left ? frame : left - 1) * C);
    words[0][f] = v.x, words[1][f] = v.y, words[2][f] = v.z, words[3][f] = v.w;
  }
  Conv0GroupInput<S, CONV0_WIDE<T>> x;
  x.load(fragments, group);
  float products[S::TILES][4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t du[4], du_low[4];
    conv0_du<S, T>(x, weights + Weights::outer(i, 0, 0), weights + Weights::outer(i, 1, 0), words[i], du, du_low);
#pragma unroll
    for (int n = 0; n < S::TILES; ++n) {
      if constexpr (CONV0_WIDE<T>) {
        mma<Bf16>(sums.outer[i][n], du_low, x.across[n]);
        mma<Bf16>(sums.outer[i][n], du, x.across_low[n]);
      }
      mma<Bf16>(sums.outer[i][n], du, x.across[n]);
    }
    if constexpr (LAYER)
      add_inner_products<S>(products, du, weights + Weights::inner(i, 0, 0), weights + Weights::inner(i, 1, 0));
  }
  if constexpr (LAYER) add_inner<S>(sums.inner, x, products);
}

template <class S>
constexpr int CONV0_BWD_WARPS = S::STEPS == 1 ? 8 : 4;  // shared memory for the weights of each

// Grid: x programs that share the tiles, y blocks of channels, a warp for each 64.
// outer [rows, C, COLUMNS]: row x, or with group norm row x + segment: both grow along the tiles, so no row is taken
// twice, and every program that has tiles of a segment leaves its sum. inner [programs, C / 64, WIDTH, COLUMNS].
template <class S, class T, bool LAYER>
D2V_KERNEL void D2V_BOUNDS(32 * CONV0_BWD_WARPS<S>, S::STEPS == 1 && CONV0_WIDE<T> ? 1 : 2)
    conv0_bwd(Conv0Input in, const uint32_t* weights /*[segments or 1, 2, C, WIDTH]*/, const float* gamma,
              const float* means, const float* rstd, int64_t C, const uint16_t* dy /*[frames, C]*/, float* outer,
              float* inner) {
  using Fragments = Conv0Fragments<S>;
  using Weights = Conv0BwdWeights<S, LAYER>;
  const int warp = thread_id() / 32, lane = thread_id() % 32;
  Words4* fragments = reinterpret_cast<Words4*>(shared_memory());
  Words4* mine = fragments + 2 * Fragments::SIZE + warp * Weights::SIZE;
  const int64_t channel = (int64_t(block_y()) * (num_threads() / 32) + warp) * CONV0_CHANNELS;
  const Conv0Layout layout{nullptr, nullptr, rstd, means, 0.f};
  if (LAYER) in.table = nullptr;  // as it is; now the compiler knows
  const Conv0Share share = Conv0Share::of(in, block_x(), grid_x());
  if (share.tiles == 0) return;
  if (LAYER && channel < C) Weights::fill(mine, weights, gamma, C, channel);
  Conv0Tile tile;
  tile.seek(in, share.first);
  Conv0Sums<S, LAYER> sums;
  sums.clear();
  int loaded = LAYER ? 0 : -1;
  for (int tiles = share.tiles; tiles > 0; --tiles, tile.advance(in)) {
    // The other buffer is read until the next barrier: one barrier a tile is enough.
    Words4* laid_out = fragments + tiles % 2 * Fragments::SIZE;
    lay_out<S, LAYER, true>(in, tile, layout, laid_out);
    if (!LAYER && tile.segment != loaded && channel < C) {
      if (loaded >= 0) {
        sums.store_outer(outer + (int64_t(block_x() + loaded) * C + channel) * S::COLUMNS);
        sums.clear();
      }
      loaded = tile.segment;
      Weights::fill(mine, weights + loaded * C * S::WIDTH, gamma, C, channel);
    }
    block_barrier();
    if (channel >= C) continue;
#pragma unroll 1
    for (int group = 0; group < CONV0_FRAMES / 16 && 16 * group < tile.left(in); ++group) {
      const uint16_t* grad = dy + (tile.frame(in) + 16 * group) * C + channel + 8 * (lane / 4);
      conv0_bwd_group<S, T, LAYER>(laid_out, group, mine, grad, C, tile.left(in) - 16 * group, sums);
    }
  }
  if (channel >= C) return;
  sums.store_outer(outer + (int64_t(block_x() + loaded) * C + channel) * S::COLUMNS);
  if constexpr (LAYER) {
    const int64_t row = int64_t(block_x()) * (C / CONV0_CHANNELS) + channel / CONV0_CHANNELS;
    sums.store_inner(inner + row * S::WIDTH * S::COLUMNS);
  }
}

}  // namespace d2v
