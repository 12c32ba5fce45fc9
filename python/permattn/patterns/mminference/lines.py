"""Choosing lines: which columns, diagonals and grid lines each head of a stream keeps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from permattn.patterns.mminference.probing import Prober, ProbeRows
from permattn.patterns.mminference.prompt import Prompt, VideoGrid
from permattn.patterns.mminference.streams import Stream
from permattn.probe import ProbeMass

# What "auto" asks of a line, as shares of the probe's mass. Everything kept must hold several times
# what chance would give it. Grid lines must hold some mass at all, and a good part of a line's
# members must carry it: a few strong keys are columns, one strong distance is a diagonal. A column
# must be seen by 4 of the 64 rows: a diagonal crosses each row in another column, and noise of s
# logits alone makes a column that all rows see look as if exp(-s^2) of them did. A column or
# diagonal must hold a quarter of what it would if all mass were spread evenly.
MIN_GRID_EXCESS = 0.03
MIN_SPREAD = 1 / 16
MIN_TIMES_MEAN = 4.0
MIN_TIMES_EVEN = 0.25
# What a diagonal costs: the key blocks that it touches, where a column is one key.
KEYS_PER_SLASH = 80
# Excess of a longer stride, as a share of the best candidate's, that makes it the better choice.
NEARLY = 0.9


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
    """What the probe chose for all heads of one stream.

    Args:
        columns: bool [B, Hq, Skv]: keys seen by every later row (sink included).
        max_columns: a static bound on columns per head.
        rows: bool [B, Hq, Sq]: queries that see every earlier key of the stream.
        max_rows: a static bound on rows per head.
        slashes: int64 [B, Hq, n] lags of kept diagonals on the slash axis, -1 = none; n may be 0.
        grids: per batch row the lines of its videos.
    """

    columns: Tensor
    max_columns: int
    rows: Tensor
    max_rows: int
    slashes: Tensor
    grids: tuple[tuple[GridLines, ...], ...]


def choose_lines(prober: Prober, stream: Stream) -> Lines:
    """Runs the probe (if any head needs it) and picks the lines of all heads of a stream."""
    prompt, device = prober.prompt, stream.device
    columns = _sink_columns(prompt, stream)
    max_columns = stream.most("sink")
    rows, max_rows = _last_rows(prompt, stream)
    slashes = torch.full((*columns.shape[:2], 0), -1, dtype=torch.int64, device=device)
    grids: tuple[tuple[GridLines, ...], ...] = ()
    if stream.any("needs_probe"):
        sink = columns
        if stream.any("seeks_grid"):
            grids = tuple(_grid_lines(prober, stream, i) for i in range(prompt.batch))
            v_columns, v_rows = _grid_masks(grids, prompt, stream)
            columns, rows = columns | v_columns, rows | v_rows
            per_row = [sum(-(-g.grid.num_tokens // min(g.strides)) for g in row) for row in grids]
            max_columns += max(per_row)
            max_rows += max(per_row)
        if stream.any("seeks_columns") or stream.any("seeks_slashes"):
            choice = _Choice(prompt, stream, *prober.main(stream.query), sink)
            if stream.any("seeks_columns"):
                columns = columns | choice.columns(columns)
                max_columns += stream.most("vertical", "seeks_columns")
            if stream.any("seeks_slashes"):
                slashes = choice.slashes(prober, columns, grids)
    return Lines(
        columns,
        min(max_columns, prompt.num_kv),
        rows,
        min(max_rows, prompt.num_q),
        slashes,
        grids,
    )


def _sink_columns(prompt: Prompt, stream: Stream) -> Tensor:
    key = torch.arange(prompt.num_kv, device=stream.device)
    first = torch.tensor(prompt.first, device=stream.device)[:, None, None]
    return (key < first + stream.each("sink")) & stream.is_key


def _last_rows(prompt: Prompt, stream: Stream) -> tuple[Tensor, int]:
    """Dense rows at the end: bool [B, Hq, Sq] and their static bound."""
    position = torch.arange(prompt.num_q, device=stream.device) + prompt.q_offset
    start = [
        [
            prompt.tail_start(i, h.last) if m and h.keeps_last else prompt.stop[i]
            for h, m in zip(stream.heads, stream.mine, strict=True)
        ]
        for i in range(prompt.batch)
    ]
    begin = torch.tensor(start, device=stream.device)[..., None]
    bound = max(stop - min(row) for stop, row in zip(prompt.stop, start, strict=True))
    return (position >= begin) & stream.is_query, bound


def _grid_lines(prober: Prober, stream: Stream, batch_row: int) -> tuple[GridLines, ...]:
    """Stride and phase of every head for every video of one batch row.

    Source: MMInference, Algorithm 1. Deviation: a line is scored by the mass it holds in excess of
    1 / stride, since the plain maximum prefers short strides.
    """
    prompt, device = prober.prompt, stream.device
    pairs = list(zip(stream.heads, stream.mine, strict=True))
    seekers = [h for h, m in pairs if m and h.seeks_grid]
    names = tuple(dict.fromkeys(s for h in seekers for s in h.strides))
    local = min(h.local for h in seekers)
    forced = torch.tensor([h.pattern == "grid" for h in stream.heads], device=device)
    found = []
    for grid in prompt.grids[batch_row]:
        name = prompt.names[grid.modality]
        strides = grid.strides(names)
        if not strides or stream.key not in (None, name):
            continue
        allowed = torch.tensor(
            [
                [m and h.seeks_grid and s in grid.strides(h.strides) for s in strides]
                for h, m in pairs
            ],
            device=device,
        )
        own = stream.query in (None, name)
        column, diagonal, at = prober.video(stream.query, batch_row, grid, own)
        # What the local window finds anyway does not count.
        count = int(torch.searchsorted(grid.host_tokens, max(at - local, 0)))
        lined = {"v": [_fold(column[..., :count], s) for s in strides]}
        if diagonal is not None:
            far = torch.arange(diagonal.shape[-1], device=device) >= local
            distant = diagonal * far
            lined["s"] = [_fold(distant, s) for s in strides]
        chosen: dict[str, Tensor] = {}
        for kind in ("v", "s"):
            wants = [m and h.seeks_grid and _wants(h, kind) for h, m in pairs]
            nothing = torch.zeros(len(pairs), dtype=torch.int32, device=device)
            chosen[f"{kind}_stride"] = chosen[f"{kind}_phase"] = nothing
            if kind in lined and any(wants):
                stride, phase = _strongest_line(
                    lined[kind],
                    strides,
                    allowed & torch.tensor(wants, device=device)[:, None],
                    forced,
                )
                chosen[f"{kind}_stride"], chosen[f"{kind}_phase"] = stride, phase
        found.append(GridLines(grid, strides=strides, **chosen))
    return tuple(found)


def _wants(head: object, kind: str) -> bool:
    return head.s if kind == "s" else (head.v or head.h)  # type: ignore[attr-defined]


def _fold(mass: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Mass [Hq, n] on every residue of a stride.

    Returns: (sum, spread), each [Hq, stride]; spread is the share of a line's members that carry
        it (1 = all, 1 / n = one).
    """
    n = mass.shape[-1]
    lines = torch.nn.functional.pad(mass, (0, -n % stride)).unflatten(-1, (-1, stride))
    total = lines.sum(-2)
    square = max(1, lines.shape[-2]) * lines.square().sum(-2)
    return total, total.square() / square.clamp_min(torch.finfo(square.dtype).tiny)


