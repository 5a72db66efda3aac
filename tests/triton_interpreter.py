"""Repairs of Triton's CPU interpreter that the tests rely on. Install them before the first kernel runs.

The interpreter keeps bfloat16 as uint16. It truncates float32 -> bfloat16 where the hardware rounds to nearest even,
and products, arithmetic or a reduction of bfloat16 silently work on the bit patterns. The first and products are
repaired; the others raise, since kernels should convert to float32 first anyway. ``tl.maximum`` and ``tl.minimum``
drop a NaN, like the hardware.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _is_bf16(value) -> bool:
    return getattr(getattr(value, "dtype", None), "scalar", None) == tl.bfloat16


def _widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _round(x: np.ndarray) -> np.ndarray:
    x = np.ascontiguousarray(x, dtype=np.float32)
    bits = x.view(np.uint32)
    half = ((bits >> 16) & 1) + np.uint32(0x7FFF)  # ties go to the even mantissa
    return np.where(np.isnan(x), np.uint16(0x7FC0), ((bits + half) >> 16).astype(np.uint16)).reshape(x.shape)


def _cast(handle, dst_type, stock):
    if _is_bf16(handle):
        wide = interpreter.TensorHandle(_widen(handle.data), tl.float32)
        return wide if dst_type.scalar == tl.float32 else stock(wide)
    if dst_type.scalar == tl.bfloat16:
        return interpreter.TensorHandle(_round(handle.data), tl.bfloat16)
    return stock(handle)


def install() -> None:
    """Patch the interpreter of this process, once."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "repaired", False):
        return
    builder.repaired = True
    cast_impl, fp_to_fp, binary_op = builder.cast_impl, builder.create_fp_to_fp, builder.binary_op
    dot = builder.create_dot
    reduce = interpreter.ReduceScanOpInterface.apply

    def repaired_cast(self, src, dst_type):
        return _cast(src, dst_type, lambda handle: cast_impl(self, handle, dst_type))

    def repaired_fp_to_fp(self, src, dst_type, rounding_mode):
        return _cast(src, dst_type, lambda handle: fp_to_fp(self, handle, dst_type, rounding_mode))

    def repaired_dot(self, a, b, *rest):
        a, b = (interpreter.TensorHandle(_widen(x.data), tl.float32) if _is_bf16(x) else x for x in (a, b))
        return dot(self, a, b, *rest)

    def checked_binary_op(self, lhs, rhs, op):
        if _is_bf16(lhs) or _is_bf16(rhs):
            raise TypeError("bfloat16 arithmetic in the interpreter: convert to float32 first")
        return binary_op(self, lhs, rhs, op)

    def checked_reduce(self, tensors):
        if any(_is_bf16(x) for x in (tensors if isinstance(tensors, tuple) else (tensors,))):
            raise TypeError("bfloat16 reduction in the interpreter: convert to float32 first")
        return reduce(self, tensors)

    builder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)
    builder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)
    builder.cast_impl = repaired_cast
    builder.create_fp_to_fp = repaired_fp_to_fp
    builder.create_dot = repaired_dot
    builder.binary_op = checked_binary_op
    interpreter.ReduceScanOpInterface.apply = checked_reduce
