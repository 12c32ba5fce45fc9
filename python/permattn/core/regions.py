"""Regions: a map of tokens cut into boxes, and attention from box to listed boxes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from permattn.core.plan import ceil_div

Sizes = tuple[int, int, int]


@dataclass(frozen=True)
class RegionGrid:
    """A map of (frames, rows, columns) tokens cut into boxes; the last ones may hang over.

    Regions and the tokens in them are numbered in raster order. All addresses are closed forms:
    slot `r * tokens_per_region + t` is cell `t` of the box of region `r`.

    Args:
        size: tokens per axis; an image has one frame.
        box: tokens of a region per axis.

    Invariants: every region holds at least one token of the map.
    """

    size: Sizes
    box: Sizes

    @property
    def counts(self) -> Sizes:
        """Regions per axis."""
        t, h, w = (ceil_div(n, b) for n, b in zip(self.size, self.box, strict=True))
        return t, h, w

    @property
    def num_regions(self) -> int:
        t, h, w = self.counts
        return t * h * w

    @property
    def tokens_per_region(self) -> int:
        t, h, w = self.box
        return t * h * w

    @property
    def num_tokens(self) -> int:
        t, h, w = self.size
        return t * h * w

    @property
    def hangs_over(self) -> bool:
        """Whether some box has cells outside the map."""
        return any(n % b for n, b in zip(self.size, self.box, strict=True))

    def token_of_slot(self, device: torch.device | str = "cpu") -> Tensor:
        """int32 [num_regions * tokens_per_region]: region-major order; -1 = outside the map."""
        axes = []
        for n, b, count in zip(self.size, self.box, self.counts, strict=True):
            cell = torch.arange(count * b, dtype=torch.int32, device=device)
            axes.append(torch.where(cell < n, cell, -1).view(count, b))
        t, h, w = axes
        t = t[:, None, None, :, None, None]
        h = h[None, :, None, None, :, None]
        w = w[None, None, :, None, None, :]
        token = (t * self.size[1] + h) * self.size[2] + w
        return torch.where((t < 0) | (h < 0) | (w < 0), -1, token).reshape(-1)


@dataclass(frozen=True)
class RegionProblem:
    """The static facts on which a backend decides whether it can attend from region to region."""

    device_type: str
    dtype: torch.dtype
    head_dim: int
    head_dim_v: int


@dataclass(frozen=True, eq=False)
class RegionArgs:
    """The checked arguments of one call; see `permattn.bilevel.bilevel_routing_attention`.

    Every query of a region sees the keys of the regions in the region's row of the graph, under one
    softmax: score = scale * weight * (q . k), value = weight * v. A region that stands in a row
    twice counts twice.

    Args:
        q: [B, M, T, H, W, D], any strides, the last one too.
        k: [B, M, Tk, Hk, Wk, D], any strides; another map where the sizes differ.
        v: [B, M, Tk, Hk, Wk, Dv], any strides.
        graph: int32 [B or 1, M or 1, Rq, k], contiguous, key regions; a value outside 0..Rkv-1 is
            seen by nobody (front doors refuse it where they can look).
        weights: float32 (float64 beside float64 q) [B or 1, M or 1, Rq, k], contiguous; None = 1.
        q_box, kv_box: tokens of a region per axis; boxes of the far edges may hang over the map.
        count_padding: cells of key boxes outside the map count as keys of zeros (score 0, value 0)
            in place of being hidden.
        scale: multiplies q . k.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    graph: Tensor
    weights: Tensor | None
    q_box: Sizes
    kv_box: Sizes
    count_padding: bool
    scale: float

    @property
    def q_grid(self) -> RegionGrid:
        return RegionGrid(_sizes(self.q), self.q_box)

    @property
    def kv_grid(self) -> RegionGrid:
        return RegionGrid(_sizes(self.k), self.kv_box)


@dataclass(frozen=True, eq=False)
class RegionBwdArgs:
    """The forward's arguments and results, and the gradients of both results.

    out, dout [B, M, T, H, W, Dv], any strides; lse, dlse float32 (float64 for float64) [B, M, T, H,
    W], natural log. dlse is 0 where lse is -inf.
    """

    args: RegionArgs
    out: Tensor
    lse: Tensor
    dout: Tensor
    dlse: Tensor


