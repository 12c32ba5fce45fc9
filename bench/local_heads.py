"""Heads of a video that aggregate locally, each along axes of its own, and the masks that fit them.

Constructed, not recorded: a head's score of two tokens is a bell over their distance in (frame,
row, column), wide along the axes that its order puts innermost, plus noise; values are a smooth
field over the video, plus noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from permattn.core.axis_order import AXIS_ORDERS, Grid, cells_in_order
from permattn.core.plan import ceil_div
from torch import Tensor

# Scores fall from here to nothing over the widths of a head.
PEAK = 10.0
NARROW, MIDDLE = 2.5, 3.0
OUTLIER = 4.0


def grid_of(num_tokens: int) -> Grid:
    """A grid of that many tokens, for a power of two: 16,384 = 16 x 32 x 32."""
    frames = 1 << max(num_tokens.bit_length() - 1, 0) // 3
    height = 1 << int(math.log2(max(num_tokens // frames, 1))) // 2
    return frames, height, num_tokens // frames // height


def widths(grid: Grid, order: int) -> tuple[float, ...]:
    """How far a head of that order looks along (frame, row, column): far along its inner axis."""
    outer, middle, inner = ("FHW".index(axis) for axis in AXIS_ORDERS[order])
    found = [0.0] * 3
    found[outer], found[middle], found[inner] = NARROW, MIDDLE, max(4.0, grid[inner] / 4)
    return tuple(found)


def block_mask(grid: Grid, order: int, density: float, block: tuple[int, int]) -> Tensor:
    """bool [nq, nk]: `density` of every row's blocks, the nearest ones and the row's own.

    Distances are those between the centres of blocks, in widths of the head, averaged where a block
    wraps round a line.
    """
    place = _coordinates(grid)[cells_in_order(grid, torch.tensor([order]))[0].long()]
    place = place / torch.tensor(widths(grid, order))
    (q, q_spread), (k, k_spread) = (_centres(place, size) for size in block)
    near = -((q[:, None] - k) ** 2 / (1 + q_spread[:, None] + k_spread)).sum(-1)
    count = max(1, round(density * len(k)))
    mask = torch.zeros(near.shape, dtype=torch.bool)
    mask.scatter_(1, near.topk(count, dim=1).indices, True)
    return mask


def inputs(
    grid: Grid,
    orders: Sequence[int],
    head_dim: int,
    *,
    text: int = 0,
    outliers: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [1, H, text + N, head_dim]; text first.

    Args:
        outliers: one channel of Q is OUTLIER times as large, two of K have an offset common to
            all tokens, one of V is ten times as large: what trained models show.
    """
    generator = torch.Generator().manual_seed(seed)
    n = grid[0] * grid[1] * grid[2]
    shape = (1, len(orders), text + n, head_dim)
    q, k, v = (0.1 * torch.randn(shape, generator=generator) for _ in range(3))
    q[:, :, :text] *= 10
    k[:, :, :text] *= 10
    v[:, :, :text] *= 10
    size = (PEAK * head_dim**0.5) ** 0.5
    for h, order in enumerate(orders):
        frequency = torch.randn(3, head_dim // 2, generator=generator)
        frequency /= torch.tensor(widths(grid, order))[:, None]
        angle = _coordinates(grid) @ frequency
        code = torch.cat((angle.cos(), angle.sin()), -1) / (head_dim // 2) ** 0.5
        q[0, h, text:] += size * code
        k[0, h, text:] += size * code
        v[0, h, text:] += 0.2 * torch.randn(n, head_dim, generator=generator)
        v[0, h, text:] += _smooth_field(grid, head_dim, generator)
    if outliers:
        q[..., 3] *= OUTLIER
        k[..., 1] += 8.0
        k[..., head_dim // 2] -= 5.0
        v[..., 5] *= 10.0
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _coordinates(grid: Grid) -> Tensor:
    """float32 [N, 3], in raster order."""
    axes = [torch.arange(size, dtype=torch.float32) for size in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)


def _centres(place: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of the places of every block, [blocks, 3] each."""
    number = torch.arange(len(place)) // block
    count = torch.bincount(number)[:, None]

    def mean(x: Tensor) -> Tensor:
        sums = torch.zeros(ceil_div(len(place), block), 3)
        return sums.index_add_(0, number, x) / count

    centre = mean(place)
    return centre, (mean(place**2) - centre**2).clamp_min(0)


def _smooth_field(grid: Grid, channels: int, generator: torch.Generator) -> Tensor:
    """[N, channels] of unit variance: coarse noise, interpolated."""
    coarse = [max(2, ceil_div(size, 4)) for size in grid]
    x = torch.randn(1, channels, *coarse, generator=generator)
    x = torch.nn.functional.interpolate(x, size=grid, mode="trilinear", align_corners=True)
    return (x / x.std()).flatten(2)[0].T
