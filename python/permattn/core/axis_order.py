"""The six orders in which the tokens of a (frames, height, width) grid can be read."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Axis nestings, outermost first; a plan names them by their place here.
AXIS_ORDERS = ("FHW", "FWH", "HWF", "HFW", "WHF", "WFH")
NATIVE_ORDER = len(AXIS_ORDERS)
ORDER_NAMES = (*AXIS_ORDERS, "native")
_AXES = tuple(tuple("FHW".index(axis) for axis in name) for name in AXIS_ORDERS)

Grid = tuple[int, int, int]


def candidate_orders(grid: Grid) -> tuple[int, ...]:
    """Orders that differ on a grid: six of a video, two of an image, one of a single line.

    Of orders that read a grid alike the lowest number stands for all.
    """
    seen: dict[tuple[int, ...], int] = {}
    for number, axes in enumerate(_AXES):
        seen.setdefault(tuple(axis for axis in axes if grid[axis] > 1), number)
    return tuple(seen.values())


def cells_in_order(grid: Grid, orders: Tensor) -> Tensor:
    """Which cell of the raster stands at every place of an order.

    Source: PAROAttention (arXiv 2506.16054), section 3.1; a closed form, all heads at once.

    Args:
        grid: (frames, height, width); cell (f, h, w) has the raster number (f * height + h) * width
            + w.
        orders: integer [...], numbers of AXIS_ORDERS.

    Returns: int32 [..., N], N = frames * height * width.
    """
    place = torch.arange(math.prod(grid), dtype=torch.int32, device=orders.device)
    sizes, strides = _sizes_and_strides(grid, orders)
    middle, inner = sizes[..., 1:2], sizes[..., 2:3]
    outer_index, rest = place // (middle * inner), place % (middle * inner)
    index = (outer_index, rest // inner, rest % inner)
    return sum(i * strides[..., n : n + 1] for n, i in enumerate(index))  # type: ignore[return-value]


def places_in_order(grid: Grid, orders: Tensor) -> Tensor:
    """The inverse of `cells_in_order`: at which place of an order every raster cell stands.

    Returns: int32 [..., N].
    """
    cell = torch.arange(math.prod(grid), dtype=torch.int32, device=orders.device)
    sizes, strides = _sizes_and_strides(grid, orders)
    index = [cell // strides[..., n : n + 1] % sizes[..., n : n + 1] for n in range(3)]
    return (index[0] * sizes[..., 1:2] + index[1]) * sizes[..., 2:3] + index[2]


def _sizes_and_strides(grid: Grid, orders: Tensor) -> tuple[Tensor, Tensor]:
    """int32 [..., 3] each: sizes and raster strides of an order's axes, outermost first."""
    frames, height, width = grid
    axes = torch.tensor(_AXES, device=orders.device)[orders.long()]
    sizes = torch.tensor((frames, height, width), dtype=torch.int32, device=orders.device)
    strides = torch.tensor((height * width, width, 1), dtype=torch.int32, device=orders.device)
    return sizes[axes], strides[axes]
