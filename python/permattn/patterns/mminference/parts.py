"""From lines to parts: disjoint sets of pairs, each in the order that makes it cheap.

For one value of the local window w (heads are grouped by it):

    window   keys with a lag in [0, w)                     token order      mostly full blocks
    columns  kept keys with a lag >= w                     compact keys     full up to the edge
    slash    kept diagonals with a lag >= w                16-key granules  holes at columns
    lines    same-phase pairs of a video, lag >= w         phase-major      holes at columns

and, for all heads, rows: queries that see everything, compact, and holes everywhere else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from permattn.core import AttnPart, AttnPlan, BlockIndex, Permutation, TokenBand
from permattn.core.plan import ceil_div
from permattn.patterns.mminference.config import HeadPattern
from permattn.patterns.mminference.lines import GridLines, Lines
from permattn.patterns.mminference.prompt import Prompt

BLOCK = 64
# Diagonals start anywhere: finer key blocks cost 80 keys for 64 where aligned ones would cost 128.
GRANULE = 16
ROW_BLOCK = 32
LINE_BLOCK = 32


def build_plan(prompt: Prompt, heads: Sequence[HeadPattern], lines: Lines) -> AttnPlan:
    """The plan of all heads of one layer."""
    device = lines.columns.device
    q_perm = _without_rows(prompt, lines)
    kv_perm = _valid_keys(prompt, device)
    has_holes = bool(lines.max_columns) or prompt.padded
    sparse_keys = kv_perm.without_tokens(lines.columns) if has_holes else kv_perm
    columns = _compact_keys(lines, prompt.num_kv)
    parts = []
    for local in sorted({_window(h, prompt) for h in heads}):
        mine = torch.tensor([_window(h, prompt) == local for h in heads], device=device)
        parts.append(_window_part(prompt, q_perm, kv_perm, local, mine))
        if local >= prompt.num_kv:
            continue
        if lines.max_columns:
            parts.append(_columns_part(prompt, q_perm, columns, local, mine))
        if lines.slashes.shape[-1]:
            parts.append(_slash_part(prompt, q_perm, sparse_keys, lines, local, mine))
        if any(lines.grids) and any(h.seeks_grid and h.s for h in heads):
            parts.append(_lines_part(prompt, lines, local, mine))
    if lines.max_rows:
        parts.append(_rows_part(prompt, kv_perm, lines))
    return AttnPlan(tuple(parts), validate=False)


def compact(mask: Tensor, capacity: int) -> Tensor:
    """Positions of True along the last axis, ascending, padded with -1: int32 [..., capacity]."""
    place = mask.cumsum(-1) - 1
    place = torch.where(mask & (place < capacity), place, capacity)
    flat = torch.full((*mask.shape[:-1], capacity + 1), -1, dtype=torch.int32, device=mask.device)
    position = torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device)
    return flat.scatter_(-1, place, position.expand(mask.shape))[..., :capacity].contiguous()


def _window(head: HeadPattern, prompt: Prompt) -> int:
    """The head's local window; a dense head has one that holds every key."""
    return prompt.num_kv if head.pattern == "dense" else min(head.local, prompt.num_kv)


def _band(prompt: Prompt, min_lag: int, max_lag: int | None = None) -> TokenBand:
    """A band in positions, as one in tokens: query token i stands at position i + q_offset."""
    shift = prompt.q_offset
    return TokenBand(min_lag - shift, None if max_lag is None else max_lag - shift)


def _valid_keys(prompt: Prompt, device: torch.device) -> Permutation:
    whole = Permutation.identity(prompt.num_kv, device)
    if not prompt.padded:
        return whole
    key = torch.arange(prompt.num_kv)
    first, stop = (torch.tensor(x)[:, None, None] for x in (prompt.first, prompt.stop))
    return whole.without_tokens(((key < first) | (key >= stop)).to(device))


def _without_rows(prompt: Prompt, lines: Lines) -> Permutation:
    """Token order, with holes at padding and at the queries of the rows part."""
    device = lines.rows.device
    whole = Permutation.identity(prompt.num_q, device)
    if not lines.max_rows and not prompt.padded:
        return whole
    position = torch.arange(prompt.num_q) + prompt.q_offset
    first, stop = (torch.tensor(x)[:, None, None] for x in (prompt.first, prompt.stop))
    padding = ((position < first) | (position >= stop)).to(device)
    return whole.without_tokens(lines.rows | padding)


