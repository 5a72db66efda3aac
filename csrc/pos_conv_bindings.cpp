// Bindings of pos_conv.h. Tensors are allocated by d2v_fast/ops/_pos_conv_extension.py; rows are [rows, C] here.
#include "binding.h"
#include "pos_conv.h"

namespace {

using d2v::Call;
using d2v::ptr;
using d2v::ScalarType;
using d2v::Tensor;
using Maybe = std::optional<Tensor>;

constexpr int64_t kFrames = 256;  // of a tile

void check_rows(const Call& call, const char* name, const Tensor& x, const Tensor& like) {
  call.check(name, x, {like.scalar_type()}, {like.size(0), like.size(1)});
  call.check_aligned(name, x, 16);
}

void check_rows(const Call& call, const char* name, const Maybe& x, const Tensor& like) {
  if (x.has_value()) check_rows(call, name, *x, like);
}

void check_floats(const Call& call, const char* name, const Maybe& x, std::initializer_list<int64_t> shape) {
  if (x.has_value()) call.check(name, *x, {ScalarType::Float}, shape);
}

void check_input(const Call& call, const char* name, const Tensor& x) {
  call.check(name, x, {ScalarType::BFloat16, ScalarType::Half}, {d2v::ANY_SIZE, d2v::ANY_SIZE});
  call.check_aligned(name, x, 16);
}

D2vPosConvShape shape_of(const Call& call, const Tensor& x, const Maybe& tiles, int64_t frames, int64_t groups,
                         int64_t taps) {
  const int64_t rows = x.size(0), channels = x.size(1);
  call.require(groups > 0 && channels % groups == 0, "groups", "must divide the number of channels");
  const int64_t width = channels / groups;
  call.require(width == 32 || width == 48 || width == 64 || width == 80, "groups",
               "must leave 32, 48, 64 or 80 channels each, got " + std::to_string(width));
  call.require(taps > 0, "taps", "must be positive");
  call.require(frames <= INT32_MAX, "frames", "must fit in 32 bits");
  int64_t num_tiles = 0;
  if (tiles.has_value()) {
    call.check("tiles", *tiles, {ScalarType::Long}, {d2v::ANY_SIZE, 3});
    num_tiles = tiles->size(0);
  } else {
    call.require(frames > 0 && rows % frames == 0, "frames", "must divide the number of rows");
    num_tiles = rows / frames * ((frames + kFrames - 1) / kFrames);
  }
  return {rows, num_tiles, frames, groups, width, taps, x.scalar_type() == ScalarType::BFloat16,
          ptr<const int64_t>(tiles)};
}

void check_weight(const Call& call, const Tensor& weight, const Tensor& x, const D2vPosConvShape& shape) {
  call.check("weight", weight, {x.scalar_type()}, {shape.groups, shape.taps, shape.width, shape.width});
  call.check_aligned("weight", weight, 16);
}

void forward(const Tensor& x, const Maybe& sums, const Maybe& stats, const Tensor& weight, const Maybe& bias,
             const Tensor& z, const Maybe& z_sums, const Maybe& tiles, int64_t frames, bool activate, double eps) {
  const Call call("pos_conv_fwd_cuda", x);
  check_input(call, "x", x);
  const D2vPosConvShape shape = shape_of(call, x, tiles, frames, weight.size(0), weight.size(1));
  check_weight(call, weight, x, shape);
  check_rows(call, "z", z, x);
  check_floats(call, "sums", sums, {shape.rows, shape.groups, 2});
  check_floats(call, "stats", stats, {2, shape.rows});
  check_floats(call, "z_sums", z_sums, {shape.rows, shape.groups, 2});
  check_floats(call, "bias", bias, {x.size(1)});
  if (bias.has_value()) call.check_aligned("bias", *bias, 16);
  call.require(sums.has_value() == stats.has_value(), "stats", "must come with sums");
  call.launched(d2v_pos_conv_fwd(x.data_ptr(), ptr<const float>(sums), ptr<float>(stats), weight.data_ptr(),
                                 ptr<const float>(bias), z.data_ptr(), ptr<float>(z_sums), activate, eps, &shape,
                                 call.stream()));
}

void dgrad(const Tensor& grad, const Maybe& z, const Maybe& stats, const Maybe& sums, const Maybe& grad_z,
           const Tensor& weight, const Maybe& below, const Maybe& below_stats, const Tensor& out,
           const Maybe& out_sums, const Maybe& below_y, const Maybe& tiles, int64_t frames) {
  const Call call("pos_conv_dgrad_cuda", grad);
  check_input(call, "grad", grad);
  const D2vPosConvShape shape = shape_of(call, grad, tiles, frames, weight.size(0), weight.size(1));
  check_weight(call, weight, grad, shape);
  check_rows(call, "z", z, grad);
  check_rows(call, "grad_z", grad_z, grad);
  check_rows(call, "below", below, grad);
  check_rows(call, "out", out, grad);
  check_rows(call, "below_y", below_y, grad);
  check_floats(call, "stats", stats, {2, shape.rows});
  check_floats(call, "sums", sums, {shape.rows, shape.groups, 2});
  check_floats(call, "below_stats", below_stats, {2, shape.rows});
  check_floats(call, "out_sums", out_sums, {shape.rows, shape.groups, 2});
  const bool through_norm = sums.has_value();
  call.require(z.has_value() == through_norm && stats.has_value() == through_norm &&
                   grad_z.has_value() == through_norm,
               "sums", "must come with z, stats and grad_z");
  call.require(below.has_value() == below_y.has_value(), "below_y", "must come with below");
  call.require(below_stats.has_value() == out_sums.has_value() && (below.has_value() || !out_sums.has_value()),
               "out_sums", "must come with below and below_stats");
  call.launched(d2v_pos_conv_dgrad(grad.data_ptr(), ptr<void>(z), ptr<const float>(stats), ptr<const float>(sums),
                                   ptr<void>(grad_z), weight.data_ptr(), ptr<void>(below),
                                   ptr<const float>(below_stats), out.data_ptr(), ptr<float>(out_sums),
                                   ptr<void>(below_y), &shape, call.stream()));
}

void wgrad(const Tensor& grad, const Tensor& x, const Tensor& weight_shares, const Maybe& bias_shares,
           const Tensor& grad_weight, const Maybe& grad_bias, const Maybe& tiles, int64_t frames) {
  const Call call("pos_conv_wgrad_cuda", grad);
  check_input(call, "grad", grad);
  const int64_t shares = weight_shares.size(0), channels = grad.size(1);
  const D2vPosConvShape shape = shape_of(call, grad, tiles, frames, weight_shares.size(1), weight_shares.size(2));
  check_rows(call, "x", x, grad);
  call.check("weight_shares", weight_shares, {ScalarType::Float},
             {shares, shape.groups, shape.taps, shape.width, shape.width});
  call.check("grad_weight", grad_weight, {ScalarType::Float}, {channels, shape.width, shape.taps});
  check_floats(call, "bias_shares", bias_shares, {shares, channels});
  check_floats(call, "grad_bias", grad_bias, {channels});
  call.require(bias_shares.has_value() == grad_bias.has_value(), "grad_bias", "must come with bias_shares");
  call.launched(d2v_pos_conv_wgrad(grad.data_ptr(), x.data_ptr(), ptr<float>(weight_shares), ptr<float>(bias_shares),
                                   ptr<float>(grad_weight), ptr<float>(grad_bias), shares, &shape, call.stream()));
}

int64_t shared_bytes(int64_t width, int64_t taps) {
  return static_cast<int64_t>(d2v_pos_conv_shared_bytes(width, taps));
}

}  // namespace

