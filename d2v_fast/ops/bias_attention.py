"""Attention with an additive bias that all samples share, or with ALiBi from position ids, and dropout of its weights.

    logits = scale * q k^T + bias                                learned relative positions (BEiT ``Attention``)
    logits = scale * q k^T - slope * |position_q - position_k|   ALiBi of tokens that are left over (data2vec 2.0)
    o = dropout(softmax(logits)) v

Nothing of the size [B, H, Tq, Tk] is kept or made on a GPU: forward saves its result and one number a query, backward
works out the weights again, and the gradient of the bias is added up over samples before it reaches memory. In the
order of a fixed number of partial sums, so that it is the same every time.

The dropout mask is never stored: it is a function of a seed that lives in a device tensor, and backward draws it again,
as in residual_dropout_layer_norm. The CPU runs PyTorch's own operators, ``dropout`` among them.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from d2v_fast.ops import _rows
from d2v_fast.ops._dispatch import check_device, check_float, check_index, cpu_runs_triton

MAX_HEAD_DIM = 128


def _logits(
    q: Tensor,  # [B, Tq, H, D]
    k: Tensor,  # [B, Tk, H, D]
    bias: Tensor | None,
    slopes: Tensor | None,
    pos_q: Tensor | None,
    pos_k: Tensor | None,
    outside: Tensor | None,  # [B, Tk] bool
    scale: float,
) -> Tensor:
    """[B, H, Tq, Tk], -inf at keys outside."""
    s = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * scale
    if bias is not None:
        s = s + bias
    if slopes is not None:
        s = s - slopes.view(-1, 1, 1) * _distances(pos_q, pos_k).to(s.dtype)
    return s if outside is None else s.masked_fill(outside[:, None, None], -math.inf)


def _outside(lengths: Tensor | None, *keys: Tensor) -> tuple[Tensor | None, ...]:
    """Which keys lie beyond ``lengths`` [B, Tk], and the tensors ``keys`` [B, Tk, H, D] with 0 there.

    Nothing that is stored there is to reach a result, not even as a product with 0.
    """
    if lengths is None:
        return None, *keys
    outside = torch.arange(keys[0].shape[1], device=lengths.device) >= lengths[:, None]
    return outside, *(x.masked_fill(outside[..., None, None], 0.0) for x in keys)


def _distances(pos_q: Tensor, pos_k: Tensor) -> Tensor:
    return (pos_q[:, None, :, None] - pos_k[:, None, None, :]).abs()  # [B, 1, Tq, Tk]


def bias_attention_ref(
    q: Tensor,  # [B, Tq, H, D]
    k: Tensor,  # [B, Tk, H, D]
    v: Tensor,  # [B, Tk, H, D]
    bias: Tensor | None = None,  # [H, Tq, Tk]
    slopes: Tensor | None = None,  # [H]
    pos_q: Tensor | None = None,  # [B, Tq]
    pos_k: Tensor | None = None,  # [B, Tk]
    lengths: Tensor | None = None,  # [B]
    p: float = 0.0,
    scale: float = 1.0,
    factor: Tensor | None = None,  # [B, H, Tq, Tk] of the dropout, if it is drawn already
) -> tuple[Tensor, Tensor]:
    """Result [B, Tq, H, D] and log2 of the sums of exp2 [B, H, Tq]: the op in plain PyTorch, differentiable."""
    acc = _rows.accumulation(q, bias, slopes)
    wide_q, wide_k, wide_v, b, m = _rows.cast(acc, q, k, v, bias, slopes)
    outside, wide_k, wide_v = _outside(lengths, wide_k, wide_v)
    s = _logits(wide_q, wide_k, b, m, pos_q, pos_k, outside, scale)
    dead = (s == -math.inf).all(-1, keepdim=True)  # a query without keys: its result is 0, and has no gradient
    s = s.masked_fill(dead, 0.0)
    weights = s.softmax(-1).masked_fill(dead, 0.0)
    lse = s.detach().logsumexp(-1).masked_fill(dead[..., 0], 0.0) / math.log(2)
    if factor is not None:
        weights = weights * factor
    elif p > 0:
        weights = F.dropout(weights, p)
    return (weights @ wide_v.transpose(1, 2)).transpose(1, 2).to(q.dtype), lse


def bias_attention_grad_ref(
    grad: Tensor,  # [B, Tq, H, D]
    out: Tensor,  # [B, Tq, H, D]
    lse: Tensor,  # [B, H, Tq]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    slopes: Tensor | None,
    pos_q: Tensor | None,
    pos_k: Tensor | None,
    lengths: Tensor | None,
    scale: float,
    factor: Tensor | None,  # [B, H, Tq, Tk] of the dropout
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, bias and slopes, each in its dtype; the last two empty where there are none."""
    g, o, wide_q, wide_k, wide_v, b, m = _rows.cast(lse.dtype, grad, out, q, k, v, bias, slopes)
    outside, wide_k, wide_v = _outside(lengths, wide_k, wide_v)
    s = _logits(wide_q, wide_k, b, m, pos_q, pos_k, outside, scale)
    weights = (s * math.log(2) ** -1 - lse[..., None]).exp2()
    g_heads = g.transpose(1, 2)  # [B, H, Tq, D]
    grad_weights = g_heads @ wide_v.permute(0, 2, 3, 1)
    kept = weights
    if factor is not None:
        kept, grad_weights = weights * factor, grad_weights * factor
    grad_s = weights * (grad_weights - (g * o).sum(-1).transpose(1, 2)[..., None])
    if outside is not None:  # also where a row is NaN
        kept, grad_s = (x.masked_fill(outside[:, None, None], 0.0) for x in (kept, grad_s))
    heads = (
        grad_s @ wide_k.transpose(1, 2) * scale,
        grad_s.mT @ wide_q.transpose(1, 2) * scale,
        kept.mT @ g_heads,
    )
    grad_slopes = lse.new_empty(0) if slopes is None else -(grad_s * _distances(pos_q, pos_k)).sum((0, 2, 3))
    return (
        *(x.transpose(1, 2).to(like.dtype) for x, like in zip(heads, (q, k, v), strict=True)),
        grad_s.sum(0).to(bias.dtype) if wants_bias else (q if bias is None else bias).new_empty(0),
        grad_slopes if slopes is None else grad_slopes.to(slopes.dtype),
    )


