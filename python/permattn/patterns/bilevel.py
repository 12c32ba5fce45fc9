"""Bi-level routing as an AttnPlan: for sequences that hold a grid of visual tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from permattn.bilevel import PadMode, cut_regions, route_regions
from permattn.core import AttnPart, AttnPlan, BlockIndex, Permutation, TokenBand, TokenGrid
from permattn.core.regions import RegionGrid


def plan_bilevel(
    q: Tensor,
    k: Tensor,
    grid: TokenGrid,
    regions: Sequence[int],
    topk: int,
    *,
    pad_mode: PadMode = None,
) -> AttnPlan:
    """Every region of the grid sees the `topk` regions that are most alike; all heads the same.

    The same pairs as `bilevel_routing_attention`, in the engine's general form: a plan can be
    saved, drawn, counted and quantised, and runs on every backend. Kernels that know regions are
    faster where regions are small.

    Source: BiFormer (arXiv 2303.08810), section 3.2.

    Args:
        q: [B, Hq, S, D].
        k: [B, Hkv, S, D]; Hq % Hkv == 0: a key head counts once per query head in the means.
        grid: all S tokens, in raster order.
        regions: regions per axis, (H, W) for one frame or (T, H, W).
        topk: regions that a region sees.
        pad_mode: None: regions must divide the grid; "mask": the last ones may be smaller.

    Returns: a plan of one part, blocks of one region.

    Raises:
        ValueError: shapes, regions or topk that do not fit; names the argument.

    Invariants: nothing waits for the device.
    """
    for name, x in (("q", q), ("k", k)):
        if x.dim() != 4 or x.shape[2] != grid.num_tokens:
            raise ValueError(
                f"{name}: wants [B, H, S, D] of the grid's {grid.num_tokens} tokens, got "
                f"{list(x.shape)}"
            )
    if grid.start != 0 or grid.frame_starts is not None:
        raise ValueError("grid: wants all tokens of the sequence, without text before or between")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"k: Hq % Hkv must be 0, got Hq = {q.shape[1]}, Hkv = {k.shape[1]}")
    if pad_mode == "zero":
        raise ValueError("pad_mode: a plan has no keys of zeros; wants None or 'mask', got 'zero'")
    sizes = (grid.frames, grid.height, grid.width)
    if len(regions) == 2:
        if grid.frames != 1:
            raise ValueError(
                f"regions: wants (T, H, W) for {grid.frames} frames, got {tuple(regions)}"
            )
        regions = (1, *regions)
    cut = cut_regions(sizes, regions, pad_mode=pad_mode)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    maps = (x.unflatten(2, sizes).permute(0, 2, 3, 4, 1, 5) for x in (q, k))
    graph, _ = route_regions(*maps, region_size=cut.box, topk=topk, pad_mode="mask")
    return plan_region_graph(graph[:, None], cut)


def plan_region_graph(graph: Tensor, grid: RegionGrid) -> AttnPlan:
    """The plan of a graph whose rows name no region twice.

    Args:
        graph: int32 [Bx, Hx, R, topk], values 0..R-1 (not looked at).
        grid: how the tokens, in raster order, are cut; cells outside the map are holes.
    """
    size = grid.tokens_per_region
    token = grid.token_of_slot(graph.device)[None, None]
    perm = Permutation.from_token_of_slot(token, grid.num_tokens, validate=False)
    whole = (token.view(-1, size) >= 0).all(-1)[graph.long()]
    # Full blocks come first in a row.
    order = whole.int().argsort(dim=-1, descending=True, stable=True)
    rows, topk = graph.shape[2:]
    offsets = torch.arange(rows + 1, dtype=torch.int32, device=graph.device) * topk
    index = BlockIndex(
        graph.gather(-1, order).flatten(2),
        offsets.expand(*graph.shape[:2], -1).contiguous(),
        whole.sum(-1, dtype=torch.int32),
        size,
        size,
    )
    return AttnPlan((AttnPart(perm, perm, index, TokenBand()),), validate=False)
