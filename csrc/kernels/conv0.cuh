// First convolution of the speech front-end with norm and GELU: what its kernels share.
//
// A frame is one matrix row X of SLOTS numbers, [taps; one for the bias; 1], zero from SLOTS to WIDTH, and u = W' X:
//   layer norm: X = [rstd * x; rstd; 1], W' = [gamma * (w - mean w); gamma * (b - mean b); beta]
//   group norm: X = [x - mean x; 0; 1],  W' = [gamma * rstd * w; 0; beta], of each segment
// Numbers are split into two bfloat16, high and low, so that the products have 16 bits.
#pragma once
#include "simt.cuh"

#include <math.h>

namespace d2v {

// Template parameter of the kernels: 10 taps exactly, which is what the published models have, or up to 16.
template <int MAX_TAPS>
struct Conv0Shape {
  static constexpr int TAPS = MAX_TAPS;
  static constexpr int BIAS = TAPS, ONE = TAPS + 1, SLOTS = TAPS + 2;
  static constexpr int STEPS = (SLOTS + 15) / 16;  // of 16 slots, the depth of a matrix instruction
  static constexpr int WIDTH = 16 * STEPS;
  static constexpr int TILES = (SLOTS + 7) / 8;  // of 8 slots
  static constexpr int COLUMNS = 8 * TILES;
  // Cholesky factor L for four threads a frame: thread q holds columns q, q + 4, ..., column 4 g + q from row 4 g on,
  // filled up with zeros to a multiple of 4.
  static constexpr int FACTORS = (TAPS + 4) / 4;
  static constexpr int FACTOR_SIZE = 2 * FACTORS * (FACTORS + 1);
  D2V_DEVICE static int factor_offset(int g) { return 4 * g * FACTORS - 2 * g * (g - 1); }
  D2V_DEVICE static int taps(int taps) { return TAPS == 10 ? TAPS : taps; }
};

constexpr int CONV0_FRAMES = 64;    // a tile
constexpr int CONV0_CHANNELS = 64;  // of a warp
constexpr int CONV0_MAX_WARPS = 8;

// Where frames read their samples, and which frames belong together.
struct Conv0Input {
  const float* waveforms;  // rows of samples
  int64_t row_stride;
  int64_t frames_per_row;
  int64_t stride;        // samples from frame to frame
  const int64_t* table;  // [count + 1, 4] conv0_segment_table; null: every row is a segment
  int64_t count;
  int taps;

  D2V_DEVICE int64_t first(int64_t segment) const { return table ? table[4 * segment] : segment * frames_per_row; }
  D2V_DEVICE int64_t size(int64_t segment) const { return table ? table[4 * segment + 1] : frames_per_row; }
  D2V_DEVICE int64_t tiles_per_row() const { return (frames_per_row + CONV0_FRAMES - 1) / CONV0_FRAMES; }
  D2V_DEVICE int64_t tiles_before(int64_t segment) const {
    return table ? table[4 * segment + 2] : segment * tiles_per_row();
  }
  D2V_DEVICE const float* samples(int64_t segment) const {  // of its first frame
    return waveforms + (table ? table[4 * segment + 3] : segment * row_stride);
  }
  // the segment that holds tile `tile`; empty segments hold none
  D2V_DEVICE int64_t segment_of(int64_t tile) const {
    if (!table) return tile / tiles_per_row();
    int64_t low = 0, high = count;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (tiles_before(middle) <= tile) low = middle;
      else high = middle;
    }
    return low;
  }
};

// Tiles in order, an equal share of them to each program.
struct Conv0Share {
  int64_t first;
  int tiles;
  D2V_DEVICE static int64_t size(const Conv0Input& in, int64_t programs) {
    return (in.tiles_before(in.count) + programs - 1) / programs;
  }
  D2V_DEVICE static Conv0Share of(const Conv0Input& in, int64_t program, int64_t programs) {
    const int64_t each = size(in, programs), first = program * each, left = in.tiles_before(in.count) - first;
    return {first, int(left < 0 ? 0 : left < each ? left : each)};
  }
};

// One tile of frames, as two numbers: the rest is found again where it is needed, because registers are short.
struct Conv0Tile {
  int segment, offset;  // frames of the segment before the tile
  D2V_DEVICE void seek(const Conv0Input& in, int64_t tile) {
    segment = int(in.segment_of(tile));
    offset = int((tile - in.tiles_before(segment)) * CONV0_FRAMES);
  }
  D2V_DEVICE void advance(const Conv0Input& in) {
    offset += CONV0_FRAMES;
    while (segment < in.count && offset >= in.size(segment)) {
      ++segment;
      offset = 0;
    }
  }
  D2V_DEVICE int64_t frame(const Conv0Input& in) const { return in.first(segment) + offset; }  // its first
  D2V_DEVICE int left(const Conv0Input& in) const { return int(in.size(segment) - offset); }  // frames from there on
  D2V_DEVICE const float* samples(const Conv0Input& in) const { return in.samples(segment) + offset * in.stride; }
};