def _dropout_factor(q: Tensor, k: Tensor, seed: Tensor | None, p: float, dtype: torch.dtype) -> Tensor | None:
    """0 or 1 / (1 - p) for every weight: on the CPU a generator stands in for the kernels' Philox."""
    if seed is None:
        return None
    generator = torch.Generator().manual_seed(seed.item())
    shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    return torch.empty(shape, dtype=dtype).bernoulli_(1 - p, generator=generator).div_(1 - p)


@torch.library.custom_op("d2v_fast::bias_attention_fwd", mutates_args=(), device_types="cpu")
def _fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    slopes: Tensor | None,
    pos_q: Tensor | None,
    pos_k: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    p: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    acc = _rows.accumulation(q, bias, slopes)
    if cpu_runs_triton(acc):
        return _fwd_triton(q, k, v, bias, slopes, pos_q, pos_k, lengths, seed, p, scale)
    factor = _dropout_factor(q, k, seed, p, acc)
    out, lse = bias_attention_ref(q, k, v, bias, slopes, pos_q, pos_k, lengths, 0.0, scale, factor)
    return out.contiguous(), lse


@_fwd.register_kernel("cuda")
def _fwd_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    slopes: Tensor | None,
    pos_q: Tensor | None,
    pos_k: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    p: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    from d2v_fast.kernels import bias_attention as kernels

    extras = kernels.Extras.make(bias, slopes, pos_q, pos_k, lengths, seed, p, scale)
    return kernels.bias_attention_fwd(*map(_heads, (q, k, v)), extras)