def _compact_keys(lines: Lines, num_kv: int) -> Permutation:
    token = compact(lines.columns, lines.max_columns)
    return Permutation.from_token_of_slot(token, num_kv, validate=False)


def _block_positions(prompt: Prompt) -> tuple[Tensor, Tensor]:
    """First and last position of every block of queries, int64 [nQ] on the host."""
    first = torch.arange(ceil_div(prompt.num_q, BLOCK)) * BLOCK + prompt.q_offset
    return first, (first + BLOCK - 1).clamp_max(prompt.num_kv - 1)


def _window_part(
    prompt: Prompt, q_perm: Permutation, kv_perm: Permutation, local: int, mine: Tensor
) -> AttnPart:
    q_first, q_last = _block_positions(prompt)
    begin, end = (torch.tensor(x)[:, None] for x in (prompt.first, prompt.stop))
    low = torch.maximum((q_first - local + 1).clamp_min(0), begin)
    high = torch.minimum(q_last + 1, end)
    start, stop = low // BLOCK, -(-high // BLOCK)
    # Full: every key is valid, in the window of the last query, and not after the first one.
    inner = torch.maximum((q_last - local + 1).clamp_min(0), begin)
    full_start = torch.maximum(-(-inner // BLOCK), start)
    full_stop = torch.minimum(torch.minimum(q_first + 1, end) // BLOCK, stop)
    full_stop = torch.maximum(full_stop, full_start)
    full_start = torch.minimum(full_start, torch.maximum(stop, start))
    full_stop = torch.minimum(full_stop, torch.maximum(stop, start))
    starts = torch.stack((full_start, start, full_stop), -1)
    stops = torch.stack((full_stop, full_start, stop), -1)
    capacity = int((stops - starts).clamp_min(0).sum((-1, -2)).max()) if starts.numel() else 0
    device = mine.device
    stops = torch.where(mine[:, None, None], stops.to(device)[:, None], 0)
    index = BlockIndex.from_ranges(
        starts.to(device)[:, None].expand(stops.shape),
        stops,
        num_full_ranges=1,
        capacity=capacity,
        block_q=BLOCK,
        block_kv=BLOCK,
    )
    return AttnPart(q_perm, kv_perm, index, _band(prompt, 0, local))


def _prefix_index(
    keys: Tensor, whole: Tensor, partial: Tensor, block_q: int, rows_bound: Tensor
) -> BlockIndex:
    """Rows that list a prefix of key blocks: the first `whole` slots are seen by the whole block.

    Args:
        keys: token_of_slot of the keys, for its length.
        whole, partial: int64 [B, Hq, nQ]: slots seen by every query, and by any query, of a block.
        rows_bound: int64 [nQ] on the host: a bound on `partial`.
    """
    blocks = ceil_div(keys.shape[-1], BLOCK)
    stop = ((partial + BLOCK - 1) // BLOCK).clamp_max(blocks)
    full = torch.minimum(whole // BLOCK, stop)
    zero = torch.zeros_like(full)
    bound = (-(-rows_bound // BLOCK)).clamp(0, blocks)
    return BlockIndex.from_ranges(
        torch.stack((zero, full), -1),
        torch.stack((full, stop), -1),
        num_full_ranges=1,
        capacity=int(bound.sum()),
        block_q=block_q,
        block_kv=BLOCK,
    )


def _columns_part(
    prompt: Prompt, q_perm: Permutation, keys: Permutation, local: int, mine: Tensor
) -> AttnPart:
    q_first, q_last = _block_positions(prompt)
    # A query at position p sees columns up to p - local; there are no more than that many.
    bound = (q_last - local + 1).clamp(0, keys.num_slots)
    token = torch.where(keys.token_of_slot < 0, prompt.num_kv, keys.token_of_slot).contiguous()
    shape = (*token.shape[:2], len(q_first))
    device = token.device

    def seen_from(position: Tensor) -> Tensor:
        limit = (position - local).to(device, torch.int32).expand(shape).contiguous()
        return torch.where(mine[:, None], torch.searchsorted(token, limit, right=True), 0)

    index = _prefix_index(token, seen_from(q_first), seen_from(q_last), BLOCK, bound)
    return AttnPart(q_perm, keys, index, _band(prompt, local))


def _slash_part(
    prompt: Prompt,
    q_perm: Permutation,
    kv_perm: Permutation,
    lines: Lines,
    local: int,
    mine: Tensor,
) -> AttnPart:
    """Diagonals are the same for every block of queries, shifted: one list of distances."""
    device = mine.device
    q_first, _ = _block_positions(prompt)
    phase = prompt.q_offset % GRANULE
    granules = ceil_div(prompt.num_kv, GRANULE)
    # A lag over BLOCK queries covers BLOCK keys, which touch `span` granules at some distance back.
    span = ceil_div(BLOCK + GRANULE - 1, GRANULE)
    lag = lines.slashes[..., None]
    back = -((phase - lag) // GRANULE) - torch.arange(span, device=device)
    last_touched = -((phase - lag + BLOCK - 1) // GRANULE)
    # The farthest pair of a granule must lie outside the window, else the window part holds it all.
    far = phase + BLOCK - 1 + GRANULE * back
    used = (lag >= 0) & (back >= last_touched) & (far >= local) & mine[:, None, None]
    shift = (
        span  # distances start a little below 0, where the granule lies ahead of the block's start
    )
    touched = torch.zeros((*used.shape[:2], granules + shift + 2), dtype=torch.bool, device=device)
    place = torch.where(used, back + shift, granules + shift + 1).clamp(0, granules + shift + 1)
    touched.scatter_(-1, place.flatten(-2), True)
    distance = compact(touched[..., :-1], min(lines.slashes.shape[-1] * span, granules + shift + 1))
    missing = granules + shift + 1
    distance = torch.where(distance < 0, missing, distance - shift).contiguous()
    home = (q_first // GRANULE).to(device, torch.int32)
    shape = (*distance.shape[:2], len(q_first))
    # Row i reaches back at most to granule 0 and ahead at most to the last one: a run of distances.
    home_rows = home.expand(shape).contiguous()
    skipped = torch.searchsorted(distance, home_rows - (granules - 1))
    counts = torch.searchsorted(distance, home_rows, right=True) - skipped
    offsets = torch.nn.functional.pad(counts.cumsum(-1), (1, 0))
    bound = (q_first // GRANULE + shift + 1).clamp_max(distance.shape[-1])
    entry = torch.arange(int(bound.sum()), device=device).expand(*shape[:2], -1).contiguous()
    row = torch.searchsorted(offsets.contiguous(), entry, right=True) - 1
    row = row.clamp_max(max(len(q_first) - 1, 0))
    nth = entry - offsets.gather(-1, row) + skipped.gather(-1, row)
    granule = home[row] - distance.gather(-1, nth.clamp(0, distance.shape[-1] - 1))
    index = BlockIndex(
        granule.clamp(0, granules - 1).to(torch.int32),
        offsets.to(torch.int32),
        torch.zeros(shape, dtype=torch.int32, device=device),
        BLOCK,
        GRANULE,
    )
    return AttnPart(q_perm, kv_perm, index, _band(prompt, local))


def _rows_part(prompt: Prompt, kv_perm: Permutation, lines: Lines) -> AttnPart:
    token = compact(lines.rows, lines.max_rows)
    q_perm = Permutation.from_token_of_slot(token, prompt.num_q, validate=False)
    blocks = ceil_div(token.shape[-1], ROW_BLOCK)
    pad = blocks * ROW_BLOCK - token.shape[-1]
    tiles = torch.nn.functional.pad(token, (0, pad), value=-1).unflatten(-1, (blocks, ROW_BLOCK))
    some = tiles[..., 0] >= 0
    device = token.device
    first = tiles[..., 0].long() + prompt.q_offset
    last = tiles.amax(-1).long() + prompt.q_offset
    begin = torch.tensor(prompt.first, device=device)[:, None, None]
    end = torch.tensor(prompt.stop, device=device)[:, None, None]
    stop = torch.where(some, -(-torch.minimum(last + 1, end) // BLOCK), 0)
    start = torch.minimum((begin // BLOCK).expand(stop.shape), stop)
    full_start = torch.minimum(-(-begin // BLOCK), stop).clamp_min(0)
    full_stop = torch.minimum(torch.minimum(first + 1, end) // BLOCK, stop)
    full_stop = torch.maximum(full_stop, full_start)
    index = BlockIndex.from_ranges(
        torch.stack((full_start, start, full_stop), -1),
        torch.stack((full_stop, full_start, stop), -1),
        num_full_ranges=1,
        capacity=blocks * ceil_div(prompt.num_kv, BLOCK),
        block_q=ROW_BLOCK,
        block_kv=BLOCK,
    )
    return AttnPart(q_perm, kv_perm, index, _band(prompt, 0))


def _lines_part(prompt: Prompt, lines: Lines, local: int, mine: Tensor) -> AttnPart:
    """Slash lines of all videos, phase-major: a query phase meets one key phase.

    Source: MMInference, section 3.2 and Algorithm 5 (permutation by stride).
    """
    device = mine.device
    heads = mine.shape[0]
    tokens, starts, stops, bounds = [], [], [], []
    for row in lines.grids:
        t, a, b, bound = [], [], [], 0
        base = 0
        for video in row:
            made = _phase_major(video, base, local, mine)
            t.append(made[0])
            a.append(made[1])
            b.append(made[2])
            bound += made[3]
            base += made[0].shape[-1] // LINE_BLOCK
        empty = torch.empty(heads, 0, dtype=torch.int32, device=device)
        tokens.append(torch.cat(t, -1) if t else empty)
        starts.append(torch.cat(a, -1) if a else empty.long())
        stops.append(torch.cat(b, -1) if b else empty.long())
        bounds.append(bound)
    slots = max(t.shape[-1] for t in tokens)
    blocks = slots // LINE_BLOCK

    def stack(rows: list[Tensor], size: int, value: int) -> Tensor:
        fill = torch.nn.functional.pad
        return torch.stack([fill(x, (0, size - x.shape[-1]), value=value) for x in rows])

    position = stack(tokens, slots, -1)
    q_token = torch.where(position >= prompt.q_offset, position - prompt.q_offset, -1)
    kv = Permutation.from_token_of_slot(position, prompt.num_kv, validate=False)
    q = Permutation.from_token_of_slot(q_token, prompt.num_q, validate=False)
    index = BlockIndex.from_ranges(
        stack(starts, blocks, 0)[..., None],
        stack(stops, blocks, 0)[..., None],
        num_full_ranges=0,
        capacity=max(bounds),
        block_q=LINE_BLOCK,
        block_kv=LINE_BLOCK,
    )
    q = q.without_tokens(lines.rows)
    return AttnPart(q, kv.without_tokens(lines.columns), index, _band(prompt, local))


def _phase_major(
    video: GridLines, base: int, local: int, mine: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Slots of one video per head, and the key-block range of every query block.

    Args:
        base: blocks before this video's.

    Returns: tokens int32 [Hq, slots] (-1 = padding), starts and stops int64
        [Hq, slots / LINE_BLOCK], and a static bound on listed blocks.
    """
    n = video.grid.num_tokens
    sizes = [(s, ceil_div(ceil_div(n, s), LINE_BLOCK)) for s in video.strides]
    slots = max(s * per * LINE_BLOCK for s, per in sizes)
    # A query block sees its own line's blocks up to itself, and one more where the shift wraps.
    bound = max(s * (per * (per + 1) // 2) for s, per in sizes)
    device = mine.device
    stride = torch.where(mine, video.s_stride, 0).long()[:, None]
    safe = stride.clamp_min(1)
    per_line = (n + safe * LINE_BLOCK - 1) // (safe * LINE_BLOCK)
    slot = torch.arange(slots, device=device)
    phase, nth = slot // (per_line * LINE_BLOCK), slot % (per_line * LINE_BLOCK)
    rank = nth * stride + phase
    valid = (phase < stride) & (rank < n)
    token = video.grid.token_of_rank[rank.clamp(0, n - 1)]
    token = torch.where(valid, token, -1)
    block = torch.arange(slots // LINE_BLOCK, device=device)
    line, step = block // per_line, block % per_line
    other = (line - video.s_phase.long()[:, None]) % safe
    start = base + other * per_line
    stop = torch.where(line < stride, start + step + 1, start)
    return token.to(torch.int32), start, stop, bound
