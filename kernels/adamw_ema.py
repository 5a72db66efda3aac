"""Triton kernels of AdamW and of what follows from it: parameters, moments, teacher and low-precision copies.

A small program turns the step counts into coefficients, in float64, and counts the step. Then one launch reads and
writes everything once: 38 bytes per parameter with a bfloat16 gradient, a teacher and one low-precision copy each.
"""

import math
import struct
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2v_fast.kernels import chunks, launch
from d2v_fast.kernels.chunks import LaunchConfig
from d2v_fast.kernels.ema import lerp

_STEPS_BLOCK = 256


class Tensors(NamedTuple):
    """One entry per parameter, dense, of the same shape and strides, on one device; empty where there is none."""

    params: Sequence[Tensor]  # fp32
    grads: Sequence[Tensor]  # fp32, bf16 or fp16
    exp_avgs: Sequence[Tensor]  # fp32
    exp_avg_sqs: Sequence[Tensor]  # fp32
    ema: Sequence[Tensor | None] = ()  # fp32
    param_copies: Sequence[Tensor] = ()  # fp32, bf16 or fp16
    ema_copies: Sequence[Tensor | None] = ()  # fp32, bf16 or fp16, where there is an ema


class Hyper(NamedTuple):
    """The numbers of an update. Tensors are [] fp32 or fp64 on the device and go before a number of the same name."""

    lr: float
    ema_decay: float
    beta1: float
    beta2: float
    eps: float
    fairseq_eps: bool
    lr_tensor: Tensor | None = None
    ema_decay_tensor: Tensor | None = None
    grad_scale: Tensor | None = None
    skip: Tensor | None = None


@triton.jit(do_not_specialize=["num_steps"])
def _coefficients_kernel(
    steps_ptr,  # [num_steps] addresses of [] fp32; each is counted up unless the update is skipped
    out_ptr,  # [3 + 2 num_steps] fp32: lr, weight of the EMA, 0 to skip or 1; step sizes; divisors of sqrt(v)
    num_steps,
    lr_ptr,  # [], not read without HAS_LR; decay and skip likewise
    decay_ptr,
    skip_ptr,
    lr,
    ema_weight,
    log_beta1,
    log_beta2,
    HAS_LR: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    FAIRSEQ_EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if HAS_LR:
        lr = tl.load(lr_ptr).to(tl.float32)
    if HAS_DECAY:
        ema_weight = (1.0 - tl.load(decay_ptr)).to(tl.float32)
    counts = 1.0
    if HAS_SKIP:
        counts = tl.where(tl.load(skip_ptr) == 0.0, 1.0, 0.0)
    tl.store(out_ptr, lr)
    tl.store(out_ptr + 1, ema_weight)
    tl.store(out_ptr + 2, counts)
    for first in range(0, num_steps, BLOCK):
        i = first + tl.arange(0, BLOCK)
        inside = i < num_steps
        step_ptr = tl.load(steps_ptr + i, mask=inside, other=0).to(tl.pointer_type(tl.float32))
        step = tl.load(step_ptr, mask=inside, other=0.0) + counts
        t = tl.maximum(step, 1.0).to(tl.float64)
        correction1 = 1.0 - tl.exp(t * log_beta1)
        correction2 = tl.sqrt(1.0 - tl.exp(t * log_beta2))
        step_size = lr / correction1
        divisor = correction2
        if FAIRSEQ_EPS:
            step_size = step_size * correction2
            divisor = tl.zeros_like(correction2) + 1.0
        tl.store(out_ptr + 3 + i, step_size.to(tl.float32), mask=inside)
        tl.store(out_ptr + 3 + num_steps + i, divisor.to(tl.float32), mask=inside)
        tl.store(step_ptr, step, mask=inside)


@triton.jit
def _update_block(
    p_ptr, g_ptr, m_ptr, v_ptr, e_ptr, p_copy_ptr, e_copy_ptr, offsets, live,
    scale, keep, step_size, divisor, ema_weight, weight1, beta2, weight2, eps,
    HAS_EMA: tl.constexpr, HAS_PARAM_COPY: tl.constexpr, HAS_EMA_COPY: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    g = chunks.load(g_ptr, offsets, live, MASKED) * scale
    p = chunks.load(p_ptr, offsets, live, MASKED)
    m = chunks.load(m_ptr, offsets, live, MASKED)
    v = chunks.load(v_ptr, offsets, live, MASKED)
    if HAS_EMA:
        e = chunks.load(e_ptr, offsets, live, MASKED)
    m = lerp(m, g, weight1)
    v = v * beta2 + weight2 * (g * g)
    p = p * keep - step_size * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), divisor) + eps)
    chunks.store(p_ptr, offsets, p, live, MASKED)
    chunks.store(m_ptr, offsets, m, live, MASKED)
    chunks.store(v_ptr, offsets, v, live, MASKED)
    if HAS_PARAM_COPY:
        chunks.store(p_copy_ptr, offsets, p, live, MASKED)
    if HAS_EMA:
        e = lerp(e, p, ema_weight)
        chunks.store(e_ptr, offsets, e, live, MASKED)
        if HAS_EMA_COPY:
            chunks.store(e_copy_ptr, offsets, e, live, MASKED)


