// What the matrix kernels need first: moments of the taps (group norm), and the weights with the norm folded in.
#pragma once
#include "conv0.cuh"

namespace d2v {

constexpr int CONV0_PREPARE_THREADS = 256;
constexpr int CONV0_LAYER_THREADS = 512;  // one block has to do it all
constexpr int CONV0_LAID_OUT_ROWS = 256;  // in shared memory at a time

// table [count + 1, 4] of segments [count, 2]: first frame, frames, tiles before it, where its first sample is; the
// last row has the number of all tiles. Segments are cut to their row, so that none reads what is not there. One block.
D2V_KERNEL void D2V_BOUNDS(CONV0_PREPARE_THREADS, 1)
    conv0_segment_table(Conv0Input in, const int64_t* segments, int64_t rows, int64_t* table) {
  int64_t* sums = reinterpret_cast<int64_t*>(shared_memory());  // [threads] tiles of the segments up to a thread's last
  const int me = thread_id();
  const int64_t each = (in.count + num_threads() - 1) / num_threads();
  const int64_t begin = me * each, end = begin + each < in.count ? begin + each : in.count;
  int64_t tiles = 0;
  for (int64_t s = begin; s < end; ++s) {
    const int64_t all = rows * in.frames_per_row, wanted = segments[2 * s];
    const int64_t first = wanted < 0 ? 0 : wanted < all ? wanted : all - 1;
    const int64_t row = first / in.frames_per_row, frame = first - row * in.frames_per_row;
    const int64_t left = in.frames_per_row - frame, count = segments[2 * s + 1];
    const int64_t size = count < 0 || wanted != first ? 0 : count < left ? count : left;
    int64_t* out = table + 4 * s;
    out[0] = first, out[1] = size, out[3] = row * in.row_stride + frame * in.stride;
    tiles += (size + CONV0_FRAMES - 1) / CONV0_FRAMES;
  }
  sums[me] = tiles;
  for (int step = 1; step < num_threads(); step *= 2) {
    block_barrier();
    const int64_t before = me >= step ? sums[me - step] : 0;
    block_barrier();
    sums[me] += before;
  }
  int64_t before = sums[me] - tiles;
  for (int64_t s = begin; s < end; ++s) {
    table[4 * s + 2] = before;
    before += (table[4 * s + 1] + CONV0_FRAMES - 1) / CONV0_FRAMES;
  }
  if (me == num_threads() - 1) table[4 * in.count + 2] = sums[me];
}

// Products of all pairs i <= j of `n` columns, one thread a pair; with more threads, several share the rows.
struct PairSums {
  int i = 0, j = 0, pairs, first_row, row_step;
  double sum = 0;
  D2V_DEVICE explicit PairSums(int n) : pairs(n * (n + 1) / 2) {
    row_step = num_threads() / pairs;
    first_row = thread_id() / pairs;
    int p = thread_id() % pairs;
    for (; p >= n - i; ++i) p -= n - i;
    j = i + p;
  }
  D2V_DEVICE bool takes_part() const { return first_row < row_step; }
  D2V_DEVICE void add(const double* rows, int n, int count) {  // rows [count, n]
    if (!takes_part()) return;
#pragma unroll 4
    for (int r = first_row; r < count; r += row_step) sum = fma(rows[r * n + i], rows[r * n + j], sum);
  }
  // The sums of all threads of a pair, in order, for the first of them. `scratch`: a number for each thread.
  D2V_DEVICE double total(double* scratch) {
    block_barrier();
    scratch[thread_id()] = sum;
    block_barrier();
    double all = 0;
    if (first_row == 0)
      for (int k = 0; k < row_step; ++k) all += scratch[k * pairs + thread_id()];
    return all;
  }
};
D2V_DEVICE int pair_index(int i, int j, int n) { return i * n - i * (i - 1) / 2 + j - i; }  // i <= j

// Group norm. partial [segments, grid y, pairs of (taps, 1)]: sums of products over a share of a segment's frames.
D2V_KERNEL void D2V_BOUNDS(CONV0_PREPARE_THREADS, 2) conv0_products(Conv0Input in, double* partial) {
  double* rows = reinterpret_cast<double*>(shared_memory());  // [LAID_OUT_ROWS, n]
  const int k = in.taps, n = k + 1;
  const int64_t segment = block_x(), size = in.size(segment);
  const int64_t begin = size * block_y() / grid_y(), end = size * (block_y() + 1) / grid_y();
  PairSums sums(n);
  const float* samples = in.samples(segment);
  for (int64_t frame = begin; frame < end; frame += CONV0_LAID_OUT_ROWS) {
    const int count = end - frame < CONV0_LAID_OUT_ROWS ? int(end - frame) : CONV0_LAID_OUT_ROWS;
    block_barrier();
    for (int e = thread_id(); e < count * n; e += num_threads()) {
      const int r = e / n, tap = e % n;
      rows[e] = tap < k ? double(samples[(frame + r) * in.stride + tap]) : 1.0;
    }
    block_barrier();
    sums.add(rows, n, count);
  }
  const double total = sums.total(rows);
  if (sums.first_row == 0) partial[(segment * grid_y() + block_y()) * sums.pairs + thread_id()] = total;
}

// Group norm. moments [segments, k + k * k]: mean and covariance of the taps, from partial [segments, shares, pairs].
D2V_KERNEL void D2V_BOUNDS(CONV0_PREPARE_THREADS, 2)
    conv0_moments(Conv0Input in, const double* partial, int64_t shares, double* moments) {
  double* sums = reinterpret_cast<double*>(shared_memory());  // [pairs]
  const int k = in.taps, n = k + 1, pairs = n * (n + 1) / 2;
  const int64_t segment = block_x(), size = in.size(segment);
  const double inverse = size ? 1.0 / double(size) : 0.0;
  if (thread_id() < pairs) {
    double sum = 0;
    for (int64_t first = 0; first < shares; first += 8) {  // eight loads under way
      double values[8];
#pragma unroll
      for (int i = 0; i < 8; ++i)
        values[i] = first + i < shares ? partial[(segment * shares + first + i) * pairs + thread_id()] : 0.0;
#pragma unroll
      for (int i = 0; i < 8; ++i) sum += values[i];
    }
    sums[thread_id()] = sum * inverse;
  }
  block_barrier();
  double* out = moments + segment * (k + k * k);
  const auto mean = [&](int i) { return sums[pair_index(i, k, n)]; };
  if (thread_id() < k) out[thread_id()] = mean(thread_id());
  if (thread_id() < k * k) {
    const int a = thread_id() / k, b = thread_id() % k;
    out[k + thread_id()] = sums[a < b ? pair_index(a, b, n) : pair_index(b, a, n)] - mean(a) * mean(b);
  }
}

// Parameters of the convolution and the norm; null: no bias, 1, 0.
struct Conv0Parameters {
  const float* weight;  // [C, taps]
  const float* bias;    // [C]
  const float* gamma;
  const float* beta;
  int64_t C;
  int taps;
  D2V_DEVICE float scale(int64_t c) const { return gamma ? gamma[c] : 1.f; }
  D2V_DEVICE float offset(int64_t c) const { return beta ? beta[c] : 0.f; }
  // tap or bias `slot` of Conv0Shape S of channel c, 0 where there is none
  template <class S>
  D2V_DEVICE float at(int64_t c, int slot) const {
    if (slot < taps) return weight[c * taps + slot];
    return slot == S::BIAS && bias ? bias[c] : 0.f;
  }
};

// `value(slot)` of all slots of channel c into weights [2, C, WIDTH], a thread a pair of slots
template <class S, class F>
D2V_DEVICE void store_weights(uint32_t* weights, int64_t C, int64_t c, int pair, F value) {
  const SplitPair words = split(value(2 * pair), value(2 * pair + 1));
  weights[c * (S::WIDTH / 2) + pair] = words.high;
  weights[(C + c) * (S::WIDTH / 2) + pair] = words.low;
}

// Of a channel under group norm, by one warp: lane l has element l of w Cov, and all have 1 / deviation.
struct GroupStatistics {
  double product, rstd;
  D2V_DEVICE static GroupStatistics of(const Conv0Parameters& p, const double* covariance, int64_t c, float eps) {
    const int lane = thread_id() % 32, k = p.taps;
    double product = 0, variance = 0;
    if (lane < k) {
      for (int l = 0; l < k; ++l) product = fma(double(p.weight[c * k + l]), covariance[lane * k + l], product);
      variance = product * double(p.weight[c * k + lane]);
    }
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) variance += shuffle_xor(variance, mask);
    variance = variance < 0 ? 0 : variance;  // NaN stays
    return {product, 1.0 / sqrt(variance + double(eps))};
  }
};