# dq, dk, dv in the shapes and dtypes of q, k, v, and dweights in the shape and dtype of weights.
RegionGradients = tuple[Tensor, Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class RouteProblem:
    """The static facts on which a backend decides whether it can route."""

    device_type: str
    dtype: torch.dtype
    num_channels: int
    topk: int


@dataclass(frozen=True, eq=False)
class RouteArgs:
    """The checked arguments of one routing; see `permattn.bilevel.route_regions`.

    mean(r) = mean of a box over its cells inside the map, all heads' channels side by side, in
    float32 (float64 for float64). affinity(r, j) = scale * mean_q(r) . mean_k(j). The result is the
    `topk` largest of every row, descending; among equals the lower number comes first.

    Args:
        q, k: [B, M, T, H, W, D], any strides, the last one too.
        q_box, kv_box: tokens of a region per axis.
        topk: 1..Rkv.
        scale: multiplies the affinity.
    """

    q: Tensor
    k: Tensor
    q_box: Sizes
    kv_box: Sizes
    topk: int
    scale: float

    @property
    def q_grid(self) -> RegionGrid:
        return RegionGrid(_sizes(self.q), self.q_box)

    @property
    def kv_grid(self) -> RegionGrid:
        return RegionGrid(_sizes(self.k), self.kv_box)


def empty_region_out(q: Tensor, v: Tensor) -> Tensor:
    """Uninitialised [B, M, T, H, W, Dv] in q's dtype: channels first in memory where q's are.

    Else channels last, heads beside them, so the reshape to [B, T, H, W, M * Dv] is free.
    """
    batch, heads, *size, _ = q.shape
    if q.stride(5) != 1 and q.shape[5] > 1:
        return q.new_empty(batch, heads, v.shape[5], *size).permute(0, 1, 3, 4, 5, 2)
    return q.new_empty(batch, *size, heads, v.shape[5]).permute(0, 4, 1, 2, 3, 5)


def region_means(x: Tensor, grid: RegionGrid) -> Tensor:
    """Mean of every region over its cells inside the map, differentiable.

    Args:
        x: [B, M, T, H, W, D].
        grid: how the map is cut.

    Returns: [B, R, M * D] in float32 (float64 for float64).
    """
    x = x.permute(0, 2, 3, 4, 1, 5).flatten(4)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    pad = [c * b - n for n, b, c in zip(grid.size, grid.box, grid.counts, strict=True)]
    if grid.hangs_over:
        x = torch.nn.functional.pad(x, (0, 0, 0, pad[2], 0, pad[1], 0, pad[0]))
    (nt, nh, nw), (t, h, w) = grid.counts, grid.box
    total = x.reshape(x.shape[0], nt, t, nh, h, nw, w, x.shape[-1]).sum((2, 4, 6)).flatten(1, 3)
    if not grid.hangs_over:
        return total / grid.tokens_per_region
    held = [
        (torch.arange(c, device=x.device) * -b + n).clamp_max(b)
        for n, b, c in zip(grid.size, grid.box, grid.counts, strict=True)
    ]
    cells = held[0][:, None, None] * held[1][:, None] * held[2]
    return total / cells.reshape(-1, 1)


def top_regions(affinity: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The `topk` largest entries of every row, descending; the lower number first among equals.

    Args:
        affinity: [..., Rkv], differentiable.

    Returns: (graph int32 [..., topk], their values [..., topk]).
    """
    values, graph = affinity.sort(dim=-1, descending=True, stable=True)
    return graph[..., :topk].int(), values[..., :topk]


def reverse_graph(graph: Tensor, num_kv_regions: int) -> tuple[Tensor, Tensor]:
    """Who looks at a region: compressed rows of static size, in ascending order.

    Args:
        graph: int32 [Bx, Hx, Rq, k].

    Returns: (offsets int32 [Bx, Hx, Rkv + 1], entries int32 [Bx, Hx, Rq * k]): entry `e` of row j
    is number `r * k + s` of a place of the graph that names j; places that name no region come
    behind the last row.
    """
    flat = graph.flatten(2).long()
    flat = torch.where((flat < 0) | (flat >= num_kv_regions), num_kv_regions, flat)
    entries = flat.argsort(dim=-1, stable=True).int()
    degree = flat.new_zeros(*flat.shape[:2], num_kv_regions + 1)
    degree.scatter_add_(-1, flat, torch.ones_like(flat))
    offsets = torch.nn.functional.pad(degree[..., :-1].cumsum(-1), (1, 0))
    return offsets.int(), entries


def _sizes(x: Tensor) -> Sizes:
    return x.shape[2], x.shape[3], x.shape[4]