@triton.jit(do_not_specialize=["num_tensors", "num_steps"])
def _adamw_ema_kernel(
    table_ptr,  # [10, num_tensors]: first program, size, index of its step and gradient, weight decay, 6 addresses
    num_tensors,
    grads_ptr,  # addresses of the gradients
    coefficients_ptr,  # [3 + 2 num_steps], see _coefficients_kernel
    num_steps,  # 1: shared by all tensors
    scale_ptr,  # [], not read without HAS_SCALE
    weight1,  # 1 - beta1
    beta2,
    weight2,  # 1 - beta2
    eps,
    GRAD_DTYPE: tl.constexpr,
    PARAM_COPY_DTYPE: tl.constexpr,
    EMA_COPY_DTYPE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_EMA: tl.constexpr,
    HAS_PARAM_COPY: tl.constexpr,
    HAS_EMA_COPY: tl.constexpr,
    ALIGNED: tl.constexpr,
    LANES: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column, start, size = chunks.locate(table_ptr, num_tensors, CHUNK, LANES)
    index = tl.load(table_ptr + 2 * num_tensors + column)
    decay = tl.load(table_ptr + 3 * num_tensors + column).to(tl.int32).to(tl.float32, bitcast=True)
    p_ptr = chunks.pointer(table_ptr, 4, column, num_tensors, start, tl.float32, ALIGNED)
    m_ptr = chunks.pointer(table_ptr, 5, column, num_tensors, start, tl.float32, ALIGNED)
    v_ptr = chunks.pointer(table_ptr, 6, column, num_tensors, start, tl.float32, ALIGNED)
    e_ptr = chunks.pointer(table_ptr, 7, column, num_tensors, start, tl.float32, ALIGNED)
    p_copy_ptr = chunks.pointer(table_ptr, 8, column, num_tensors, start, PARAM_COPY_DTYPE, ALIGNED)
    e_copy_ptr = chunks.pointer(table_ptr, 9, column, num_tensors, start, EMA_COPY_DTYPE, ALIGNED)
    g_ptr = chunks.pointer(grads_ptr, 0, index, num_tensors, start, GRAD_DTYPE, ALIGNED)

    lr = tl.load(coefficients_ptr)
    ema_weight = tl.load(coefficients_ptr + 1)
    size = tl.where(tl.load(coefficients_ptr + 2) == 0.0, 0, size)  # a skipped update touches nothing
    step = tl.minimum(index, num_steps - 1)
    step_size = tl.load(coefficients_ptr + 3 + step)
    divisor = tl.load(coefficients_ptr + 3 + num_steps + step)
    keep = (1.0 - lr.to(tl.float64) * decay.to(tl.float64)).to(tl.float32)
    scale = 1.0
    if HAS_SCALE:
        scale = tl.load(scale_ptr).to(tl.float32)

    lanes = tl.arange(0, BLOCK)
    num_full = size // BLOCK
    for i in range(0, num_full):
        _update_block(
            p_ptr, g_ptr, m_ptr, v_ptr, e_ptr, p_copy_ptr, e_copy_ptr, i * BLOCK + lanes, lanes < BLOCK,
            scale, keep, step_size, divisor, ema_weight, weight1, beta2, weight2, eps,
            HAS_EMA, HAS_PARAM_COPY, HAS_EMA_COPY, False,
        )  # fmt: skip
    tail = num_full * BLOCK + lanes
    if num_full * BLOCK < size:
        _update_block(
            p_ptr, g_ptr, m_ptr, v_ptr, e_ptr, p_copy_ptr, e_copy_ptr, tail, tail < size,
            scale, keep, step_size, divisor, ema_weight, weight1, beta2, weight2, eps,
            HAS_EMA, HAS_PARAM_COPY, HAS_EMA_COPY, True,
        )  # fmt: skip


class _Kind(NamedTuple):
    """What is the same for all tensors of a launch."""

    grad_dtype: torch.dtype
    has_ema: bool
    param_copy_dtype: torch.dtype | None
    ema_copy_dtype: torch.dtype | None
    aligned: bool


@dataclass(frozen=True)
class _Plan:
    """Everything about a list of tensors that does not change between steps."""

    launches: list[tuple[chunks.Table, _Kind]]
    steps: Tensor  # addresses


def adamw_ema_(
    tensors: Tensors,
    steps: Sequence[Tensor],  # [] fp32: one for all, or one per parameter
    weight_decays: Sequence[float],  # one per parameter
    hyper: Hyper,
    config: LaunchConfig | None = None,
) -> None:
    """Update everything in place: one launch for the coefficients, one per combination of dtypes and alignment."""
    params, grads = tensors.params, tensors.grads
    device = params[0].device
    config = config or chunks.config_for(params[0])
    addresses = [tuple(0 if x is None else x.data_ptr() for x in xs) for xs in tensors]
    grad_addresses = addresses.pop(1)
    key = (
        tuple(map(Tensor.numel, params)),
        tuple(addresses),
        tuple(address % launch.ALIGNMENT == 0 for address in grad_addresses),
        tuple(_dtypes(xs) for xs in (grads, tensors.param_copies, tensors.ema_copies)),
        tuple(map(Tensor.data_ptr, steps)),
        tuple(weight_decays),
        config.chunk,
        device,
    )
    stream = chunks.current_stream(device)
    with launch.device_guard(params[0]):
        if stream is None:
            plan, where = _plan.__wrapped__(*key), chunks.int_tensor(grad_addresses, device)
        else:
            plan, where = _plan(*key, stream), _addresses(grad_addresses, device, stream)
        coefficients = torch.empty(3 + 2 * len(steps), dtype=torch.float32, device=device)
        _launch_coefficients(plan.steps, coefficients, hyper)
        for table, kind in plan.launches:
            _adamw_ema_kernel[(table.programs,)](
                table.data,
                table.tensors,
                where,
                coefficients,
                len(steps),
                coefficients if hyper.grad_scale is None else hyper.grad_scale,
                1 - hyper.beta1,
                hyper.beta2,
                1 - hyper.beta2,
                hyper.eps,
                GRAD_DTYPE=launch.TL_DTYPES[kind.grad_dtype],
                PARAM_COPY_DTYPE=launch.TL_DTYPES[kind.param_copy_dtype or torch.float32],
                EMA_COPY_DTYPE=launch.TL_DTYPES[kind.ema_copy_dtype or torch.float32],
                HAS_SCALE=hyper.grad_scale is not None,
                HAS_EMA=kind.has_ema,
                HAS_PARAM_COPY=kind.param_copy_dtype is not None,
                HAS_EMA_COPY=kind.ema_copy_dtype is not None,
                ALIGNED=kind.aligned,
                LANES=table.lanes,
                CHUNK=config.chunk,
                BLOCK=config.block,
                num_warps=config.num_warps,
            )


def _launch_coefficients(steps: Tensor, out: Tensor, hyper: Hyper) -> None:
    tensors = (hyper.lr_tensor, hyper.ema_decay_tensor, hyper.skip)
    _coefficients_kernel[(1,)](
        steps,
        out,
        steps.numel(),
        *(out if x is None else x for x in tensors),
        hyper.lr,
        1 - hyper.ema_decay,
        *(math.log(beta) if beta > 0 else -math.inf for beta in (hyper.beta1, hyper.beta2)),
        HAS_LR=hyper.lr_tensor is not None,
        HAS_DECAY=hyper.ema_decay_tensor is not None,
        HAS_SKIP=hyper.skip is not None,
        FAIRSEQ_EPS=hyper.fairseq_eps,
        BLOCK=_STEPS_BLOCK,
    )


def _dtypes(tensors: Sequence[Tensor | None]) -> tuple[torch.dtype | None, ...]:
    return tuple(None if x is None else x.dtype for x in tensors)


@lru_cache(maxsize=16)
def _plan(
    sizes: tuple[int, ...],
    addresses: tuple[tuple[int, ...], ...],  # of everything but the gradients, see Tensors
    grads_aligned: tuple[bool, ...],
    dtypes: tuple[tuple[torch.dtype | None, ...], ...],  # of gradients, param_copies and ema_copies
    steps: tuple[int, ...],
    weight_decays: tuple[float, ...],
    chunk: int,
    device: torch.device,
    stream: int | None = None,
) -> _Plan:
    """Group the tensors and build the tables. They depend on the arguments alone, so cached ones cannot be stale."""
    nothing = (0,) * len(sizes)
    columns = list(zip(*(row or nothing for row in addresses), strict=True))
    kinds = list(zip(*(row or (None,) * len(sizes) for row in dtypes), strict=True))
    groups = defaultdict(list)
    for i, size in enumerate(sizes):
        if size > 0:
            grad, param_copy, ema_copy = kinds[i]
            aligned = grads_aligned[i] and all(address % launch.ALIGNMENT == 0 for address in columns[i])
            bits = struct.unpack("=i", struct.pack("=f", weight_decays[i]))[0]
            kind = _Kind(grad, columns[i][3] != 0, param_copy, ema_copy, aligned)
            groups[kind].append((size, i, bits, *columns[i]))
    launches = []
    for kind, spans in groups.items():
        for first in range(0, len(spans), chunks.MAX_TENSORS):
            group_sizes, *rows = zip(*spans[first : first + chunks.MAX_TENSORS], strict=True)
            launches.append((chunks.build_table(group_sizes, rows, chunk, device), kind))
    return _Plan(launches, chunks.int_tensor(steps, device))


@lru_cache(maxsize=16)
def _addresses(values: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    return chunks.int_tensor(values, device)