@torch.library.custom_op("d2v_fast::bias_attention_bwd", mutates_args=(), device_types="cpu")
def _bwd(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    slopes: Tensor | None,
    pos_q: Tensor | None,
    pos_k: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    p: float,
    scale: float,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if cpu_runs_triton(lse.dtype):
        return _bwd_triton(
            grad, out, lse, q, k, v, bias, slopes, pos_q, pos_k, lengths, seed, p, scale, wants_bias
        )  # fmt: skip
    factor = _dropout_factor(q, k, seed, p, lse.dtype)
    grads = bias_attention_grad_ref(
        grad, out, lse, q, k, v, bias, slopes, pos_q, pos_k, lengths, scale, factor, wants_bias
    )
    return tuple(x.contiguous() for x in grads)


@_bwd.register_kernel("cuda")
def _bwd_triton(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    slopes: Tensor | None,
    pos_q: Tensor | None,
    pos_k: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    p: float,
    scale: float,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from d2v_fast.kernels import bias_attention as kernels
    from d2v_fast.kernels import bias_attention_grad

    extras = kernels.Extras.make(bias, slopes, pos_q, pos_k, lengths, seed, p, scale)
    *grads, grad_bias, grad_slopes = bias_attention_grad.bias_attention_bwd(
        _heads(grad), out, lse, *map(_heads, (q, k, v)), extras, wants_bias
    )
    return (
        *grads,
        grad_bias.to((q if bias is None else bias).dtype),
        grad_slopes if slopes is None else grad_slopes.to(slopes.dtype),
    )


def _heads(x: Tensor) -> Tensor:
    """x [B, T, H, D] as the kernels read it: unit stride in D, and 32 bits for offsets within a tile of 128 rows."""
    return x if x.stride(3) == 1 and x.stride(1) < 2**24 else x.contiguous()


@_fwd.register_fake
def _(q, k, v, bias, slopes, pos_q, pos_k, lengths, seed, p, scale):
    B, Tq, H, _ = q.shape
    return _rows.empty_like_rows(q), q.new_empty((B, H, Tq), dtype=_rows.accumulation(q, bias, slopes))


@_bwd.register_fake
def _(grad, out, lse, q, k, v, bias, slopes, pos_q, pos_k, lengths, seed, p, scale, wants_bias):
    return (
        *map(_rows.empty_like_rows, (q, k, v)),
        _rows.empty_like_rows(bias) if wants_bias else (q if bias is None else bias).new_empty(0),
        lse.new_empty(0) if slopes is None else _rows.empty_like_rows(slopes),
    )


def _setup_context(ctx, inputs, output):
    *tensors, ctx.p, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.wants_bias = ctx.needs_input_grad[3]
    ctx.save_for_backward(out, lse, *tensors)


def _backward(ctx, grad, _):
    out, lse, *tensors = ctx.saved_tensors
    if grad is None:
        return (None,) * 11
    grad_q, grad_k, grad_v, grad_bias, grad_slopes = _bwd(
        grad, out, lse, *tensors, ctx.p, ctx.scale, ctx.wants_bias
    )  # fmt: skip
    return (
        grad_q,
        grad_k,
        grad_v,
        grad_bias if ctx.wants_bias else None,
        None if tensors[4] is None else grad_slopes,
        *(None,) * 6,
    )


_fwd.register_autograd(_backward, setup_context=_setup_context)


def bias_attention(
    q: Tensor,  # [B, Tq, H, D]
    k: Tensor,  # [B, Tk, H, D]
    v: Tensor,  # [B, Tk, H, D]
    bias: Tensor | None = None,  # [H, Tq, Tk]
    *,
    slopes: Tensor | None = None,  # [H]
    positions: Tensor | None = None,  # [B, Tk]
    query_positions: Tensor | None = None,  # [B, Tq]
    lengths: Tensor | None = None,  # [B]
    p: float = 0.0,
    training: bool = True,
    scale: float | None = None,
) -> Tensor:
    """``dropout(softmax(scale * q k^T + bias)) v`` or, with ``slopes``, ALiBi in place of the bias; both optional.

    Args:
        q: [B, Tq, H, D] queries; float32, bfloat16 or float16 (float64 on CPU), D from 1 to 128. They may lie anywhere:
            slices of a fused [B, T, 3, H, D] are not copied, only what has no unit stride in D is.
        k: [B, Tk, H, D] keys, of q's dtype.
        v: [B, Tk, H, D] values, of q's dtype.
        bias: [H, Tq, Tk] added to the logits of every sample; any of these dtypes. It may hold -inf. Rows that are a
            view of longer ones, of a multiple of 16 elements, are read in place, others copied, which is cheap.
        slopes: [H] of ALiBi, with the learned scales of the heads already in them; any of these dtypes.
        positions: [B, Tk] int32 or int64 positions of keys and queries, which ``slopes`` need; below 2^24.
        query_positions: [B, Tq] those of the queries, if they are others.
        lengths: [B] int32 or int64: sample b has the keys before ``lengths[b]`` only. None: all.
        p: probability of dropping a weight, in [0, 1); those that stay are divided by ``1 - p``. The kernels round it
            to 16 bits.
        training: False switches dropout off.
        scale: factor on q k^T; None: 1 / sqrt(D).

    Returns:
        o [B, Tq, H, D] in q's dtype, contiguous. Gradients reach q, k, v, bias and slopes; products are of q's dtype,
        logits, softmax and sums float32. Deterministic, with dropout given ``torch.manual_seed``. A query without keys,
        by ``lengths`` or -inf throughout, gets 0 and gives no gradient; NaN reaches the queries that see it.

    Raises:
        ValueError: D is 0 or above 128, shapes or devices do not fit, both a bias and slopes, slopes without positions
            or the reverse, or ``p`` outside [0, 1).
        TypeError: an input is no floating point tensor, dtypes of q, k and v differ, float64 on a GPU, positions or
            lengths that are no integers; ``p`` or ``scale`` is no number.
    """
    _check_heads(q, k, v)
    B, Tq, H, D = q.shape
    if bias is not None:
        if slopes is not None:
            raise ValueError("bias and slopes must not be given both")
        _check_shape("bias", bias, (H, Tq, k.shape[1]), q.device)
    pos_q, pos_k = _check_alibi(q, k, slopes, positions, query_positions)
    if lengths is not None:
        _check_integers("lengths", lengths, (B,), q.device)
    _rows.check_number("p", p)
    if not 0 <= p < 1:
        raise ValueError(f"p must lie in [0, 1), got {p}")
    if scale is not None:
        _rows.check_number("scale", scale)
    scale = D**-0.5 if scale is None else float(scale)
    p = float(p) if training else 0.0
    if _rows.runs_reference(q, _rows.accumulation(q, bias, slopes)):
        return bias_attention_ref(q, k, v, bias, slopes, pos_q, pos_k, lengths, p, scale)[0].contiguous()
    seed = torch.randint(2**63 - 1, (), device=q.device) if p > 0 else None
    return _fwd(q, k, v, bias, slopes, pos_q, pos_k, lengths, seed, p, scale)[0]


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        _rows.check_tensor(name, x)
        check_float(name, x)
        if x.dim() != 4 or not 1 <= x.shape[3] <= MAX_HEAD_DIM:
            raise ValueError(f"{name} must be [B, T, H, D] with D from 1 to {MAX_HEAD_DIM}, got shape {tuple(x.shape)}")
        check_device(name, x, q.device)
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must be {q.dtype} like q, got {x.dtype}")
    B, _, H, D = q.shape
    for name, x in (("k", k), ("v", v)):
        want = (B, k.shape[1], H, D)
        if x.shape != want:
            raise ValueError(f"{name} must have shape {want}, got {tuple(x.shape)}")


def _check_shape(name: str, x: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    _rows.check_tensor(name, x)
    check_float(name, x)
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
    check_device(name, x, device)


def _check_integers(name: str, x: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    _rows.check_tensor(name, x)
    check_index(name, x, device)
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")


def _check_alibi(
    q: Tensor, k: Tensor, slopes: Tensor | None, positions: Tensor | None, query_positions: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Positions of queries and of keys, None without slopes."""
    if slopes is None:
        if positions is not None or query_positions is not None:
            raise ValueError("positions must not be given without slopes")
        return None, None
    _check_shape("slopes", slopes, (q.shape[2],), q.device)
    if positions is None:
        raise ValueError("positions must be given with slopes")
    _check_integers("positions", positions, (k.shape[0], k.shape[1]), q.device)
    if query_positions is None:
        if q.shape[1] != k.shape[1]:
            raise ValueError(f"query_positions must be given for {q.shape[1]} queries and {k.shape[1]} keys")
        return positions, positions
    _check_integers("query_positions", query_positions, (q.shape[0], q.shape[1]), q.device)
    return query_positions, positions
