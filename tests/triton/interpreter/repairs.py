"""What the stock interpreter computes wrongly, computed rightly.

It keeps bfloat16 and float8 as bit patterns and lets numpy add, multiply and compare those
patterns; it truncates where a GPU rounds to nearest even. Here such values are decoded to float32,
computed there and rounded once, which is what the hardware does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as stock

Builder = stock.InterpreterBuilder
Handle = stock.TensorHandle

_TORCH_TYPE = {
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
_COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)
# |a * b| <= 2^14 for int8, and float32 counts exactly up to 2^24: 1024 products at a time stay
# exact.
_EXACT_INT8_TERMS = 512


def is_packed(dtype: Any) -> bool:
    """Whether the interpreter stores values of this type as bare bits."""
    return dtype.scalar in _TORCH_TYPE


def decode(handle: Any) -> np.ndarray:
    """The values of a handle: float32 for packed types, the data itself otherwise."""
    if not is_packed(handle.dtype):
        return handle.data
    bits = np.ascontiguousarray(handle.data)
    if handle.dtype.scalar == tl.bfloat16:
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return torch.from_numpy(bits).view(_TORCH_TYPE[handle.dtype.scalar]).float().numpy()


def encode(values: np.ndarray, dtype: Any) -> np.ndarray:
    """Bits of a packed type, rounded to nearest even (torch's casts do that)."""
    exact = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    rounded = exact.to(_TORCH_TYPE[dtype.scalar])
    bits = torch.uint16 if dtype.scalar == tl.bfloat16 else torch.uint8
    return rounded.view(bits).numpy()


def pack(values: np.ndarray, dtype: Any) -> Any:
    return Handle(encode(values, dtype), dtype.scalar)


def install() -> None:
    """Replaces the faulty methods of the interpreter, for this process."""
    _repair_casts()
    _repair_arithmetic()
    _repair_dot()
    for operation in (stock.ReduceOps, stock.ScanOps):
        _repair_reduction(operation)
    _repair_scalar_index()


def _repair_casts() -> None:
    stock_cast, stock_fp_to_fp = Builder.cast_impl, Builder.create_fp_to_fp

    def cast_impl(self, src, dst_type):
        if not (is_packed(src.dtype) or is_packed(dst_type)):
            return stock_cast(self, src, dst_type)
        values = decode(src)
        if is_packed(dst_type):
            return pack(values, dst_type)
        return Handle(values.astype(stock._get_np_dtype(dst_type)), dst_type.scalar)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        truncates = rounding_mode == stock._ir.ROUNDING_MODE.RTZ
        if truncates or not (is_packed(src.dtype) or is_packed(dst_type)):
            return stock_fp_to_fp(self, src, dst_type, rounding_mode)
        return cast_impl(self, src, dst_type)

    Builder.cast_impl, Builder.create_fp_to_fp = cast_impl, create_fp_to_fp
    Builder.get_bf16 = lambda self, value: pack(np.array([value]), tl.bfloat16)


def _repair_arithmetic() -> None:
    stock_binary, stock_unary, stock_fma = Builder.binary_op, Builder.unary_op, Builder.create_fma

    def binary_op(self, lhs, rhs, op):
        if not is_packed(lhs.dtype):
            result = stock_binary(self, lhs, rhs, op)
            # Stock, a comparison of scalars keeps their type, and is no mask once it is spread.
            return Handle(result.data, tl.int1) if op in _COMPARISONS else result
        values = op(decode(lhs), decode(rhs))
        return Handle(values, tl.int1) if op in _COMPARISONS else pack(values, lhs.dtype)

    def unary_op(self, arg, op):
        if not is_packed(arg.dtype):
            return stock_unary(self, arg, op)
        return pack(op(decode(arg)), arg.dtype)

    def create_fma(self, x, y, z):
        if not is_packed(z.dtype):
            return stock_fma(self, x, y, z)
        return pack(decode(x).astype(np.float64) * decode(y) + decode(z), z.dtype)

    Builder.binary_op, Builder.unary_op, Builder.create_fma = binary_op, unary_op, create_fma


def _repair_dot() -> None:
    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        left, right = decode(a), decode(b)
        if left.dtype == np.int8:
            product = _int8_matmul(left, right)
        else:
            work = np.float64 if left.dtype == np.float64 else np.float32
            with np.errstate(invalid="ignore"):
                product = np.matmul(left.astype(work), right.astype(work))
        return Handle((product + d.data).astype(d.data.dtype), d.dtype.scalar)

    Builder.create_dot = create_dot


def _int8_matmul(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    total = np.zeros((*left.shape[:-1], right.shape[-1]), dtype=np.int32)
    for begin in range(0, left.shape[-1], _EXACT_INT8_TERMS):
        some = slice(begin, begin + _EXACT_INT8_TERMS)
        product = np.matmul(
            left[..., some].astype(np.float32), right[..., some, :].astype(np.float32)
        )
        total += product.astype(np.int32)
    return total


def _repair_reduction(operation: Any) -> None:
    stock_apply: Callable = operation.apply_impl

    def widened(x):
        if not is_packed(x.dtype):
            return x
        kind = tl.block_type(tl.float32, list(x.shape)) if len(x.shape) else tl.float32
        return tl.core.tensor(Handle(decode(x.handle), tl.float32), kind)

    def narrowed(x, dtype):
        if not is_packed(dtype) or is_packed(x.dtype):
            return x
        kind = tl.block_type(dtype, list(x.shape)) if len(x.shape) else dtype
        return tl.core.tensor(pack(x.handle.data, dtype), kind)

    def apply_impl(self, arg):
        inputs = arg if isinstance(arg, tuple) else (arg,)
        if not any(is_packed(x.dtype) for x in inputs):
            return stock_apply(self, arg)
        result = stock_apply(self, tuple(widened(x) for x in inputs))
        if not isinstance(result, (tuple, list)):
            return narrowed(result, inputs[0].dtype)
        return tuple(narrowed(x, y.dtype) for x, y in zip(result, inputs, strict=False))

    operation.apply_impl = apply_impl


def _repair_scalar_index() -> None:
    """Triton 3.6 cannot use a one-element array as a loop bound under numpy 2.4 or newer."""
    stock_patch = stock._patch_lang_tensor

    def patch_lang_tensor(tensor, *scope):
        stock_patch(tensor, *scope)

        def index(self):
            return int(np.asarray(self.handle.data).reshape(-1)[0])

        if scope:
            scope[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index

    stock._patch_lang_tensor = patch_lang_tensor
