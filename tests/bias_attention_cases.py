"""Inputs of bias_attention, attention in plain PyTorch, and the comparison of both in float64."""

import math

import torch
from checks import DEVICE, assert_as_accurate_as_eager

from d2v_fast.ops import bias_attention

F32 = torch.float32

KINDS = ("bias", "slopes", "plain")


def make_inputs(B, T, H, D, kind="bias", dtype=F32, Tk=None, extra_dtype=F32):
    """Tensors that get a gradient, q, k, v first, and what goes with them; q, k, v are slices of one if they can be."""
    if Tk is None:
        q, k, v = torch.randn(B, T, 3, H, D).to(DEVICE, dtype).unbind(2)
    else:
        q, (k, v) = torch.randn(B, T, H, D).to(DEVICE, dtype), torch.randn(2, B, Tk, H, D).to(DEVICE, dtype)
    keys = T if Tk is None else Tk
    tensors, options = {"q": q, "k": k, "v": v}, {}
    if kind == "bias":
        tensors["bias"] = torch.randn(H, T, keys).to(DEVICE, extra_dtype)
    if kind == "slopes":
        tensors["slopes"] = (0.1 * torch.rand(H)).to(DEVICE, extra_dtype)
        options["positions"] = torch.rand(B, 2 * keys).argsort(1)[:, :keys].int().to(DEVICE)
        if Tk is not None:
            options["query_positions"] = torch.randint(2 * keys + 1, (B, T)).to(DEVICE)
    return tensors, options


def eager(
    q, k, v, bias=None, slopes=None, *, positions=None, query_positions=None, lengths=None, factor=None, scale=None
):
    """Independent of the op's reference: BEiT's attention with the given dropout ``factor``, in the inputs' dtype."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    logits = torch.einsum("bihd,bjhd->bhij", q * scale, k)
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    if slopes is not None:
        queries = positions if query_positions is None else query_positions
        distances = (queries[:, :, None] - positions[:, None, :]).abs()[:, None].to(logits.dtype)
        logits = logits - slopes.to(logits.dtype)[:, None, None] * distances
    if lengths is not None:
        outside = torch.arange(k.shape[1], device=k.device) >= lengths[:, None]
        logits = logits.masked_fill(outside[:, None, None], -math.inf)
    weights = logits.softmax(-1)
    weights = weights.masked_fill((logits == -math.inf).all(-1, keepdim=True), 0.0)
    if factor is not None:
        weights = weights * factor.to(weights.dtype)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def values_and_grads(function, upstream, tensors, **options):
    inputs = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    out = function(**inputs, **options)
    grads = torch.autograd.grad(out, list(inputs.values()), upstream.to(out.dtype))
    return {"o": out.detach(), **dict(zip(inputs, grads, strict=True))}


def dropout_factor(B, H, Tq, Tk, p, seed):
    """0 or 1 / (1 - p) [B, H, Tq, Tk]: the weights of equal logits, which values of one-hot rows show."""
    parts = []
    for first in range(0, Tk, 128):
        torch.manual_seed(seed)  # every call draws the same mask
        width = min(128, Tk - first)
        v = torch.eye(Tk, device=DEVICE)[:, None, first : first + width].expand(B, Tk, H, width)
        zeros = torch.zeros(B, Tk, H, width, device=DEVICE)
        parts.append(bias_attention(zeros[:, :1].expand(B, Tq, H, width), zeros, v, p=p))
    return Tk * torch.cat(parts, -1).transpose(1, 2)


def check_against_fp64(tensors, options, p=0.0, floor=1e-6):
    q, k = tensors["q"], tensors["k"]
    upstream = torch.randn(q.shape).to(DEVICE, q.dtype)
    factor = dropout_factor(q.shape[0], q.shape[2], q.shape[1], k.shape[1], p, seed=7) if p > 0 else None
    torch.manual_seed(7)
    got = values_and_grads(bias_attention, upstream, tensors, p=p, **options)
    low = values_and_grads(eager, upstream, tensors, factor=factor, **options)
    exact = {name: x.double() for name, x in tensors.items()}
    exact = values_and_grads(eager, upstream, exact, factor=factor, **options)
    for name, want in exact.items():
        like = tensors.get(name, q)
        assert got[name].dtype == like.dtype, name
        if want.abs().max() < 1e-12:  # of a single key: the weight is 1, and moves with nothing
            assert got[name].abs().max() < 2e-6, name
            continue
        assert_as_accurate_as_eager(got[name], low[name], want, floor=floor)
