// Bindings of conv0.h. Tensors are allocated by d2v_fast/ops/_conv0_extension.py.
#include "binding.h"
#include "conv0.h"

namespace {

using d2v::Call;
using d2v::ANY_SIZE;
using d2v::ptr;
using d2v::ScalarType;
using d2v::Tensor;
using Maybe = std::optional<Tensor>;

struct Sizes {
  int64_t taps, width, columns, factor;
  explicit Sizes(int64_t k) : taps(k == 10 ? 10 : 16), width(taps == 10 ? 16 : 32), columns(taps == 10 ? 16 : 24),
                              factor(taps == 10 ? 24 : 60) {}
};

// Arguments that forward and backward share, checked.
struct Problem {
  D2vConv0 launch;
  D2vConv0Fold fold;
  Sizes sizes;
  int64_t frames;
};

Problem problem_of(const Call& call, const Tensor& waveforms, const Tensor& weight, const Maybe& bias,
                   const Maybe& gamma, const Maybe& beta, const Maybe& segments, const Maybe& segment_table,
                   int64_t stride, double eps, bool layer, int64_t programs, const Tensor& y, const Tensor& folded,
                   const Tensor& table, const Tensor& scratch) {
  call.check_rows("waveforms", waveforms, {ScalarType::Float}, {ANY_SIZE, ANY_SIZE});
  call.check("weight", weight, {ScalarType::Float}, {ANY_SIZE, ANY_SIZE});
  const int64_t C = weight.size(0), k = weight.size(1), rows = waveforms.size(0), samples = waveforms.size(1);
  call.require(C > 0 && C % 64 == 0, "weight", "must have a multiple of 64 channels, got " + std::to_string(C));
  call.require(k >= 1 && k <= 16, "weight", "must have 1 to 16 taps, got " + std::to_string(k));
  call.require(rows > 0 && samples >= k, "waveforms", "must have rows of at least as many samples as there are taps");
  call.require(stride > 0, "stride", "must be positive");
  call.require(programs > 0, "programs", "must be positive");
  for (const auto& [name, v] : {std::pair{"bias", &bias}, {"norm_weight", &gamma}, {"norm_bias", &beta}}) {
    if (v->has_value()) call.check(name, **v, {ScalarType::Float}, {C});
  }
  const int64_t frames = (samples - k) / stride + 1;
  call.require(frames <= INT32_MAX, "waveforms", "must give fewer than 2**31 frames a row");
  call.check("y", y, {ScalarType::BFloat16, ScalarType::Half}, {rows, frames, C});
  call.check_aligned("y", y, 16);

  call.require(!segments.has_value() || !layer, "segments", "are for group norm");
  const int64_t count = segments.has_value() ? segments->size(0) : rows;
  call.require(segments.has_value() == segment_table.has_value(), "segment_table", "must come with segments");
  if (segments.has_value()) {
    call.check("segments", *segments, {ScalarType::Long}, {count, 2});
    call.check("segment_table", *segment_table, {ScalarType::Long}, {count + 1, 4});
  }
  call.require(count > 0, "segments", "must have rows");
  const Sizes sizes(k);
  call.check("folded", folded, {ScalarType::BFloat16}, {layer ? 1 : count, 2, C, sizes.width});
  if (layer) {
    call.check("table", table, {ScalarType::Float}, {4, sizes.factor});
    call.check("scratch", scratch, {ScalarType::Double}, {sizes.taps + 1});
  } else {
    call.check("table", table, {ScalarType::Float}, {count, sizes.taps});
    call.check("scratch", scratch, {ScalarType::Double}, {count, ANY_SIZE, (k + 1) * (k + 2) / 2});
  }
  const int64_t bf16 = y.scalar_type() == ScalarType::BFloat16;
  const int64_t row_stride = rows > 1 ? waveforms.stride(0) : samples;
  return {{ptr<const float>(waveforms), row_stride, rows, frames, stride, ptr<const int64_t>(segments),
           ptr<int64_t>(segment_table), count, ptr<const float>(weight), ptr<const float>(bias),
           ptr<const float>(gamma), ptr<const float>(beta), C, k, eps, layer, bf16, programs},
          {folded.data_ptr(), ptr<float>(table), ptr<double>(scratch), layer ? 1 : scratch.size(1)},
          sizes,
          rows * frames};
}

void check_stats(const Call& call, const Tensor& stats, const Problem& p) {
  const int64_t k = p.launch.taps;
  if (p.launch.layer) call.check("stats", stats, {ScalarType::Float}, {p.frames});
  else call.check("stats", stats, {ScalarType::Double}, {p.launch.num_segments, k + k * k});
}

void forward(const Tensor& waveforms, const Tensor& weight, const Maybe& bias, const Maybe& gamma, const Maybe& beta,
             const Maybe& segments, const Maybe& segment_table, int64_t stride, double eps, bool layer,
             int64_t programs, const Tensor& y, const Tensor& stats, const Tensor& folded, const Tensor& table,
             const Tensor& scratch) {
  const Call call("conv0_fwd_cuda", waveforms);
  const Problem p = problem_of(call, waveforms, weight, bias, gamma, beta, segments, segment_table, stride, eps, layer,
                               programs, y, folded, table, scratch);
  check_stats(call, stats, p);
  call.launched(d2v_conv0_fwd(&p.launch, &p.fold, y.data_ptr(), stats.data_ptr(), call.stream()));
}

void backward(const Tensor& grad, const Tensor& stats, const Tensor& waveforms, const Tensor& weight,
              const Maybe& bias, const Maybe& gamma, const Maybe& beta, const Maybe& segments,
              const Maybe& segment_table, int64_t stride, double eps, bool layer, int64_t programs,
              const Tensor& grads, const Tensor& folded, const Tensor& table, const Tensor& scratch,
              const Tensor& outer, const Tensor& outer_sum, const Tensor& inner, const Tensor& inner_sum) {
  const Call call("conv0_bwd_cuda", waveforms);
  const Problem p = problem_of(call, waveforms, weight, bias, gamma, beta, segments, segment_table, stride, eps, layer,
                               programs, grad, folded, table, scratch);
  check_stats(call, stats, p);
  const int64_t C = p.launch.C, count = layer ? 1 : p.launch.num_segments;
  const int64_t inner_programs = layer ? programs : 0;
  call.check("grads", grads, {ScalarType::Float}, {C, p.launch.taps + 3});
  call.check("outer", outer, {ScalarType::Float}, {programs + count - 1, C, p.sizes.columns});
  call.check("outer_sum", outer_sum, {ScalarType::Float}, {count, C, p.sizes.columns});
  call.check("inner", inner, {ScalarType::Float}, {inner_programs, C / 64, p.sizes.width, p.sizes.columns});
  call.check("inner_sum", inner_sum, {ScalarType::Float}, {p.sizes.width, p.sizes.columns});
  const D2vConv0Sums sums{ptr<float>(outer), ptr<float>(outer_sum), ptr<float>(inner), ptr<float>(inner_sum)};
  call.launched(d2v_conv0_bwd(&p.launch, &p.fold, &sums, grad.data_ptr(), stats.data_ptr(), ptr<float>(grads),
                              call.stream()));
}

}  // namespace

D2V_SCHEMAS(m) {
  m.def(
      "conv0_fwd_cuda(Tensor waveforms, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, Tensor? "
      "segments, Tensor(a!)? segment_table, int stride, float eps, bool layer, int programs, Tensor(b!) y, "
      "Tensor(c!) stats, Tensor(d!) folded, Tensor(e!) table, Tensor(f!) scratch) -> ()");
  m.def(
      "conv0_bwd_cuda(Tensor grad, Tensor stats, Tensor waveforms, Tensor weight, Tensor? bias, Tensor? norm_weight, "
      "Tensor? norm_bias, Tensor? segments, Tensor(a!)? segment_table, int stride, float eps, bool layer, "
      "int programs, Tensor(b!) grads, Tensor(c!) folded, Tensor(d!) table, Tensor(e!) scratch, Tensor(f!) outer, "
      "Tensor(g!) outer_sum, Tensor(h!) inner, Tensor(i!) inner_sum) -> ()");
}

D2V_KERNELS(m) {
  m.impl("conv0_fwd_cuda", TORCH_BOX(&forward));
  m.impl("conv0_bwd_cuda", TORCH_BOX(&backward));
}
