"""Repairs of Triton's interpreter (TRITON_INTERPRET=1), which computes with NumPy.

:func:`mend` tries each thing that the kernels need, and replaces what the installed Triton and NumPy do wrong:

* Bounds of loops are arrays of one element, and NumPy 2.4 takes only those without a dimension for integers.
* NumPy has no bfloat16: the interpreter keeps its bits in uint16, and ``tl.dot`` multiplies those bits.
* Conversions from float32 to bfloat16 truncate, or round half up and lose the carry into the exponent.
"""

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

#: float32 and its bfloat16: a NaN, and numbers to round down, up, to even from below and above, and into the exponent.
ROUNDED = {
    float("nan"): 0x7FC0,
    1.0 + 2.0**-9: 0x3F80,
    -1.0 - 3 * 2.0**-9: 0xBF81,
    1.0 + 2.0**-8: 0x3F80,
    1.0 + 3 * 2.0**-8: 0x3F82,
    2.0 - 2.0**-9: 0x4000,
}


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to even, as the hardware does."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def widened(handle: TensorHandle) -> TensorHandle:
    """A bfloat16 handle as float32; others as they are."""
    if handle.dtype.scalar == tl.bfloat16:
        return TensorHandle(bfloat16_to_float32(handle.data), tl.float32)
    return handle


def converted(handle: TensorHandle, target: tl.dtype) -> TensorHandle | None:
    """The conversion to or from bfloat16, or None where none is meant."""
    source, target = handle.dtype.scalar, target.scalar
    if source == target or tl.bfloat16 not in (source, target):
        return None
    values = widened(handle).data.astype(np.float32)
    if target == tl.bfloat16:
        return TensorHandle(float32_to_bfloat16(values), tl.bfloat16)
    return TensorHandle(values.astype(interpreter._get_np_dtype(target)), target)


def loops_take_their_bounds() -> bool:
    """Whether an array of one element serves as an integer."""

    class Scalar:
        handle = TensorHandle(np.array([3], np.int32), tl.int32)

    scope = interpreter._LangPatchScope()
    interpreter._patch_lang_tensor(Scalar, scope)
    try:
        return Scalar().__index__() == 3
    except TypeError:
        return False
    finally:
        scope.restore()


def mend_bounds() -> None:
    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor, scope, *rest):
        patch(tensor, scope, *rest)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).squeeze()))

    interpreter._patch_lang_tensor = patch_with_index


def dot_takes_bfloat16() -> bool:
    two = TensorHandle(np.full((1, 1), 0x4000, np.uint16), tl.bfloat16)
    none = TensorHandle(np.zeros((1, 1), np.float32), tl.float32)
    product = InterpreterBuilder.create_dot(interpreter.interpreter_builder, two, two, none, None, 0)
    return product.data.item() == 4.0


def mend_dot() -> None:
    dot = InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, *rest):
        return dot(self, widened(a), widened(b), d, *rest)

    InterpreterBuilder.create_dot = create_dot


def conversions_round() -> bool:
    """Whether both ways to convert, ``to`` a dtype and a cast with a rounding mode, round to nearest even."""
    builder = interpreter.interpreter_builder
    values = TensorHandle(np.array(list(ROUNDED), np.float32), tl.float32)
    found = (
        builder.cast_impl(values, tl.bfloat16),
        builder.create_fp_to_fp(values, tl.bfloat16, ir.ROUNDING_MODE.RTNE),
    )
    return all(handle.data.tolist() == list(ROUNDED.values()) for handle in found)


def mend_conversions() -> None:
    cast, to_float = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp

    def cast_impl(self, source, target):
        result = converted(source, target)
        return cast(self, source, target) if result is None else result

    def create_fp_to_fp(self, source, target, rounding):
        result = converted(source, target)
        return to_float(self, source, target, rounding) if result is None else result

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp = cast_impl, create_fp_to_fp


REPAIRS = {
    loops_take_their_bounds: mend_bounds,
    dot_takes_bfloat16: mend_dot,
    conversions_round: mend_conversions,
}


def mend() -> None:
    """Mend what this process's interpreter does wrong; what is right, or mended, stays as it is."""
    for works, repair in REPAIRS.items():
        if not works():
            repair()