def _strongest_line(
    lines: list[tuple[Tensor, Tensor]],
    strides: tuple[int, ...],
    allowed: Tensor,
    forced: Tensor,
) -> tuple[Tensor, Tensor]:
    """Stride and phase int32 [Hq] of the line with most mass in excess of chance; stride 0 = none.

    Args:
        lines: per stride what `_fold` returns.
        allowed: bool [Hq, number of strides].
        forced: bool [Hq]: heads that take the best line whatever it holds.
    """
    best = [total.max(-1) for total, _ in lines]
    value = torch.stack([x.values for x in best], -1)
    phase = torch.stack([x.indices for x in best], -1)
    pairs = zip(lines, best, strict=True)
    spread = torch.stack([x.gather(-1, y.indices[:, None])[:, 0] for (_, x), y in pairs], -1)
    size = torch.tensor(strides, device=value.device)
    chance = torch.stack([total.sum(-1) for total, _ in lines], -1) / size
    excess = value - chance
    worth = (
        (spread >= MIN_SPREAD) & (excess >= MIN_GRID_EXCESS) & (value >= MIN_TIMES_MEAN * chance)
    )
    score = torch.where(allowed & (forced[:, None] | worth), excess, -1.0)
    # A divisor's lines hold these and a little noise for many times the keys: of candidates about
    # as good as the best one, the longest stride is the cheapest.
    most = score.amax(-1)
    pick = torch.where(score >= NEARLY * most[:, None], size, 0).argmax(-1)
    stride = torch.where(most >= 0, size[pick], 0)
    return stride.int(), phase.gather(-1, pick[:, None])[:, 0].int()


def _grid_masks(
    grids: tuple[tuple[GridLines, ...], ...], prompt: Prompt, stream: Stream
) -> tuple[Tensor, Tensor]:
    """Vertical lines as columns bool [B, Hq, Skv], horizontal lines as rows bool [B, Hq, Sq]."""
    shape = (prompt.batch, len(stream.heads), prompt.num_kv)
    columns = torch.zeros(shape, dtype=torch.bool, device=stream.device)
    rows = torch.zeros(shape, dtype=torch.bool, device=stream.device)
    wants_v, wants_h = stream.flag("v"), stream.flag("h")
    for i, row in enumerate(grids):
        for lines in row:
            rank = torch.arange(lines.grid.num_tokens, device=stream.device, dtype=torch.int32)
            stride = lines.v_stride[:, None]
            on_line = (stride > 0) & (rank % stride.clamp_min(1) == lines.v_phase[:, None])
            if lines.grid.is_contiguous:
                token: slice | Tensor = slice(lines.grid.first, lines.grid.stop)
            else:
                token = lines.grid.token_of_rank.long()
            columns[i, :, token] |= on_line & wants_v
            rows[i, :, token] |= on_line & wants_h
    return columns, rows[..., prompt.q_offset :] & stream.is_query


