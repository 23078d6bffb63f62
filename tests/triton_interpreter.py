"""Repairs of Triton's interpreter (TRITON_INTERPRET=1), which computes with NumPy.

NumPy has no bfloat16: the interpreter keeps its bits in uint16 and, in 3.6, multiplies those bits in
``tl.dot`` and truncates when it rounds float32 to bfloat16.  Loop bounds are one-element arrays, which
NumPy 2.4 no longer takes for integers.  :func:`install` mends these for the kernels of this package.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to even, as the hardware does."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def widened(handle: TensorHandle) -> TensorHandle:
    """A 16-bit float handle as float32; others as they are."""
    scalar = handle.dtype.scalar
    if scalar == tl.bfloat16:
        return TensorHandle(bfloat16_to_float32(handle.data), tl.float32)
    if scalar == tl.float16:
        return TensorHandle(handle.data.astype(np.float32), tl.float32)
    return handle


def converted(handle: TensorHandle, target) -> TensorHandle | None:
    """The conversion to or from bfloat16, or None where none is meant."""
    source, target = handle.dtype.scalar, target.scalar
    if source == target or tl.bfloat16 not in (source, target):
        return None
    values = widened(handle).data.astype(np.float32)
    if target == tl.bfloat16:
        return TensorHandle(float32_to_bfloat16(values), tl.bfloat16)
    return TensorHandle(values.astype(interpreter._get_np_dtype(target)), target)


def install() -> None:
    """Mend the interpreter of this process, once."""
    if getattr(InterpreterBuilder, "_mended", False):
        return
    InterpreterBuilder._mended = True
    dot, cast, to_float = (
        InterpreterBuilder.create_dot,
        InterpreterBuilder.cast_impl,
        InterpreterBuilder.create_fp_to_fp,
    )

    def create_dot(self, a, b, d, *rest):
        return dot(self, widened(a), widened(b), d, *rest)

    def cast_impl(self, source, target):
        result = converted(source, target)
        return cast(self, source, target) if result is None else result

    def create_fp_to_fp(self, source, target, rounding):
        result = converted(source, target)
        return to_float(self, source, target, rounding) if result is None else result

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp

    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor, scope, *rest):
        patch(tensor, scope, *rest)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).squeeze()))

    interpreter._patch_lang_tensor = patch_with_index
