// Grouped convolution over frames, channels last; towards its input with transposed weights and the taps flipped:
//   out[row, o] = sum over taps, i of in[row + tap - padding, i] weight[tap][o][i]
// A block takes a tile of frames and one group. Frames with their neighbours lie in shared memory, weights pass through
// it a few taps at a time; each warp multiplies 64 frames with mma.m16n8k16. What the layers have between them happens
// on the way in and out: GELU of the layer norm forward, its gradient backward. Statistics of a frame run over all
// groups, so each block leaves two numbers per frame and group, and whoever reads the frame next combines them.
#pragma once
#include "gelu.cuh"
#include "pos_conv_tiles.cuh"

namespace d2v {

constexpr int CONV_WARPS = 4;
constexpr int CONV_THREADS = 32 * CONV_WARPS;
constexpr int WARP_FRAMES = TILE / CONV_WARPS;
constexpr int WARP_ROWS = WARP_FRAMES / 16;  // fragments of 16 frames

enum ConvInput {
  AS_IT_IS,    // in = x
  ACTIVATION,  // in = gelu(norm(x)): x is the convolution's result in the layer below
  NORM_GRAD    // in = gradient of z, from that of norm(z), which is x
};
enum ConvOutput {
  RESULT,       // out
  WITH_SUMS,    // z = out + bias, and mean and squared deviations of its frames
  THROUGH_GELU  // out times the slope of the GELU at norm(z) of the layer below, and sums for its norm's gradient
};

// [rows, C] 16-bit, [rows, groups, 2] and [2, rows] float; null where the mode does not need it
struct ConvArgs {
  Tiles tiles;
  int64_t rows;
  int groups, taps, padding;
  bool flipped;  // taps in reverse order
  float eps;
  ConvInput input;
  ConvOutput output;
  const uint16_t* x;
  const uint16_t* weight;  // [groups, taps, D out, D in], outputs in the order that pos_conv.h describes
  const uint16_t* z;       // NORM_GRAD
  const float* sums;       // of x: ACTIVATION with a norm, NORM_GRAD
  float* stats;            // mean, 1 / deviation: ACTIVATION writes those of x, NORM_GRAD reads those of z
  uint16_t* in_copy;       // gets in: NORM_GRAD
  const float* bias;       // [C]: WITH_SUMS
  uint16_t* out;
  float* out_sums;           // WITH_SUMS and THROUGH_GELU with a norm
  const uint16_t* below;     // z of the layer below: THROUGH_GELU
  const float* below_stats;  // likewise, with a norm
  uint16_t* below_copy;      // gets gelu(norm(below))
};

template <int D>
constexpr int TAPS_AT_ONCE = 8192 / (D * D);  // 16 KB of weights

template <int D>
constexpr size_t conv_shared_bytes(int taps) {
  const size_t frames = TILE + taps - 1;
  const size_t inputs = frames * (sizeof(float) * 4 + PITCH<D>) + 2 * size_t(TAPS_AT_ONCE<D>) * D * PITCH<D>;
  const size_t results = sizeof(float) * TILE * D;
  return inputs > results ? inputs : results;
}

// What turns the elements of a row into the input of the convolution.
struct alignas(16) RowTerms {
  float mean, rstd, grad, product;  // the last two: means of the gradient, and of its product with the normalised row
};

struct Sums {
  float first, second;
};
D2V_DEVICE Sums sums_of_group(const float* sums, int group) {
  const Words2 v = load_words<Words2>(sums + 2 * group);
  return {bits_float(v.x), bits_float(v.y)};
}

// Mean and 1 / deviation of a row from those of its groups of D channels (Chan et al. 1979), as seen from the first.
template <int D>
D2V_DEVICE RowTerms combine_groups(const float* sums, int groups, float eps) {
  const float base = sums_of_group(sums, 0).first;
  float shift = 0.f, squares = 0.f, spread = 0.f;
#pragma unroll 8
  for (int g = 0; g < groups; ++g) {
    const Sums of = sums_of_group(sums, g);
    const float d = of.first - base;
    shift += d;
    squares = fmaf(d, d, squares);
    spread += of.second;
  }
  shift /= groups;
  spread = fmaf(float(D), fmaxf(squares - groups * shift * shift, 0.f), spread);
  return {base + shift, rsqrt_accurate(spread / (groups * D) + eps), 0.f, 0.f};
}

template <int D>
D2V_DEVICE RowTerms row_terms(const ConvArgs& args, const Tile& tile, int64_t row) {
  if (args.sums == nullptr) return {0.f, 1.f, 0.f, 0.f};
  const float* sums = args.sums + row * args.groups * 2;
  if (args.input == ACTIVATION) {
    const RowTerms terms = combine_groups<D>(sums, args.groups, args.eps);
    if (block_y() == 0 && row >= tile.first && row < tile.first + tile.frames()) {
      args.stats[row] = terms.mean;
      args.stats[args.rows + row] = terms.rstd;
    }
    return terms;
  }
  float grad = 0.f, product = 0.f;
#pragma unroll 8
  for (int g = 0; g < args.groups; ++g) {
    const Sums of = sums_of_group(sums, g);
    grad += of.first;
    product += of.second;
  }
  const float channels = float(args.groups * D);
  return {args.stats[row], args.stats[args.rows + row], grad / channels, product / channels};
}

template <class T>
D2V_DEVICE Words4 activate(const Words4& x, const RowTerms& row) {
  const auto one = [&row](float x) { return gelu((x - row.mean) * row.rstd); };
  const auto two = [&one](uint32_t x) { return T::pack(one(T::first(x)), one(T::second(x))); };
  return {two(x.x), two(x.y), two(x.z), two(x.w)};
}

template <class T>
D2V_DEVICE Words4 norm_grad(const Words4& grad, const Words4& z, const RowTerms& row) {
  const auto one = [&row](float grad, float z) {
    return row.rstd * (grad - row.grad - (z - row.mean) * row.rstd * row.product);
  };
  const auto two = [&one](uint32_t grad, uint32_t z) {
    return T::pack(one(T::first(grad), T::first(z)), one(T::second(grad), T::second(z)));
  };
  return {two(grad.x, z.x), two(grad.y, z.y), two(grad.z, z.z), two(grad.w, z.w)};
}

// Brings rows tile.first - padding ... of one group into shared memory, 0 outside the segment.
template <class T, int D>
D2V_DEVICE void load_frames(const ConvArgs& args, const Tile& tile, int rows, RowTerms* terms, unsigned char* frames) {
  const int64_t start = tile.first - args.padding;
  const int64_t channels = int64_t(args.groups) * D, column = int64_t(block_y()) * D;
  if (args.input == AS_IT_IS) {
    copy_rows<D>(frames, args.x + column, channels, start, rows, tile.begin, tile.end);
    return;
  }
  for (int r = thread_id(); r < rows; r += CONV_THREADS)
    if (tile.inside(start + r)) terms[r] = row_terms<D>(args, tile, start + r);
  block_barrier();
  constexpr int BATCH = 4;  // loads of a thread on their way at once
  const int count = rows * (D / 8);
  for (int first = thread_id(); first < count; first += BATCH * CONV_THREADS) {
    Words4 v[BATCH] = {}, z[BATCH] = {};
#pragma unroll
    for (int b = 0; b < BATCH; ++b) {
      const int i = first + b * CONV_THREADS;
      const int64_t row = start + i / (D / 8);
      if (i >= count || !tile.inside(row)) continue;
      const int64_t offset = row * channels + column + i % (D / 8) * 8;
      v[b] = load_words<Words4>(args.x + offset);
      if (args.input == NORM_GRAD) z[b] = load_words<Words4>(args.z + offset);
    }
#pragma unroll
    for (int b = 0; b < BATCH; ++b) {
      const int i = first + b * CONV_THREADS, r = i / (D / 8), chunk = i % (D / 8);
      if (i >= count) continue;
      const int64_t row = start + r;
      if (tile.inside(row)) {
        v[b] = args.input == ACTIVATION ? activate<T>(v[b], terms[r]) : norm_grad<T>(v[b], z[b], terms[r]);
        if (args.input == NORM_GRAD && row >= tile.first && row < tile.first + tile.frames())
          store_words(args.in_copy + row * channels + column + chunk * 8, v[b]);
      }
      store_words(frames + r * PITCH<D> + chunk * 16, v[b]);
    }
  }
}

template <int D>
D2V_DEVICE void load_weights(const ConvArgs& args, int tap, unsigned char* weights) {
  const int left = args.taps - tap;
  const int rows = D * (left < TAPS_AT_ONCE<D> ? left : TAPS_AT_ONCE<D>);
  const uint16_t* from = args.weight + (int64_t(block_y()) * args.taps + tap) * D * D;
  for (int i = thread_id(); i < rows * (D / 8); i += CONV_THREADS)
    async_copy16(weights + i / (D / 8) * PITCH<D> + i % (D / 8) * 16, from + i * 8, true);
}

// acc += 64 frames [., D] times one tap's weights [D, D]
template <class T, int D>
D2V_DEVICE void multiply_tap(const unsigned char* frames, const unsigned char* weights,
                             float (&acc)[WARP_ROWS][D / 8][4]) {
  const int lane = thread_id() % 32;
  const unsigned char* a_row = frames + lane % 16 * PITCH<D> + lane / 16 * 16;
  const unsigned char* b_row = weights + (lane / 16 * 8 + lane % 8) * PITCH<D> + lane / 8 % 2 * 16;
#pragma unroll
  for (int k = 0; k < D; k += 16) {
    uint32_t a[WARP_ROWS][4];
#pragma unroll
    for (int m = 0; m < WARP_ROWS; ++m) load_matrices(a[m], a_row + m * 16 * PITCH<D> + k * 2);
#pragma unroll
    for (int pair = 0; pair < D / 16; ++pair) {
      uint32_t b[4];
      load_matrices(b, b_row + pair * 16 * PITCH<D> + k * 2);
#pragma unroll
      for (int m = 0; m < WARP_ROWS; ++m) {
        mma<T>(acc[m][2 * pair], a[m], {b[0], b[1]});
        mma<T>(acc[m][2 * pair + 1], a[m], {b[2], b[3]});
      }
    }
  }
}

D2V_DEVICE float sum_of_four_lanes(float v) {
  v += shuffle_xor(v, 1);
  return v + shuffle_xor(v, 2);
}

// One row's share of this lane: in each pair of n8 fragments four neighbouring channels, thanks to the weights' order.
template <class T, int D>
struct ConvRow {
  const ConvArgs& args;
  int64_t row;
  bool inside;

