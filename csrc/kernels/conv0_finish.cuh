// From the sums of backward to the gradients [C, k + 3]: taps, bias, norm_weight, norm_bias.
#pragma once
#include "conv0_prepare.cuh"

namespace d2v {

constexpr int CONV0_REDUCE_WARPS = 32, CONV0_GRADS_WARPS = 8;  // at most
constexpr int CONV0_ROWS_AT_ONCE = 8;  // loads of a thread under way

// Sums over rows [begin, end) of `in` [rows, columns], 32 columns a block, always in the same order.
D2V_DEVICE void sum_rows(const float* in, int64_t begin, int64_t end, int64_t columns, int64_t first_column,
                         float* out) {
  double* scratch = reinterpret_cast<double*>(shared_memory());
  const int lane = thread_id() % 32, warp = thread_id() / 32, warps = num_threads() / 32;
  const int64_t column = first_column + lane;
  double sum = 0;
  for (int64_t first = begin + warp; first < end && column < columns; first += CONV0_ROWS_AT_ONCE * warps) {
    float values[CONV0_ROWS_AT_ONCE];
#pragma unroll
    for (int i = 0; i < CONV0_ROWS_AT_ONCE; ++i) {
      const int64_t row = first + i * warps;
      values[i] = row < end ? in[row * columns + column] : 0.f;
    }
#pragma unroll
    for (int i = 0; i < CONV0_ROWS_AT_ONCE; ++i) sum += double(values[i]);
  }
  scratch[thread_id()] = sum;
  block_barrier();
  if (warp > 0 || column >= columns) return;
  for (int w = 1; w < warps; ++w) sum += scratch[32 * w + lane];
  out[column] = float(sum);
}

// What the programs left, added up. Blocks x below `outer_blocks`: 32 columns of outer, of segment y (layer norm: of
// all tiles); the others: 32 columns of inner. programs: grid x of conv0_bwd.
D2V_KERNEL void D2V_BOUNDS(32 * CONV0_REDUCE_WARPS, 1)
    conv0_reduce(Conv0Input in, int64_t programs, bool layer, const float* outer, int64_t outer_columns,
                 int64_t outer_blocks, const float* inner, int64_t inner_columns, int64_t inner_per_program,
                 float* outer_sum /*[segments or 1, outer_columns]*/, float* inner_sum /*[inner_columns]*/) {
  const int64_t each = Conv0Share::size(in, programs), segment = block_y();
  const int64_t first = layer ? 0 : in.tiles_before(segment);
  const int64_t end = in.tiles_before(layer ? in.count : segment + 1);
  // programs with a tile in [first, end)
  const int64_t begin_program = first < end ? first / each : 0;
  const int64_t end_program = first < end ? (end - 1) / each + 1 : 0;
  if (block_x() < outer_blocks) {
    sum_rows(outer, begin_program + segment, end_program + segment, outer_columns, int64_t(block_x()) * 32,
             outer_sum + segment * outer_columns);
  } else {
    sum_rows(inner, 0, end_program * inner_per_program, inner_columns, (block_x() - outer_blocks) * 32, inner_sum);
  }
}

// Layer norm; a thread an element of grads.
template <class S>
D2V_KERNEL void D2V_BOUNDS(32 * CONV0_GRADS_WARPS, 2)
    conv0_layer_grads(Conv0Parameters p, const double* centre, const float* outer /*[C, COLUMNS]*/,
                      const float* inner /*[WIDTH, COLUMNS]*/, float* grads) {
  const int k = p.taps;
  const int64_t element = int64_t(block_x()) * num_threads() + thread_id();
  const int64_t c = element / (k + 3);
  const int column = int(element % (k + 3));
  if (c >= p.C) return;
  const float* mine = outer + c * S::COLUMNS;
  const auto centred = [&](int slot) {
    return slot >= k && slot != S::BIAS ? 0.0 : double(p.at<S>(c, slot)) - centre[slot];
  };
  double value = 0;
  if (column <= k) {
    const int slot = column < k ? column : S::BIAS;
    double shared = inner[S::ONE * S::COLUMNS + slot];
    for (int l = 0; l <= S::BIAS; ++l) shared = fma(centred(l), double(inner[l * S::COLUMNS + slot]), shared);
    value = double(p.scale(c)) * double(mine[slot]) - shared / (double(CONV0_BWD_SCALE) * double(p.C));
  } else if (column == k + 1) {
    for (int l = 0; l <= S::BIAS; ++l) value = fma(centred(l), double(mine[l]), value);
  } else {
    value = mine[S::ONE];
  }
  grads[element] = float(0.5 * value);  // the sums are of 2 du
}

// Group norm; a block a channel, its warps take segments in turn. outer [segments, C, COLUMNS].
template <class S>
D2V_KERNEL void D2V_BOUNDS(32 * CONV0_GRADS_WARPS, 2)
    conv0_group_grads(Conv0Parameters p, const double* moments, float eps, int64_t segments, const float* outer,
                      float* grads) {
  double* scratch = reinterpret_cast<double*>(shared_memory());  // [warps, 32]
  const int k = p.taps, lane = thread_id() % 32, warps = num_threads() / 32;
  const int64_t c = block_x();
  double weight = 0, gamma = 0, beta = 0;
  for (int64_t s = thread_id() / 32; s < segments; s += warps) {
    const GroupStatistics channel = GroupStatistics::of(p, moments + s * (k + k * k) + k, c, eps);
    const float* mine = outer + (s * p.C + c) * S::COLUMNS;
    const double sum = lane < k ? mine[lane] : 0;  // of 2 du x
    double scaled = lane < k ? sum * double(p.weight[c * k + lane]) : 0;
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) scaled += shuffle_xor(scaled, mask);
    scaled *= channel.rstd;  // sum of 2 du h
    weight += double(p.scale(c)) * channel.rstd * (sum - channel.rstd * scaled * channel.product);
    gamma += scaled;
    beta += mine[S::ONE];
  }
  // lanes of taps bring their gradient, the three after them bias, norm_weight and norm_bias
  scratch[thread_id()] = lane < k ? weight : lane == k + 1 ? gamma : lane == k + 2 ? beta : 0;
  block_barrier();
  if (thread_id() >= k + 3) return;
  double value = 0;
  for (int w = 0; w < warps; ++w) value += scratch[32 * w + thread_id()];
  grads[c * (k + 3) + thread_id()] = float(0.5 * value);
}

}  // namespace d2v
