"""Choosing lines: which columns, diagonals and grid lines each head keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from permattn.patterns.mminference.config import HeadPattern
from permattn.patterns.mminference.probe import (
    Probe,
    column_mass,
    diagonal_mass,
    make_probe,
    slash_mass,
    vertical_mass,
)
from permattn.patterns.mminference.prompt import Prompt, VideoGrid

# What "auto" asks of a line, as shares of the probe's mass. Everything kept must hold several times
# what chance would give it. Grid lines must hold some mass at all, and a good part of a vertical
# line's keys must carry it: a few strong keys are columns. A column or diagonal must hold a quarter
# of what it would if all mass were spread evenly.
MIN_GRID_EXCESS = 0.03
MIN_SPREAD = 0.25
MIN_TIMES_MEAN = 4.0
MIN_TIMES_EVEN = 0.25


@dataclass(frozen=True, eq=False)
class GridLines:
    """The lines of one video: per head a stride (0 = no lines of that kind) and a phase.

    Args:
        grid: the video.
        v_stride, v_phase: int32 [Hq]: keys of rank v_phase modulo v_stride (also the rows, for h).
        s_stride, s_phase: int32 [Hq]: pairs whose rank difference is s_phase modulo s_stride.
        strides: all candidates, for static bounds.
    """

    grid: VideoGrid
    v_stride: Tensor
    v_phase: Tensor
    s_stride: Tensor
    s_phase: Tensor
    strides: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Lines:
    """What the probe chose for all heads of a layer.

    Args:
        columns: bool [B, Hq, Skv]: keys seen by every later row (sink included).
        max_columns: a static bound on columns per head.
        rows: bool [B, Hq, Sq]: queries that see every earlier key.
        max_rows: a static bound on rows per head.
        slashes: int64 [B, Hq, n] lags of kept diagonals, -1 = none; n may be 0.
        grids: per batch row the lines of its videos.
    """

    columns: Tensor
    max_columns: int
    rows: Tensor
    max_rows: int
    slashes: Tensor
    grids: tuple[tuple[GridLines, ...], ...]


def choose_lines(q: Tensor, k: Tensor, prompt: Prompt, heads: Sequence[HeadPattern]) -> Lines:
    """Runs the probe (if any head needs it) and picks lines for all heads at once."""
    device = q.device
    batch, num_heads = q.shape[:2]
    columns = _sink_columns(prompt, heads, device)
    max_columns = max(h.sink for h in heads)
    rows, max_rows = _last_rows(prompt, heads, device)
    slashes = torch.full((batch, num_heads, 0), -1, dtype=torch.int64, device=device)
    grids: list[tuple[GridLines, ...]] = [() for _ in range(batch)]
    if any(h.needs_probe for h in heads) and prompt.num_q > 0:
        probe = make_probe(q, k, prompt, visual=True)
        mass = column_mass(probe)
        if any(h.seeks_grid for h in heads):
            grids = [_grid_lines(probe, mass, i, prompt, heads) for i in range(batch)]
            v_columns, v_rows = _grid_masks(grids, prompt, heads, device)
            columns, rows = columns | v_columns, rows | v_rows
            per_row = [sum(-(-g.grid.num_tokens // min(g.strides)) for g in row) for row in grids]
            max_columns += max(per_row)
            max_rows += max(per_row)
        if any(h.seeks_columns for h in heads):
            columns = columns | _top_columns(probe, mass, columns, prompt, heads)
            max_columns += max(h.vertical for h in heads if h.seeks_columns)
        if any(h.seeks_slashes for h in heads):
            slashes = _top_slashes(probe, columns, grids, prompt, heads)
    return Lines(
        columns,
        min(max_columns, prompt.num_kv),
        rows,
        min(max_rows, prompt.num_q),
        slashes,
        tuple(grids),
    )


def per_head(heads: Sequence[HeadPattern], name: str, device: torch.device) -> Tensor:
    """int64 [Hq] (bools as 0 and 1) of one field."""
    return torch.tensor([int(getattr(h, name)) for h in heads], device=device)


def _sink_columns(prompt: Prompt, heads: Sequence[HeadPattern], device: torch.device) -> Tensor:
    key = torch.arange(prompt.num_kv, device=device)
    first = torch.tensor(prompt.first, device=device)[:, None, None]
    stop = torch.tensor(prompt.stop, device=device)[:, None, None]
    sink = per_head(heads, "sink", device)[:, None]
    return (key >= first) & (key < stop) & (key < first + sink)


def _last_rows(
    prompt: Prompt, heads: Sequence[HeadPattern], device: torch.device
) -> tuple[Tensor, int]:
    """Dense rows at the end: bool [B, Hq, Sq] and their static bound."""
    position = torch.arange(prompt.num_q, device=device) + prompt.q_offset
    start = [
        [prompt.tail_start(i, h.last) if h.keeps_last else prompt.stop[i] for h in heads]
        for i in range(prompt.batch)
    ]
    begin = torch.tensor(start, device=device)[..., None]
    stop = torch.tensor(prompt.stop, device=device)[:, None, None]
    bound = max(stop_ - min(row) for stop_, row in zip(prompt.stop, start, strict=True))
    return (position >= begin) & (position < stop), bound


def _grid_lines(
    probe: Probe, mass: Tensor, batch_row: int, prompt: Prompt, heads: Sequence[HeadPattern]
) -> tuple[GridLines, ...]:
    """Stride and phase of every head for every video of one batch row.

    Source: MMInference, Algorithm 1. Deviation: a line is scored by the mass it holds in excess of
    1 / stride, since the plain maximum prefers short strides.
    """
    device = probe.q.device
    names = tuple(dict.fromkeys(s for h in heads if h.seeks_grid for s in h.strides))
    local = min(h.local for h in heads if h.seeks_grid)
    before = probe.first_position[batch_row] - local
    wants = {
        kind: torch.tensor([h.seeks_grid and _wants(h, kind) for h in heads], device=device)
        for kind in ("v", "s")
    }
    forced = torch.tensor([h.pattern == "grid" for h in heads], device=device)
    found = []
    for grid in prompt.grids[batch_row]:
        strides = grid.strides(names)
        if not strides:
            continue
        allowed = torch.tensor(
            [[h.seeks_grid and s in grid.strides(h.strides) for s in strides] for h in heads],
            device=device,
        )
        vertical = vertical_mass(mass[batch_row], grid, strides, before)
        slash = slash_mass(probe, batch_row, grid, strides, before)
        sums = {"v": [total for total, _ in vertical], "s": slash}
        spreads = {
            "v": [spread >= MIN_SPREAD for _, spread in vertical],
            "s": [torch.ones_like(x, dtype=torch.bool) for x in slash],
        }
        chosen: dict[str, Tensor] = {}
        size = torch.tensor(strides, device=device)
        for kind in ("v", "s"):
            best = [x.max(-1) for x in sums[kind]]
            value = torch.stack([x.values for x in best], -1)
            phase = torch.stack([x.indices for x in best], -1)
            pairs = zip(spreads[kind], best, strict=True)
            even = torch.stack([x.gather(-1, y.indices[:, None])[:, 0] for x, y in pairs], -1)
            chance = torch.stack([x.sum(-1) for x in sums[kind]], -1) / size
            worth = even & (value - chance >= MIN_GRID_EXCESS) & (value >= MIN_TIMES_MEAN * chance)
            score = torch.where(allowed & (forced[:, None] | worth), value - chance, -1.0)
            # Ties go to the first candidate, as max does.
            excess, pick = score.max(-1)
            use = wants[kind] & (excess >= 0)
            chosen[f"{kind}_stride"] = torch.where(use, size[pick], 0).int()
            chosen[f"{kind}_phase"] = phase.gather(-1, pick[:, None])[:, 0].int()
        found.append(GridLines(grid, strides=strides, **chosen))
    return tuple(found)


def _wants(head: HeadPattern, kind: str) -> bool:
    return head.s if kind == "s" else (head.v or head.h)


def _grid_masks(
    grids: Sequence[tuple[GridLines, ...]],
    prompt: Prompt,
    heads: Sequence[HeadPattern],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Vertical lines as columns bool [B, Hq, Skv], horizontal lines as rows bool [B, Hq, Sq]."""
    shape = (prompt.batch, len(heads), prompt.num_kv)
    columns = torch.zeros(shape, dtype=torch.bool, device=device)
    rows = torch.zeros(shape, dtype=torch.bool, device=device)
    wants_v, wants_h = (per_head(heads, name, device).bool()[:, None] for name in ("v", "h"))
    for i, row in enumerate(grids):
        for lines in row:
            rank = torch.arange(lines.grid.num_tokens, device=device, dtype=torch.int32)
            stride = lines.v_stride[:, None]
            on_line = (stride > 0) & (rank % stride.clamp_min(1) == lines.v_phase[:, None])
            token = lines.grid.token_of_rank.long()
            columns[i, :, token] |= on_line & wants_v
            rows[i, :, token] |= on_line & wants_h
    return columns, rows[..., prompt.q_offset :]