  D2V_DEVICE int64_t offset(int pair) const {
    return (row * args.groups + block_y()) * D + pair * 16 + thread_id() % 4 * 4;
  }
  D2V_DEVICE void write(uint16_t* to, int pair, uint32_t first, uint32_t second) const {
    if (inside) store_words(to + offset(pair), Words2{first, second});
  }
  D2V_DEVICE void write_sums(float first, float second) const {
    if (inside && thread_id() % 4 == 0)
      store_words(args.out_sums + (row * args.groups + block_y()) * 2, Words2{float_bits(first), float_bits(second)});
  }

  D2V_DEVICE void result(const float (&v)[D / 4]) const {
#pragma unroll
    for (int p = 0; p < D / 16; ++p)
      write(args.out, p, T::pack(v[4 * p], v[4 * p + 1]), T::pack(v[4 * p + 2], v[4 * p + 3]));
  }

  // The sums are those of the rounded values: of what the norm will see.
  D2V_DEVICE void with_sums(float (&v)[D / 4]) const {
    float sum = 0.f, spread = 0.f;
#pragma unroll
    for (int p = 0; p < D / 16; ++p) {
      if (args.bias != nullptr) {
        const Words4 bias = load_words<Words4>(args.bias + block_y() * D + p * 16 + thread_id() % 4 * 4);
        v[4 * p] += bits_float(bias.x), v[4 * p + 1] += bits_float(bias.y);
        v[4 * p + 2] += bits_float(bias.z), v[4 * p + 3] += bits_float(bias.w);
      }
      const uint32_t low = T::pack(v[4 * p], v[4 * p + 1]), high = T::pack(v[4 * p + 2], v[4 * p + 3]);
      write(args.out, p, low, high);
      v[4 * p] = T::first(low), v[4 * p + 1] = T::second(low);
      v[4 * p + 2] = T::first(high), v[4 * p + 3] = T::second(high);
      sum += v[4 * p] + v[4 * p + 1] + v[4 * p + 2] + v[4 * p + 3];
    }
    if (args.out_sums == nullptr) return;
    const float mean = sum_of_four_lanes(sum) / D;
#pragma unroll
    for (int i = 0; i < D / 4; ++i) spread = fmaf(v[i] - mean, v[i] - mean, spread);
    write_sums(mean, sum_of_four_lanes(spread));
  }

