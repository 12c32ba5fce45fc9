"""Planners that keep every pair, in an order that only a right layout can undo."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from permattn.core import AttnPart, AttnPlan, BlockIndex, Permutation, Segment, TokenBand, TokenGrid
from permattn.core.plan import ceil_div
from torch import Tensor

BLOCK = 16


def plan_everything(
    q: Tensor,
    k: Tensor,
    rows: Sequence[Sequence[Segment]],
    heads: Sequence[object],
    *,
    left_pad: Sequence[int] | None = None,
    right_pad: Sequence[int] | None = None,
) -> AttnPlan:
    """Lower-right causal attention over all real tokens, visual ones in (h, w, frame) order.

    Equals dense attention only if pads, offset and length are right; a grid that does not fit in
    the sequence raises.
    """
    batch, sq, skv = q.shape[0], q.shape[2], k.shape[2]
    assert len(rows) == batch and len(heads) == q.shape[1]
    shift = skv - sq
    kv_rows, q_rows = [], []
    for b in range(batch):
        order = torch.arange(skv)
        for grid in rows[b]:
            if isinstance(grid, TokenGrid):
                token = grid.token_of_rank()
                assert int(token[-1]) < skv, f"{grid} in a sequence of {skv}"
                size = (grid.frames, grid.height, grid.width)
                order[token] = token.view(size).permute(1, 2, 0).reshape(-1)
        first = left_pad[b] if left_pad is not None else 0
        last = skv - (right_pad[b] if right_pad is not None else 0)
        order[(order < first) | (order >= last)] = -1
        kv_rows.append(order)
        mine = torch.where(order >= shift, order - shift, -1)
        # Queries keep the keys' order; slots of keys that are no queries become holes.
        q_rows.append(mine)
    kv_perm = Permutation.from_token_of_slot(torch.stack(kv_rows)[:, None], skv)
    q_perm = Permutation.from_token_of_slot(torch.stack(q_rows)[:, None], sq)
    nq, nkv = ceil_div(q_perm.num_slots, BLOCK), ceil_div(skv, BLOCK)
    index = BlockIndex.from_block_mask(torch.ones(nq, nkv, dtype=torch.bool), BLOCK, BLOCK)
    return AttnPlan((AttnPart(q_perm, kv_perm, index, TokenBand(min_lag=-shift)),))
