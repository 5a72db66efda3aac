"""``gelu(norm(conv(waveform)))`` in PyTorch, block by block, as a matrix product and a GELU.

Layer norm of z = W [x; 1] over channels folds into the weights: with the rows of W centred, W'' = W - mean(W),
its mean is gone and its variance is ``[x; 1]^T Cov(W) [x; 1]``, so that ``u = W' X`` with X = [rstd * x; rstd; 1] and
W' = [gamma * W''; beta]. Group norm with a group per channel folds as well: mean and variance of channel c are
``w . m`` and ``w^T Cov w`` with mean m and covariance of the taps over the frames of a segment: X = [x - m; 1].

In backward, with du the gradient of u, everything is a sum over frames of small outer products: G = du^T X, and for
layer norm, with D = du [gamma * W''; gamma], m1 = D[last] / C and m2 = X[:last] . D[:last] / C:
``grad_W = gamma * G - sum m1 X - W'' (sum m2 X X^T)``. A block stays in the cache; nothing of size [T, C] is kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from d2v_fast.ops import _rows

_CPU_BLOCK = 2**18  # elements: float32 in the cache of two cores
_GPU_BLOCK = 2**25
_CHUNK = 2**13  # frames whose taps are laid out at once


@dataclass
class Problem:
    """The arguments in the dtype of the computation; ``weight`` [C, k], vectors [C] or None."""

    waveforms: Tensor  # [B, S]
    weight: Tensor
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    segments: Tensor | None  # [U, 2]
    stride: int
    eps: float

    @classmethod
    def of(cls, waveforms, weight, bias, norm_weight, norm_bias, segments, stride, eps) -> "Problem":
        """From the arguments of the op."""
        dtype = _rows.accumulation(waveforms, weight, bias, norm_weight, norm_bias)
        tensors = _rows.cast(dtype, waveforms, weight.squeeze(1), bias, norm_weight, norm_bias)
        return cls(*tensors, segments, stride, eps)

    @property
    def taps(self) -> Tensor:
        """[B, T, k] view: the samples that each frame sees."""
        return self.waveforms.unfold(1, self.weight.shape[1], self.stride)

    @property
    def gamma(self) -> Tensor:
        return self.weight.new_ones(self.weight.shape[0]) if self.norm_weight is None else self.norm_weight

    @property
    def beta(self) -> Tensor:
        return self.weight.new_zeros(self.weight.shape[0]) if self.norm_bias is None else self.norm_bias

    @property
    def on_host(self) -> bool:
        """Whether the segments can be read without waiting for a device."""
        return self.segments is None or not self.segments.is_cuda

    def ranges(self) -> list[tuple[int, int, int]]:
        """(row, first frame, frames) of each segment, if :attr:`on_host`."""
        B, T, _ = self.taps.shape
        if self.segments is None:
            return [(b, 0, T) for b in range(B)]
        # an empty segment may lie behind the last frame
        return [(min(first // T, B - 1), first % T, count) for first, count in self.segments.tolist()]

    def block(self) -> int:
        """Frames in a block."""
        elements = _GPU_BLOCK if self.weight.is_cuda else _CPU_BLOCK
        return max(elements // self.weight.shape[0], 16)


def _blocks(laid_out: Tensor, size: int) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, laid_out.shape[0], size):
        rows = slice(start, min(start + size, laid_out.shape[0]))
        yield rows, laid_out[rows]


def _gelu_into(u: Tensor, y: Tensor) -> None:
    if u.dtype == y.dtype:
        torch.ops.aten.gelu.out(u, out=y)
    else:
        y.copy_(torch.ops.aten.gelu.out(u, out=u))


def _through_gelu(grad: Tensor, u: Tensor) -> Tensor:
    """Gradient of u, in its place."""
    return torch.ops.aten.gelu_backward.grad_input(grad.to(u.dtype), u, grad_input=u)


# Layer norm


@dataclass
class _LayerFold:
    centred: Tensor  # [C, k + 1] W'': taps and bias less their means over channels
    weights: Tensor  # [C, k + 2] W'
    grad_weights: Tensor  # [C, k + 2] W' with gamma in place of beta
    covariance: Tensor  # [k + 1, k + 1] float64

    @classmethod
    def of(cls, p: Problem) -> "_LayerFold":
        bias = p.weight.new_zeros(p.weight.shape[0]) if p.bias is None else p.bias
        wide = torch.cat([p.weight, bias[:, None]], 1).double()
        wide = wide - wide.mean(0)
        centred = wide.to(p.weight.dtype)
        gamma = p.gamma[:, None]
        scaled = gamma * centred
        weights = torch.cat([scaled, p.beta[:, None]], 1)
        return cls(centred, weights, torch.cat([scaled, gamma], 1), wide.T @ wide / wide.shape[0])


def _layer_chunks(p: Problem, covariance: Tensor, rstd: Tensor, known: bool) -> Iterator[tuple[slice, Tensor]]:
    """Frames [B * T] and their X [n, k + 2], chunk by chunk; ``rstd`` [B * T] is read where ``known``, else written."""
    B, T, k = p.taps.shape
    chunk = max(_CHUNK, p.block())
    for b in range(B):
        for start in range(0, T, chunk):
            stop = min(start + chunk, T)
            frames = slice(b * T + start, b * T + stop)
            x = p.weight.new_ones(stop - start, k + 2)
            x[:, :k] = p.taps[b, start:stop]
            if not known:
                wide = x[:, : k + 1].double()
                variance = ((wide @ covariance) * wide).sum(1).clamp_(min=0)
                rstd[frames] = (variance + p.eps).rsqrt().to(rstd.dtype)
            x[:, : k + 1] *= rstd[frames, None]
            yield frames, x


def layer_forward(p: Problem, y: Tensor) -> Tensor:
    """Fill ``y`` [B * T, C]; returns 1 / deviation [B * T] of each frame before the affine part."""
    fold = _LayerFold.of(p)
    rstd = p.weight.new_empty(y.shape[0])
    buffer = p.weight.new_empty(p.block(), y.shape[1])
    for frames, chunk in _layer_chunks(p, fold.covariance, rstd, known=False):
        out = y[frames]
        for rows, x in _blocks(chunk, p.block()):
            _gelu_into(torch.mm(x, fold.weights.T, out=buffer[: x.shape[0]]), out[rows])
    return rstd


def layer_backward(p: Problem, grad: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of weight [C, k], bias, norm_weight and norm_bias [C], given that of y [B * T, C]."""
    fold = _LayerFold.of(p)
    C, slots = fold.weights.shape
    last = slots - 1
    outer = p.weight.new_zeros(C, slots)  # G
    inner = p.weight.new_zeros(slots, slots)  # sum of [m2 X; m1] X^T
    buffer = p.weight.new_empty(p.block(), C)
    for frames, chunk in _layer_chunks(p, fold.covariance, rstd, known=True):
        upstream = grad[frames]
        for rows, x in _blocks(chunk, p.block()):
            u = torch.mm(x, fold.weights.T, out=buffer[: x.shape[0]])
            grad_u = _through_gelu(upstream[rows], u)
            outer.addmm_(grad_u.T, x)
            sums = grad_u @ fold.grad_weights / C
            m2 = (x[:, :last] * sums[:, :last]).sum(1, keepdim=True)
            inner.addmm_(torch.cat([m2 * x[:, :last], sums[:, last:]], 1).T, x)
    grad_w = p.gamma[:, None] * outer[:, :last] - inner[last, :last] - fold.centred @ inner[:last, :last]
    grad_gamma = (fold.centred * outer[:, :last]).sum(1)
    return grad_w[:, : last - 1], grad_w[:, last - 1], grad_gamma, outer[:, last]


