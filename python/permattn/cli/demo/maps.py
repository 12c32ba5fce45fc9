"""Down-sampled attention maps: what a head does, and what its plan keeps. Never N x N."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from permattn.core import AttnPart, AttnPlan

_TILE_VALUES = 1 << 22


@dataclass(frozen=True)
class Window:
    """A square of the causal map, cut into cells.

    Args:
        start, stop: token range of both axes.
        cell: tokens per cell, along both axes.
    """

    start: int
    stop: int
    cell: int

    @property
    def cells(self) -> int:
        return -(-(self.stop - self.start) // self.cell)


def attention_map(q: Tensor, k: Tensor, window: Window, scale: float) -> Tensor:
    """The softmax of one head, mean over the rows of a cell and sum over its keys.

    Args:
        q, k: [S, D] of one head, causal.

    Returns: float32 [cells, cells] on the CPU; with a window over all tokens every row sums to 1.
    """
    out = torch.zeros(window.cells, window.cells, device=q.device)
    stop = min(window.stop, q.shape[0])
    rows = max(window.cell, _TILE_VALUES // max(stop, 1) // window.cell * window.cell)
    key = torch.arange(stop, device=q.device)
    for first in range(window.start, stop, rows):
        last = min(first + rows, stop)
        score = (q[first:last].float() @ k[:last].float().mT) * scale
        row = torch.arange(first, last, device=q.device)
        score.masked_fill_(key[:last] > row[:, None], float("-inf"))
        p = torch.softmax(score, -1)[:, window.start :]
        out[cell_range(window, first, last)] += _pool(p, window, out.shape[1])
    counts = torch.full((window.cells, 1), window.cell, device=q.device)
    counts[-1] = (stop - window.start) - (window.cells - 1) * window.cell
    return (out / counts).cpu()


def cell_range(window: Window, first: int, last: int) -> slice:
    """Cells of rows [first, last); `first` lies on a cell's edge."""
    return slice((first - window.start) // window.cell, -(-(last - window.start) // window.cell))


def plan_map(plan: AttnPlan, head: int, window: Window) -> Tensor:
    """Share of every cell's causal pairs that the plan keeps for one head (batch row 0).

    Returns: float32 [cells, cells] on the CPU, in [0, 1]; NaN above the diagonal.
    """
    kept = torch.zeros(window.cells**2, device=plan.device)
    for part in plan.parts:
        _count_part(part, head, window, kept)
    edge = torch.arange(window.start, window.stop, device=plan.device)
    cell = (edge - window.start) // window.cell
    size = torch.bincount(cell, minlength=window.cells).float()
    causal = size[:, None] * size
    causal = causal.tril(-1) + torch.diag(size * (size + 1) / 2)
    share = kept.view(window.cells, window.cells) / causal
    return share.masked_fill(causal == 0, float("nan")).cpu()


def _pool(p: Tensor, window: Window, cells: int) -> Tensor:
    rows, keys = p.shape
    pad = (0, cells * window.cell - keys, 0, -rows % window.cell)
    p = torch.nn.functional.pad(p, pad)
    return p.view(-1, window.cell, cells, window.cell).sum((1, 3))


def _count_part(part: AttnPart, head: int, window: Window, kept: Tensor) -> None:
    """Adds the visible pairs of one part, a few thousand listed blocks at a time."""
    q_token = _of_head(part.q_perm.token_of_slot, head)
    kv_token = _of_head(part.kv_perm.token_of_slot, head)
    index = part.index
    offsets = _of_head(index.row_offsets, head).long()
    entries = int(offsets[-1])
    listed = _of_head(index.kv_indices, head)[:entries].long()
    entry = torch.arange(entries, device=listed.device)
    row = torch.searchsorted(offsets, entry, right=True) - 1
    full = entry - offsets[row] < _of_head(index.kv_num_full, head).long()[row]
    q_blocks = _blocks(q_token, index.block_q)
    kv_blocks = _blocks(kv_token, index.block_kv)
    step = max(1, _TILE_VALUES // (index.block_q * index.block_kv))
    band = part.band
    for i in range(0, entries, step):
        here = slice(i, i + step)
        q, kv = q_blocks[row[here]][:, :, None], kv_blocks[listed[here]][:, None, :]
        lag = q - kv
        seen = torch.ones_like(lag, dtype=torch.bool)
        if band.min_lag is not None:
            seen &= lag >= band.min_lag
        if band.max_lag is not None:
            seen &= lag < band.max_lag
        seen |= full[here, None, None]
        low, high = window.start, window.stop
        seen &= (q >= max(low, 0)) & (q < high) & (kv >= max(low, 0)) & (kv < high)
        cell = (q - low) // window.cell * window.cells + (kv - low) // window.cell
        kept += torch.bincount(cell[seen].flatten(), minlength=kept.numel())


def _of_head(values: Tensor, head: int) -> Tensor:
    return values[0, min(head, values.shape[1] - 1)].contiguous()


def _blocks(token: Tensor, block: int) -> Tensor:
    """int64 [num_blocks, block], padded with -1."""
    pad = -token.shape[0] % block
    return torch.nn.functional.pad(token, (0, pad), value=-1).long().view(-1, block)
