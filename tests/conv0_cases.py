"""Inputs of the first convolution, its blocks in plain PyTorch, and the comparison of both in float64."""

import torch
import torch.nn.functional as F
from checks import DEVICE, assert_as_accurate_as_eager

from d2v_fast.ops import conv0_norm_gelu

F32, F64 = torch.float32, torch.float64


def make_inputs(B, T, C, k, stride, bias=True, affine=True, offset=0.3):
    """Waveforms for T frames and a few samples more, and parameters; values that bfloat16 does not hold."""
    x = torch.randn(B, (T - 1) * stride + k + stride // 2 + 8)[:, : (T - 1) * stride + k + stride // 2] + offset
    weight = torch.randn(C, 1, k) / k**0.5
    vectors = (torch.randn(C), 1 + 0.3 * torch.randn(C), 0.3 * torch.randn(C))
    wanted = (bias, affine, affine)
    return [v.to(DEVICE) for v in (x, weight)] + [
        v.to(DEVICE) if want else None for v, want in zip(vectors, wanted, strict=True)
    ]


def value_and_grads(function, upstream, x, *parameters):
    """The value, and the gradients of the parameters that are there, None for one without influence."""
    inputs = [None if v is None else v.detach().requires_grad_() for v in parameters]
    y = function(x, *inputs)
    there = [v for v in inputs if v is not None]
    return [y.detach(), *torch.autograd.grad(y, there, upstream.to(y), allow_unused=True)]


def cast(dtype, tensors):
    return [None if v is None else v.to(dtype) for v in tensors]


def eager(stride, norm, segments=None, eps=1e-5):
    """Separate operators of PyTorch, as fairseq has them."""

    def function(x, weight, bias, gamma, beta):
        z = F.conv1d(x[:, None], weight, bias, stride)
        if norm == "layer":
            return F.gelu(F.layer_norm(z.mT, z.shape[1:2], gamma, beta, eps))
        if segments is None:
            return F.gelu(F.group_norm(z, z.shape[1], gamma, beta, eps)).mT
        rows = z.mT.flatten(0, 1)
        y = torch.zeros_like(rows)
        for first, count in segments.tolist():
            if count:
                part = rows[first : first + count].mT[None]
                wide = part.double()  # PyTorch's group norm takes its statistics in float32 at least, too
                rstd = (wide.var(2, keepdim=True, correction=0) + eps).rsqrt()
                part = ((wide - wide.mean(2, True)) * rstd).to(part.dtype)
                part = part if gamma is None else part * gamma[:, None] + beta[:, None]
                y = y.slice_scatter(F.gelu(part)[0].mT, 0, first, first + count)
        return y.view(z.shape[0], z.shape[2], -1)

    return function


def ours(stride, norm, dtype, segments=None, eps=1e-5):
    return lambda *tensors: conv0_norm_gelu(*tensors, stride=stride, norm=norm, eps=eps, segments=segments, dtype=dtype)


def check_against_fp64(tensors, stride, norm, dtype=F32, segments=None, floor=2e-6, eps=1e-5):
    """Value and gradients against float64; the error may be twice that of PyTorch's operators in ``dtype``."""
    x, weight, bias, *_ = tensors
    T = (x.shape[1] - weight.shape[2]) // stride + 1
    upstream = torch.randn(x.shape[0], T, weight.shape[0]).to(DEVICE, dtype)
    got = value_and_grads(ours(stride, norm, dtype, segments, eps), upstream, *tensors)
    low = value_and_grads(eager(stride, norm, segments, eps), upstream, *cast(dtype, tensors))
    exact = value_and_grads(eager(stride, norm, segments, eps), upstream, *cast(F64, tensors))
    assert got[0].dtype == dtype and got[0].is_contiguous()
    for i, (g, e, w) in enumerate(zip(got, low, exact, strict=True)):
        if norm == "group" and bias is not None and i == 2:
            assert torch.count_nonzero(g) == 0  # of the bias, which group norm takes away: exactly
        else:
            assert_as_accurate_as_eager(g, e, w, floor=floor)
