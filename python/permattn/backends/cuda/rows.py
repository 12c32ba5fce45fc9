"""Rows made ready by the kernels: transformed, permuted, quantised; statistics of columns."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from permattn.core.prepare import PrepareArgs
from permattn.core.prologue import Prologue, RowTransform, pack_prologue

# The numbers of csrc/common/quant.h.
FORMATS = ("none", "int8", "int4", "fp8")
Layout = Literal["rows", "nibbles", "fragments"]
_LAYOUTS: dict[Layout, int] = {"rows": 0, "nibbles": 5, "fragments": 6}
ALIGNMENT = 16
# csrc/cuda/permute/prepare.h: kMaxRowsPerScale.
MAX_ROWS_PER_SCALE = 128


class Made(NamedTuple):
    """Rows in a layout, and their scales (None for the format "none").

    Args:
        rows: [B, Hp, n, D]; nibbles [B, Hp, n, D / 2]; fragments [B, Hp, groups, D, bytes].
        scale: float32 [B, Hp, groups], or [B, Hp, groups, D] per column.
    """

    rows: Tensor
    scale: Tensor | None


def aligned(x: Tensor) -> Tensor:
    """x, or a copy of it where rows do not start at multiples of 16 bytes."""
    step = ALIGNMENT // x.element_size()
    strides = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    if (
        x.stride(-1) == 1
        and all(size == 1 or stride % step == 0 for size, stride in strides)
        and x.data_ptr() % ALIGNMENT == 0
    ):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def last_stride_one(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def make_rows(
    args: PrepareArgs,
    layout: Layout = "rows",
    *,
    against: Tensor | None = None,
    dots: Tensor | None = None,
) -> Made:
    """One reading of x, one writing of the result. No sync.

    Args:
        against: float32 [B, Hk, D], Hk divides H: also write the products of the transformed rows
            with it to `dots`, float32 [B, H, S], of the tokens that stand in a slot.
    """
    made = _empty(args, layout)
    torch.ops.permattn_native.cuda_prepare.default(
        *(last_stride_one(args.x), _optional_rows(args.token_of_slot)),
        *_packed(args.transform),
        *(_dense(x) for x in (args.mean, args.factor, against)),
        *(dots, FORMATS.index(args.fmt), args.rows_per_scale if args.fmt != "none" else 1),
        *(args.per_column, _LAYOUTS[layout], made.rows, made.scale),
    )
    return made


def column_statistics(
    x: Tensor, transform: RowTransform | None, seen: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum, minimum and maximum of transformed columns, float32 [B, H, D], over the tokens of `seen`
    (bool [1 or B, 1 or H, S]; None = all)."""
    shape = (x.shape[0], x.shape[1], x.shape[3])
    total, low, high = (x.new_empty(shape, dtype=torch.float32) for _ in range(3))
    torch.ops.permattn_native.cuda_column_statistics.default(
        *(last_stride_one(x), *_packed(transform), seen, total, low, high)
    )
    return total, low, high


def _empty(args: PrepareArgs, layout: Layout) -> Made:
    x, fmt, n = args.x, args.format, args.num_slots
    batch, dim = x.shape[0], x.shape[3]
    if fmt is None:
        return Made(x.new_empty((batch, args.num_heads, n, dim)), None)
    groups = -(-n // args.rows_per_scale)
    shape: tuple[int, ...] = (batch, args.num_heads, n, dim)
    if layout == "nibbles":
        shape = (*shape[:3], dim // 2)
    elif layout == "fragments":
        size = args.rows_per_scale // 2 if args.fmt == "int4" else args.rows_per_scale
        shape = (batch, args.num_heads, groups, dim, size)
    scale = (batch, args.num_heads, groups, *([dim] if args.per_column else []))
    return Made(x.new_empty(shape, dtype=fmt.dtype), x.new_empty(scale, dtype=torch.float32))


def _packed(transform: RowTransform | None) -> tuple[list[Tensor], list[int], list[float]]:
    """A transform in flat form, its tensors contiguous float32."""
    if transform is None:
        return [], [], []
    tensors, ints, floats = pack_prologue(Prologue(transform))
    return [x.to(torch.float32).contiguous() for x in tensors], ints, floats


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else aligned(x.contiguous())


def _optional_rows(x: Tensor | None) -> Tensor | None:
    return None if x is None else last_stride_one(x)
