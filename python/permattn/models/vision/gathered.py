"""Bi-level routing attention in plain torch operators: for export, and to look at what is seen.

Keys are gathered and scores written out, so it needs the memory that the operators save.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from permattn.core.regions import RegionGrid, region_means


def route_gathered(
    q: Tensor, k: Tensor, grid: RegionGrid, topk: int, scale: float
) -> tuple[Tensor, Tensor]:
    """`route_regions` in operators that every exporter knows; ties fall as torch.topk lets them.

    Args:
        q, k: [B, T, H, W, M, D].

    Returns: (graph int64 [B, R, topk], affinities [B, R, topk], descending), detached.
    """
    mean_q, mean_k = (region_means(x.detach().permute(0, 4, 1, 2, 3, 5), grid) for x in (q, k))
    values, graph = (mean_q * scale @ mean_k.mT).topk(topk, -1)
    return graph, values


def attend_gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    graph: Tensor,
    grids: tuple[RegionGrid, RegionGrid],
    *,
    weights: Tensor | None,
    count_padding: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of every region to its listed regions, and the probabilities.

    Args:
        q: [B, T, H, W, M, D].
        k: [B, Tk, Hk, Wk, M, D].
        v: [B, Tk, Hk, Wk, M, Dv].
        graph: integer [B, R, topk], one for all heads.
        grids: of q's map and of k's.
        weights: [B, R, topk] for soft routing, or None.
        count_padding: cells of key boxes outside the map are keys of zeros in place of hidden.
        scale: multiplies q . k.

    Returns: (out [B, T, H, W, M, Dv], probabilities [B, R, M, n, topk * nk]).
    """
    q_grid, kv_grid = grids
    rows, keys, values = _to_regions(q, q_grid), _to_regions(k, kv_grid), _to_regions(v, kv_grid)
    batch, regions, topk = graph.shape
    first = torch.arange(batch, device=graph.device)[:, None, None] * kv_grid.num_regions
    flat = (graph + first).flatten()

    def pick(x: Tensor) -> Tensor:
        """[B, Rkv, M, nk, D] -> [B, R, M, topk * nk, D]."""
        x = x.flatten(0, 1).index_select(0, flat).unflatten(0, (batch, regions, topk))
        if weights is not None:
            x = x * weights.to(x.dtype)[..., None, None, None]
        return x.transpose(2, 3).flatten(3, 4)

    scores = (rows @ pick(keys).mT) * scale
    if kv_grid.hangs_over and not count_padding:
        seen = (kv_grid.token_of_slot(q.device) >= 0).view(kv_grid.num_regions, -1)
        scores = scores.masked_fill(~seen[graph.long()].flatten(2)[:, :, None, None], float("-inf"))
    attn = scores.softmax(-1)
    return _to_map(attn @ pick(values), q_grid), attn


def _to_regions(x: Tensor, grid: RegionGrid) -> Tensor:
    """[B, T, H, W, M, D] -> [B, R, M, n, D]; zeros outside the map."""
    (nt, nh, nw), (t, h, w) = grid.counts, grid.box
    if grid.hangs_over:
        pad = [c * b - n for n, b, c in zip(grid.size, grid.box, grid.counts, strict=True)]
        x = F.pad(x, (0, 0, 0, 0, 0, pad[2], 0, pad[1], 0, pad[0]))
    x = x.reshape(x.shape[0], nt, t, nh, h, nw, w, *x.shape[4:])
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6, 8).flatten(5, 7).flatten(1, 3)


def _to_map(rows: Tensor, grid: RegionGrid) -> Tensor:
    """The inverse of `_to_regions`."""
    x = rows.unflatten(3, grid.box).unflatten(1, grid.counts).permute(0, 1, 5, 2, 6, 3, 7, 4, 8)
    x = x.flatten(5, 6).flatten(3, 4).flatten(1, 2)
    t, h, w = grid.size
    return x[:, :t, :h, :w]
