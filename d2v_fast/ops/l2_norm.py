"""L2 norm over all elements of many tensors, and the factor that clips gradients by it.

``norm = sqrt(sum_i sum(x_i^2))``; torch: ``nn.utils.get_total_norm`` and ``clip_grads_with_norm_``.
"""

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from d2v_fast.ops._dispatch import KERNEL_DTYPES, check_device, check_float, check_scalar, cpu_runs_triton, has_triton
from d2v_fast.ops._lists import is_dense, tensor_list


def l2_norm_ref(tensors: Sequence[Tensor]) -> Tensor:
    """The definition of the op in plain PyTorch, with its multi-tensor functions."""
    norms = torch._foreach_norm(tensors, 2, dtype=torch.float64)
    return torch.linalg.vector_norm(torch.stack(norms)).float()


@torch.library.custom_op("d2v_fast::l2_norm", mutates_args=(), device_types="cpu")
def _op(tensors: list[Tensor]) -> Tensor:
    return _run(all(cpu_runs_triton(x.dtype) for x in tensors), tensors)


@_op.register_kernel("cuda")
def _op_cuda(tensors: list[Tensor]) -> Tensor:
    return _run(has_triton(), tensors)


def _run(use_triton: bool, tensors: list[Tensor]) -> Tensor:
    if not use_triton:
        return l2_norm_ref(tensors)
    from d2v_fast.kernels import l2_norm as kernels

    return kernels.l2_norm([x if is_dense(x) else x.contiguous() for x in tensors])


@_op.register_fake
def _(tensors):
    return tensors[0].new_empty((), dtype=torch.float32)


@torch.no_grad()
def l2_norm(tensors: Sequence[Tensor]) -> Tensor:
    """L2 norm of all elements of ``tensors`` together, as if they were one vector.

    Args:
        tensors: float32, bfloat16 or float16 (float64 on CPU), mixed as you like, of any shapes, on one device. Empty
            ones are fine; those with gaps between their elements are copied first.

    Returns:
        The norm, [] fp32, on the device of the tensors; 0 (on the CPU) for an empty list. The sum of squares is
        float64, added in the same order in every run. Infinity and NaN propagate. Not differentiable.

    Raises:
        TypeError: a tensor is not floating point, or float64 on a GPU; ``tensors`` is a tensor, or holds other things.
        ValueError: a tensor is on another device than the first.
    """
    tensors = tensor_list("tensors", tensors)
    alike = {x.dtype for x in tensors}.issubset(KERNEL_DTYPES) and len({x.device for x in tensors}) == 1
    for i, x in enumerate([] if alike else tensors):
        check_float(f"tensors[{i}]", x)
        check_device(f"tensors[{i}]", x, tensors[0].device)
    return _op(tensors) if tensors else torch.zeros(())


@torch.no_grad()
def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of norm ``norm`` are multiplied by to bring it down to ``max_norm``.

    ``min(1, max_norm / (norm + 1e-6))`` as in ``torch.nn.utils.clip_grads_with_norm_``, computed on the device.

    Args:
        norm: [] fp32 or fp64, such as :func:`l2_norm` returns.
        max_norm: a number > 0.

    Returns:
        [] in the dtype of ``norm``; NaN for a norm of NaN, 0 for an infinite one.

    Raises:
        TypeError: ``norm`` is not a float32 or float64 tensor, or ``max_norm`` is not a number.
        ValueError: ``norm`` is not of shape [], or ``max_norm`` is not a number > 0.
    """
    if not isinstance(norm, Tensor):
        raise TypeError(f"norm must be a tensor, got {type(norm).__name__}")
    check_scalar("norm", norm, norm.device)
    if not isinstance(max_norm, (float, int, Real)):
        raise TypeError(f"max_norm must be a number, got {type(max_norm).__name__}")
    if not max_norm > 0:
        raise ValueError(f"max_norm must be > 0, got {max_norm}")
    return (float(max_norm) / (norm + 1e-6)).clamp(max=1.0)