D2V_SCHEMAS(m) {
  m.def(
      "pos_conv_fwd_cuda(Tensor x, Tensor? sums, Tensor(a!)? stats, Tensor weight, Tensor? bias, Tensor(b!) z, "
      "Tensor(c!)? z_sums, Tensor? tiles, int frames, bool activate, float eps) -> ()");
  m.def(
      "pos_conv_dgrad_cuda(Tensor grad, Tensor? z, Tensor? stats, Tensor? sums, Tensor(a!)? grad_z, Tensor weight, "
      "Tensor? below, Tensor? below_stats, Tensor(b!) out, Tensor(c!)? out_sums, Tensor(d!)? below_y, Tensor? tiles, "
      "int frames) -> ()");
  m.def(
      "pos_conv_wgrad_cuda(Tensor grad, Tensor x, Tensor(a!) weight_shares, Tensor(b!)? bias_shares, "
      "Tensor(c!) grad_weight, Tensor(d!)? grad_bias, Tensor? tiles, int frames) -> ()");
  m.def("pos_conv_shared_bytes(int width, int taps) -> int");
}

D2V_KERNELS(m) {
  m.impl("pos_conv_fwd_cuda", TORCH_BOX(&forward));
  m.impl("pos_conv_dgrad_cuda", TORCH_BOX(&dgrad));
  m.impl("pos_conv_wgrad_cuda", TORCH_BOX(&wgrad));
}

D2V_KERNELS_ANYWHERE(m) { m.impl("pos_conv_shared_bytes", TORCH_BOX(&shared_bytes)); }