  D2V_DEVICE void through_gelu(const float (&v)[D / 4]) const {
    float mean = 0.f, rstd = 1.f, sum = 0.f, product = 0.f;
    if (inside && args.below_stats != nullptr) mean = args.below_stats[row], rstd = args.below_stats[args.rows + row];
#pragma unroll
    for (int p = 0; p < D / 16; ++p) {
      Words2 z{0, 0};
      if (inside) z = load_words<Words2>(args.below + offset(p));
      const float normed[4] = {(T::first(z.x) - mean) * rstd, (T::second(z.x) - mean) * rstd,
                               (T::first(z.y) - mean) * rstd, (T::second(z.y) - mean) * rstd};
      float value[4], grad[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const Gelu g = gelu_and_slope(normed[e]);
        value[e] = g.value;
        grad[e] = v[4 * p + e] * g.slope;
      }
      const uint32_t low = T::pack(grad[0], grad[1]), high = T::pack(grad[2], grad[3]);
      write(args.out, p, low, high);
      write(args.below_copy, p, T::pack(value[0], value[1]), T::pack(value[2], value[3]));
      sum += T::first(low) + T::second(low) + T::first(high) + T::second(high);
      product = fmaf(T::first(low), normed[0], fmaf(T::second(low), normed[1], product));
      product = fmaf(T::first(high), normed[2], fmaf(T::second(high), normed[3], product));
    }
    if (args.out_sums == nullptr) return;
    sum = sum_of_four_lanes(sum);
    write_sums(sum, sum_of_four_lanes(product));
  }
};

// Results go through shared memory, each thread's own to and fro, so that one piece of code serves all its rows:
// registers cannot be counted through, and eight copies of what follows would crowd the instruction cache.
template <class T, int D>
D2V_DEVICE void write_frames(const ConvArgs& args, const Tile& tile, int first, float (&acc)[WARP_ROWS][D / 8][4]) {
  float* own = reinterpret_cast<float*>(shared_memory()) + thread_id();  // [2 WARP_ROWS, D / 4, CONV_THREADS]
#pragma unroll
  for (int m = 0; m < WARP_ROWS; ++m)
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        own[((2 * m + e / 2) * (D / 4) + 2 * n + e % 2) * CONV_THREADS] = acc[m][n][e];
#pragma unroll 2
  for (int r = 0; r < 2 * WARP_ROWS; ++r) {
    const int frame = first + r * 8 + thread_id() % 32 / 4;
    const ConvRow<T, D> row{args, tile.first + frame, frame < tile.frames()};
    float v[D / 4];
#pragma unroll
    for (int i = 0; i < D / 4; ++i) v[i] = own[(r * (D / 4) + i) * CONV_THREADS];
    if (args.output == RESULT) row.result(v);
    else if (args.output == WITH_SUMS) row.with_sums(v);
    else row.through_gelu(v);
  }
}

template <class T, int D>
D2V_KERNEL void D2V_BOUNDS(CONV_THREADS, D <= 48 ? 3 : 2) pos_conv_kernel(const ConvArgs args) {
  const Tile tile = args.tiles.at(block_x());
  if (tile.frames() <= 0) return;  // the table may have room to spare
  RowTerms* terms = reinterpret_cast<RowTerms*>(shared_memory());
  unsigned char* frames = shared_memory() + (TILE + args.taps - 1) * sizeof(RowTerms);
  unsigned char* weights = frames + (TILE + args.taps - 1) * PITCH<D>;  // two buffers
  constexpr int BUFFER = TAPS_AT_ONCE<D> * D * PITCH<D>;

  const int first = thread_id() / 32 * WARP_FRAMES;  // of this warp
  const bool active = first < tile.frames();
  const int used = (tile.frames() + WARP_FRAMES - 1) / WARP_FRAMES * WARP_FRAMES;
  load_weights<D>(args, 0, weights);
  load_frames<T, D>(args, tile, used + args.taps - 1, terms, frames);
  async_commit();

  float acc[WARP_ROWS][D / 8][4] = {};
  for (int tap = 0, buffer = 0; tap < args.taps; tap += TAPS_AT_ONCE<D>, buffer ^= 1) {
    const int next = tap + TAPS_AT_ONCE<D>;
    if (next < args.taps) load_weights<D>(args, next, weights + (buffer ^ 1) * BUFFER);
    async_commit();
    async_wait<1>();
    block_barrier();
    if (active) {
      const int left = args.taps - tap;
      const int count = left < TAPS_AT_ONCE<D> ? left : TAPS_AT_ONCE<D>;
#pragma unroll 1
      for (int t = 0; t < count; ++t) {
        const int ahead = args.flipped ? args.taps - 1 - tap - t : tap + t;
        multiply_tap<T, D>(frames + (first + ahead) * PITCH<D>, weights + buffer * BUFFER + t * D * PITCH<D>, acc);
      }
    }
    block_barrier();
  }
  if (active) write_frames<T, D>(args, tile, first, acc);
}

}  // namespace d2v