// Group norm: weights [segments, 2, C, WIDTH], times `scale`, and means [segments, TAPS] in float32. Grid: segments x
// blocks of channels, a warp a channel.
template <class S>
D2V_KERNEL void D2V_BOUNDS(CONV0_PREPARE_THREADS, 2)
    conv0_group_weights(Conv0Parameters p, const double* moments, float eps, float scale, uint32_t* weights,
                        float* means) {
  const int k = p.taps, lane = thread_id() % 32;
  const int64_t segment = block_x();
  const double* mine = moments + segment * (k + k * k);
  if (block_y() == 0 && thread_id() < S::TAPS)
    means[segment * S::TAPS + thread_id()] = thread_id() < k ? float(mine[thread_id()]) : 0.f;
  const int64_t c = (int64_t(block_y()) * num_threads() + thread_id()) / 32;
  if (c >= p.C) return;
  const float factor = scale * p.scale(c) * float(GroupStatistics::of(p, mine + k, c, eps).rstd);
  const auto value = [&](int s) {
    return s < k ? factor * p.weight[c * k + s] : s == S::ONE ? scale * p.offset(c) : 0.f;
  };
  if (lane < S::WIDTH / 2) store_weights<S>(weights + segment * p.C * S::WIDTH, p.C, c, lane, value);
}