def _top_columns(
    probe: Probe, mass: Tensor, taken: Tensor, prompt: Prompt, heads: Sequence[HeadPattern]
) -> Tensor:
    """The strongest columns that are not taken, bool [B, Hq, Skv]."""
    device = probe.q.device
    key = torch.arange(prompt.num_kv, device=device)
    # The window of the probe's last row holds nearer keys anyway.
    outside = key <= probe.position[:, -1:, None] - per_head(heads, "local", device)[:, None]
    mass = mass.masked_fill(taken | ~outside, 0.0)
    budget = [h.vertical if h.seeks_columns else 0 for h in heads]
    index, keep = _strongest(mass, outside, budget, heads, MIN_TIMES_EVEN / prompt.num_kv)
    return torch.zeros_like(taken).scatter_(-1, index, keep)


def _top_slashes(
    probe: Probe,
    columns: Tensor,
    grids: Sequence[tuple[GridLines, ...]],
    prompt: Prompt,
    heads: Sequence[HeadPattern],
) -> Tensor:
    """Lags of the strongest diagonals outside the window, int64 [B, Hq, n]; -1 = none.

    Mass on kept columns does not count: a strong column crosses every diagonal. A head with grid
    slash lines keeps no diagonals: its lines hold them already.
    """
    device = probe.q.device
    lag = torch.arange(prompt.num_kv, device=device)
    outside = lag >= per_head(heads, "local", device)[:, None]
    mass = torch.where(outside, diagonal_mass(probe, columns), 0.0)
    lined = torch.zeros(prompt.batch, len(heads), dtype=torch.bool, device=device)
    for i, row in enumerate(grids):
        for lines in row:
            lined[i] |= lines.s_stride > 0
    budget = [h.slash if h.seeks_slashes else 0 for h in heads]
    index, keep = _strongest(mass, outside, budget, heads, 4 * MIN_TIMES_EVEN / prompt.num_kv)
    return torch.where(keep & ~lined[..., None], index, -1)


def _strongest(
    mass: Tensor,
    outside: Tensor,
    budget: Sequence[int],
    heads: Sequence[HeadPattern],
    least: float,
) -> tuple[Tensor, Tensor]:
    """Up to `budget` entries of largest mass per head: (index, keep), each [B, Hq, max(budget)].

    "auto" heads drop entries that hold little: below `least`, or a few times the mean of `outside`.
    """
    device = mass.device
    mean = mass.sum(-1, keepdim=True) / outside.sum(-1, keepdim=True).clamp_min(1)
    floor = (MIN_TIMES_MEAN * mean).clamp_min(least)
    n = min(max(budget), mass.shape[-1])
    value, index = mass.topk(n, dim=-1)
    auto = torch.tensor([h.pattern == "auto" for h in heads], device=device)[:, None]
    room = torch.arange(n, device=device) < torch.tensor(budget, device=device)[:, None]
    return index, room & (value > 0) & (~auto | (value >= floor))