# Group norm


@dataclass
class _GroupFold:
    mean: Tensor  # [U, k] of the taps; taken off the samples, so that an offset does not cancel later
    product: Tensor  # [U, C, k] W Cov
    rstd: Tensor  # [U, C]
    scale: Tensor  # [U, C] gamma * rstd

    @classmethod
    def of(cls, p: Problem, moments: Tensor) -> "_GroupFold":
        k = p.weight.shape[1]
        w = p.weight.double()
        product = w @ moments[:, k:].unflatten(1, (k, k))
        rstd = ((product * w).sum(2).clamp(min=0) + p.eps).rsqrt()
        return cls(*_rows.cast(p.weight.dtype, moments[:, :k], product, rstd, p.gamma * rstd))


def group_moments(p: Problem) -> Tensor:
    """[U, k + k * k] float64: mean and covariance of the taps over the frames of each segment."""
    if not p.on_host:
        return _moments_on_device(p)
    k, ranges = p.weight.shape[1], p.ranges()
    moments = torch.zeros(len(ranges), k + k * k, dtype=torch.float64, device=p.weight.device)
    for row, (b, start, count) in zip(moments, ranges, strict=True):
        if count:
            x = p.taps[b, start : start + count].double()
            mean = x.mean(0)
            x = x - mean
            row.copy_(torch.cat([mean, (x.T @ x / count).flatten()]))
    return moments