class _Choice:
    """Budgets spent on the strongest columns and diagonals outside the window."""

    def __init__(
        self, prompt: Prompt, stream: Stream, rows: ProbeRows, mass: ProbeMass, sink: Tensor
    ) -> None:
        self.prompt, self.stream, self.mass = prompt, stream, mass
        device = stream.device
        # The window of the probe's last row holds nearer keys anyway.
        last = (rows.first_position + rows.count - 1)[:, None, None]
        key = torch.arange(prompt.num_kv, device=device)
        self.outside = (key <= last - stream.each("local")) & stream.is_key
        self.auto = torch.tensor([h.pattern == "auto" for h in stream.heads], device=device)[
            :, None
        ]
        shares = [h.coverage for h in stream.heads]
        self.covers = torch.tensor([c is not None for c in shares], device=device)[:, None]
        share = torch.tensor([1.0 if c is None else c for c in shares], device=device)[:, None]
        rest = mass.column.masked_fill(~self.outside | sink, 0.0).sum(-1, keepdim=True)
        self.target = share * rest
        self.sink = sink

    def held(self, columns: Tensor) -> Tensor:
        """Mass outside window and sink that is on kept columns, [B, Hq, 1]."""
        counted = columns & self.outside & ~self.sink
        return self.mass.column.masked_fill(~counted, 0.0).sum(-1, keepdim=True)

    def columns(self, taken: Tensor) -> Tensor:
        """The strongest columns that are not taken, bool [B, Hq, Skv]."""
        column, square = self.mass.column, self.mass.square
        # The share of the probe rows that see it, 1 / R where it is a diagonal's.
        spread = column.square() >= MIN_SPREAD * square
        usable = self.outside & ~taken & (spread | ~(self.auto | self.covers))
        index, keep = self._strongest(
            column.masked_fill(~usable, 0.0),
            self.outside,
            ("vertical", "seeks_columns"),
            self.held(taken),
            MIN_TIMES_EVEN / self.prompt.num_kv,
        )
        return torch.zeros_like(taken).scatter_(-1, index, keep)

    def slashes(
        self, prober: Prober, columns: Tensor, grids: tuple[tuple[GridLines, ...], ...]
    ) -> Tensor:
        """Lags of the strongest diagonals outside the window, int64 [B, Hq, n]; -1 = none.

        "auto" and coverage do not count mass on kept columns: a strong column crosses every
        diagonal. A head with grid slash lines keeps no diagonals: its lines hold them already.
        """
        stream = self.stream
        axis = stream.slash_axis
        skip = None
        skips = self.auto | self.covers
        if any(h.pattern == "auto" or h.coverage is not None for h in stream.heads):
            skip = columns & skips
        if axis.has_holes:
            missing = ~stream.is_key.expand_as(columns)
            skip = missing if skip is None else skip | missing
        mass = prober.diagonals(stream.query, axis, skip)
        lag = torch.arange(mass.shape[-1], device=stream.device)
        outside = (lag >= stream.each("local")).expand(mass.shape)
        lined = torch.zeros(mass.shape[:2], dtype=torch.bool, device=stream.device)
        for i, row in enumerate(grids):
            for lines in row:
                lined[i] |= lines.s_stride > 0
        index, keep = self._strongest(
            mass.masked_fill(~outside, 0.0),
            outside,
            ("slash", "seeks_slashes"),
            self.held(columns),
            KEYS_PER_SLASH * MIN_TIMES_EVEN / self.prompt.num_kv,
        )
        return torch.where(keep & ~lined[..., None], index, -1)

    def _strongest(
        self, mass: Tensor, outside: Tensor, budget: tuple[str, str], held: Tensor, least: float
    ) -> tuple[Tensor, Tensor]:
        """Up to a budget of entries of largest mass per head: (index, keep), each [B, Hq, n].

        "auto" heads drop entries that hold little: below `least`, or a few times the mean of
        `outside`. Heads with a coverage stop when that share is held.
        """
        name, seeks = budget
        mean = mass.sum(-1, keepdim=True) / outside.sum(-1, keepdim=True).clamp_min(1)
        floor = (MIN_TIMES_MEAN * mean).clamp_min(least)
        n = min(self.stream.most(name, seeks), mass.shape[-1])
        value, index = mass.topk(n, dim=-1)
        room = torch.arange(n, device=mass.device) < self.stream.each(name) * self.stream.flag(
            seeks
        )
        before = held + value.cumsum(-1) - value
        wanted = ~self.covers | (before < self.target)
        return index, room & (value > 0) & (~self.auto | (value >= floor)) & wanted