// a and b as bfloat16, and what that leaves, as bfloat16
struct SplitPair {
  uint32_t high, low;
};
D2V_DEVICE SplitPair split(float a, float b) {
  const uint32_t high = Bf16::pack(a, b);
  return {high, Bf16::pack(a - Bf16::first(high), b - Bf16::second(high))};
}

// The X of a tile as fragments of matrix instructions: four words to a lane for 16 frames and 16 slots. The word of
// frame lane / 4 + 8 h, slots 2 * (lane % 4) + 8 p and the next is h + 2 p where X is the factor A [frames, slots], and
// p + 2 h where its frames 8 h to 8 h + 7 are the factor B [slots, frames].
template <class S>
struct Conv0Fragments {
  static constexpr int PART = CONV0_FRAMES / 16 * S::STEPS * 32;  // of Words4: high, then low
  static constexpr int SIZE = 2 * PART;
  D2V_DEVICE static int index(int group, int step, int lane) { return (group * S::STEPS + step) * 32 + lane; }
};

D2V_DEVICE void load_fragment(uint32_t (&words)[4], const Words4* from) {
  const Words4 v = *from;
  words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
}

// 1 / deviation over channels of a frame with these samples, shared by four threads q; factor [4, FACTOR_SIZE]
template <class S>
D2V_DEVICE float frame_rstd(const float* samples, bool valid, int taps, int q, const float* factor, float eps) {
  float x[4 * S::FACTORS] = {};
#pragma unroll
  for (int i = 0; i < S::TAPS; ++i) x[i] = valid && i < taps ? samples[i] : 0.f;
  x[S::BIAS] = 1.f;
  const Words4* mine = reinterpret_cast<const Words4*>(factor + q * S::FACTOR_SIZE);
  float variance = 0.f;
#pragma unroll
  for (int g = 0; g < S::FACTORS; ++g) {
    float sum = 0.f;
#pragma unroll
    for (int i = g; i < S::FACTORS; ++i) {
      uint32_t words[4];
      load_fragment(words, mine + S::factor_offset(g) / 4 + i - g);
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (4 * i + e <= S::BIAS) sum = fmaf(bits_float(words[e]), x[4 * i + e], sum);
    }
    variance = fmaf(sum, sum, variance);
  }
  variance += shuffle_xor(variance, 1);
  variance += shuffle_xor(variance, 2);
  return rsqrt_accurate(variance + eps);
}

// What a program needs to lay out a tile. Layer norm: `factor` in shared memory, and 1 / deviation [frames], which
// forward writes (null: nobody wants it) and backward reads. Group norm: `means` [segments, TAPS].
struct Conv0Layout {
  const float* factor;
  float* rstd;
  const float* known_rstd;
  const float* means;
  float eps;
};

// All threads of the block lay out X of `tile`, each item four slots a step of one frame: for forward as the factor A,
// for backward, where rstd is known, as B.
template <class S, bool LAYER, bool BACKWARD>
D2V_DEVICE void lay_out(const Conv0Input& in, const Conv0Tile& tile, const Conv0Layout& layout, Words4* fragments) {
  const int taps = S::taps(in.taps), left = tile.left(in);
  const int64_t first = tile.frame(in);
  const float* first_samples = tile.samples(in);
  for (int item = thread_id(); item < 4 * CONV0_FRAMES; item += num_threads()) {
    const int r = item / 4, q = item % 4;
    const bool valid = r < left;
    const float* samples = first_samples + r * in.stride;
    float scale = 1.f;
    if constexpr (LAYER && BACKWARD) scale = valid ? layout.known_rstd[first + r] : 0.f;
    if constexpr (LAYER && !BACKWARD) {
      scale = frame_rstd<S>(samples, valid, taps, q, layout.factor, layout.eps);
      if (layout.rstd && block_y() == 0 && valid && q == 0) layout.rstd[first + r] = scale;
    }
    const float* means = LAYER ? nullptr : layout.means + int64_t(tile.segment) * S::TAPS;
    const auto slot = [&](int s) {
      if (!valid) return 0.f;
      if (s < taps) return LAYER ? samples[s] * scale : samples[s] - means[s];
      return s == S::ONE ? 1.f : LAYER && s == S::BIAS ? scale : 0.f;
    };
    const int group = r / 16, h = r / 8 % 2, lane = r % 8 * 4 + q;
#pragma unroll
    for (int step = 0; step < S::STEPS; ++step) {
      uint32_t* high = reinterpret_cast<uint32_t*>(fragments + Conv0Fragments<S>::index(group, step, lane));
      uint32_t* low = high + 4 * Conv0Fragments<S>::PART;
      const int s = 16 * step + 2 * q;
      const SplitPair first = split(slot(s), slot(s + 1)), second = split(slot(s + 8), slot(s + 9));
      if constexpr (BACKWARD) {
        store_words(high + 2 * h, Words2{first.high, second.high});
        store_words(low + 2 * h, Words2{first.low, second.low});
      } else {
        high[h] = first.high, high[h + 2] = second.high;
        low[h] = first.low, low[h + 2] = second.low;
      }
    }
  }
}