// Layer norm, one block: centre [TAPS + 1] means of taps and bias over the channels; factor [4, FACTOR_SIZE], the
// Cholesky factor of their covariance (Conv0Shape); weights [2, C, WIDTH], times `scale`.
template <class S>
D2V_KERNEL void D2V_BOUNDS(CONV0_LAYER_THREADS, 1)
    conv0_layer_weights(Conv0Parameters p, float scale, double* centre, float* factor, uint32_t* weights) {
  constexpr int N = S::TAPS + 1, ALL = N + 1;  // columns of the covariance; with 1, whose products are the sums
  double* rows = reinterpret_cast<double*>(shared_memory());  // [LAID_OUT_ROWS, ALL]
  double* covariance = rows + CONV0_LAID_OUT_ROWS * ALL;      // [N, N], then the factor in its lower half
  double* mean = covariance + N * N;                          // [N]
  PairSums sums(ALL);
  for (int64_t first = 0; first < p.C; first += CONV0_LAID_OUT_ROWS) {
    const int count = p.C - first < CONV0_LAID_OUT_ROWS ? int(p.C - first) : CONV0_LAID_OUT_ROWS;
    block_barrier();
    for (int e = thread_id(); e < count * ALL; e += num_threads()) {
      const int64_t c = first + e / ALL;
      const int slot = e % ALL;  // less the first channel's: nothing cancels where channels are alike
      rows[e] = slot < N ? double(p.at<S>(c, slot)) - double(p.at<S>(0, slot)) : 1.0;
    }
    block_barrier();
    sums.add(rows, ALL, count);
  }
  const double total = sums.total(rows) / double(p.C);
  if (sums.first_row == 0 && sums.j == N && sums.i < N) mean[sums.i] = total;
  block_barrier();
  const bool mine = sums.first_row == 0 && sums.j < N;
  if (mine) covariance[sums.j * N + sums.i] = total - mean[sums.i] * mean[sums.j];
  block_barrier();
  if (thread_id() < N) rows[thread_id()] = 1e-13 * covariance[thread_id() * N + thread_id()];  // what counts as 0
  for (int column = 0; column < N; ++column) {
    block_barrier();
    const double pivot = covariance[column * N + column];
    // A column that depends on those before it has nothing left but rounding. NaN is not <=: it goes on.
    const double inverse = pivot <= rows[column] ? 0.0 : 1.0 / sqrt(pivot);
    block_barrier();
    if (thread_id() >= column && thread_id() < N) covariance[thread_id() * N + column] *= inverse;
    block_barrier();
    if (mine && sums.i > column)
      covariance[sums.j * N + sums.i] -= covariance[sums.j * N + column] * covariance[sums.i * N + column];
  }
  block_barrier();
  for (int e = thread_id(); e < 4 * S::FACTOR_SIZE; e += num_threads()) {
    const int q = e / S::FACTOR_SIZE, place = e % S::FACTOR_SIZE;
    int g = 0;
    while (g + 1 < S::FACTORS && S::factor_offset(g + 1) <= place) ++g;
    const int column = 4 * g + q, row = 4 * g + place - S::factor_offset(g);
    factor[e] = column <= row && row < N ? float(covariance[row * N + column]) : 0.f;
  }
  if (thread_id() < N) centre[thread_id()] = double(p.at<S>(0, thread_id())) + mean[thread_id()];
#pragma unroll 4
  for (int64_t e = thread_id(); e < p.C * (S::WIDTH / 2); e += num_threads()) {
    const int64_t c = e / (S::WIDTH / 2);
    const auto value = [&](int s) {
      if (s >= N) return s == S::ONE ? scale * p.offset(c) : 0.f;
      const double centred = double(p.at<S>(c, s)) - double(p.at<S>(0, s)) - mean[s];
      return scale * p.scale(c) * float(centred);
    };
    store_weights<S>(weights, p.C, c, int(e % (S::WIDTH / 2)), value);
  }
}

}  // namespace d2v