def _moments_on_device(p: Problem) -> Tensor:
    """The same without waiting for the segments: each looks at all frames."""
    x = p.taps.flatten(0, 1).double()
    index = torch.arange(x.shape[0], device=x.device)
    moments = x.new_zeros(p.segments.shape[0], x.shape[1] * (x.shape[1] + 1))
    for row, (first, count) in zip(moments, p.segments, strict=True):
        inside = ((index >= first) & (index < first + count))[:, None]
        size = count.clamp(min=1)
        mean = torch.where(inside, x, 0).sum(0) / size
        centred = torch.where(inside, x - mean, 0)
        row.copy_(torch.cat([mean, (centred.T @ centred / size).flatten()]))
    return moments


def _segment_of_frames(p: Problem, first: int, count: int) -> tuple[Tensor, Tensor]:
    """For frames from ``first`` on: the last segment that starts before each, and whether the frame is inside it."""
    index = torch.arange(first, first + count, device=p.weight.device)
    order = p.segments[:, 1].argsort()  # among those that start at the same frame, empty ones come first
    order = order[p.segments[order, 0].argsort(stable=True)]
    place = torch.bucketize(index, p.segments[order, 0], right=True) - 1
    segment = order[place.clamp_(min=0)]
    start, size = p.segments[segment].unbind(1)
    return segment, (index >= start) & (index < start + size)


def _group_blocks(p: Problem, fold: _GroupFold) -> Iterator[tuple[slice, Tensor, int | Tensor, Tensor | None]]:
    """Frames [B * T], their centred taps [n, k], and their segment: a number, or [n] and whether inside it [n, 1]."""
    B, T, _ = p.taps.shape
    if not p.on_host:
        for b in range(B):
            for rows, taps in _blocks(p.taps[b], p.block()):
                frames = slice(b * T + rows.start, b * T + rows.stop)
                segment, inside = _segment_of_frames(p, frames.start, taps.shape[0])
                yield frames, taps - fold.mean[segment], segment, inside[:, None]
        return
    for segment, (b, start, count) in enumerate(p.ranges()):
        for rows, taps in _blocks(p.taps[b, start : start + count], p.block()):
            first = b * T + start
            yield slice(first + rows.start, first + rows.stop), taps - fold.mean[segment], segment, None


def _group_u(p: Problem, fold: _GroupFold, x: Tensor, segment: int | Tensor, buffer: Tensor) -> Tensor:
    """What GELU takes, [n, C] in ``buffer``, from the centred taps x [n, k]."""
    out = buffer[: x.shape[0]]
    if isinstance(segment, int):
        return torch.addmm(p.beta, x, (p.weight * fold.scale[segment][:, None]).T, out=out)
    return torch.mm(x, p.weight.T, out=out).mul_(fold.scale[segment]).add_(p.beta)


def group_forward(p: Problem, y: Tensor) -> Tensor:
    """Fill ``y`` [B * T, C], with 0 outside of the segments; returns :func:`group_moments`."""
    moments = group_moments(p)
    if p.segments is not None:
        y.zero_()
    if moments.shape[0] == 0:
        return moments
    fold = _GroupFold.of(p, moments)
    buffer = p.weight.new_empty(p.block(), y.shape[1])
    for frames, x, segment, inside in _group_blocks(p, fold):
        u = _group_u(p, fold, x, segment, buffer)
        _gelu_into(u if inside is None else u.masked_fill_(~inside, 0), y[frames])
    return moments


def group_backward(p: Problem, grad: Tensor, moments: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of weight [C, k], bias (0: a constant of a channel is normalised away), norm_weight and norm_bias."""
    U, C = moments.shape[0], p.weight.shape[0]
    fold = _GroupFold.of(p, moments)
    scaled_outer = torch.zeros_like(p.weight)  # sum of scale * du x
    totals = p.weight.new_zeros(C)  # sum of du
    products = p.weight.new_zeros(U, C)  # sum of du (w . x)
    buffer = p.weight.new_empty(p.block(), C)
    for frames, x, segment, inside in _group_blocks(p, fold) if U else ():
        grad_u = _through_gelu(grad[frames], _group_u(p, fold, x, segment, buffer))
        if inside is not None:
            grad_u.masked_fill_(~inside, 0)
        totals += grad_u.sum(0)
        if inside is None:
            outer = grad_u.T @ x
            scaled_outer += fold.scale[segment][:, None] * outer
            products[segment] += (p.weight * outer).sum(1)
        else:
            member = (segment[:, None] == torch.arange(U, device=x.device)).to(x.dtype)
            scaled_outer.addmm_((grad_u * fold.scale[segment]).T, x)
            products.addmm_(member.T, grad_u * (x @ p.weight.T))
    grad_gamma = fold.rstd * products
    by_deviation = torch.einsum("uc,uck->ck", fold.scale * fold.rstd * grad_gamma, fold.product)
    return scaled_outer - by_deviation, totals.new_zeros(C), grad_gamma.sum(0), totals