// c += a b with both factors split: three products, the smallest first; low times low is below the precision kept
D2V_DEVICE void mma_split(float (&c)[4], const uint32_t (&a_high)[4], const uint32_t (&a_low)[4],
                          const uint32_t (&b_high)[2], const uint32_t (&b_low)[2]) {
  mma<Bf16>(c, a_low, b_high);
  mma<Bf16>(c, a_high, b_low);
  mma<Bf16>(c, a_high, b_high);
}

// GELU for results of 16 bits. With a = |u| and e = exp(-a^2 / 2), Phi(-a) = e P(a), where P, half the scaled
// complementary error function, is smooth: a polynomial in a / 5, clamped to 1, needs no reciprocal and keeps the
// tail's relative error. bfloat16: 5e-4; float16: 8e-5 (of values above -5; smaller ones are below 2e-6).
template <class T>
struct Conv0Gelu;

template <>
struct Conv0Gelu<Bf16> {
  D2V_DEVICE static float tail(float s) {  // P
    float p = fmaf(s, -1.95402869f, 8.75939344f);
    p = fmaf(s, p, -16.7336172f);
    p = fmaf(s, p, 18.0119924f);
    p = fmaf(s, p, -12.2918166f);
    p = fmaf(s, p, 5.7561946f);
    p = fmaf(s, p, -1.97102157f);
    return fmaf(s, p, 0.499790765f);
  }
  D2V_DEVICE static float slope(float s) {  // 2 (P(a) - a / sqrt(2 pi)), absolute error times e below 5e-5
    float p = fmaf(s, 17.238619f, -43.4777435f);
    p = fmaf(s, p, 46.1148421f);
    p = fmaf(s, p, -28.4490287f);
    p = fmaf(s, p, 12.1442879f);
    p = fmaf(s, p, -7.96888897f);
    return fmaf(s, p, 0.999954614f);
  }
};
template <>
struct Conv0Gelu<F16> {
  D2V_DEVICE static float tail(float s) {
    float p = fmaf(s, -2.52471255f, 14.0210273f);
    p = fmaf(s, p, -34.2985096f);
    p = fmaf(s, p, 49.0486284f);
    p = fmaf(s, p, -46.1536648f);
    p = fmaf(s, p, 30.7728577f);
    p = fmaf(s, p, -15.4578683f);
    p = fmaf(s, p, 6.1610812f);
    p = fmaf(s, p, -1.99190674f);
    return fmaf(s, p, 0.499984255f);
  }
  D2V_DEVICE static float slope(float s) {  // below 4e-6
    float p = fmaf(s, 22.4657757f, -79.9039147f);
    p = fmaf(s, p, 122.91782f);
    p = fmaf(s, p, -111.052121f);
    p = fmaf(s, p, 68.5799629f);
    p = fmaf(s, p, -32.2874872f);
    p = fmaf(s, p, 12.4514473f);
    p = fmaf(s, p, -7.97789972f);
    return fmaf(s, p, 0.999996975f);
  }
};

template <class T>
D2V_DEVICE float conv0_gelu(float u) {
  const float a = fabsf(u), bell = exp2_fast(u * -0.72134752f * u);
  return fmaf(-(a * bell), Conv0Gelu<T>::tail(saturate(0.2f * a)), fmaxf(u, 0.f));
}

// Twice the gradient of u, from v = CONV0_BWD_SCALE * u: 2 gelu'(u) = 1 + sign(u) (1 - e R) takes one instruction less
// than gelu'(u).
constexpr float CONV0_BWD_SCALE = 0.84932180f;  // sqrt(log2(e) / 2): exp(-u^2 / 2) = 2^(-v^2)
template <class T>
D2V_DEVICE float conv0_gelu_twice_grad(float grad, float v) {
  const float r = Conv0Gelu<T>::slope(saturate(0.2f / CONV0_BWD_SCALE * fabsf(v)));
  const float t = fmaf(-exp2_fast(-v * v), r, 1.f);
  return fmaf(grad, bits_float(float_bits(t) ^ (float_bits(v) & 0x80000000u)), grad);
}

}  // namespace d2v
