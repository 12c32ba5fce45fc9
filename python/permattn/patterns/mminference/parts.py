"""From lines to parts: disjoint sets of pairs, each in the order that makes it cheap.

For one stream, and one value of the local window w (heads are grouped by it):

    window   keys with a lag in [0, w)                     the stream's axis  mostly full blocks
    columns  kept keys with a lag >= w                     compact keys       full up to the edge
    slash    kept diagonals with a lag >= w                16-key granules    holes at columns
    blocks   key blocks of highest pooled score, lag >= w  the stream's axis  holes at columns
    lines    same-phase pairs of a video, lag >= w         phase-major        holes at columns

and, for all its heads, rows: queries that see everything, compact, and holes everywhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from permattn.core import AttnPart, BlockIndex, Permutation, TokenBand
from permattn.core.plan import ceil_div
from permattn.core.selection import list_blocks, pooled_blocks, strongest_blocks
from permattn.patterns.mminference.config import HeadPattern
from permattn.patterns.mminference.lines import GridLines, Lines
from permattn.patterns.mminference.prompt import Prompt, VideoGrid
from permattn.patterns.mminference.streams import BLOCK, Stream

# Diagonals start anywhere: finer key blocks cost 80 keys for 64 where aligned ones would cost 128.
GRANULE = 16
# Rows and lines come in blocks of 64 where there are many: lists are shorter and tiles fuller. Few
# would leave most of such a block empty.
FEW, MANY = 32, 64
MANY_ROWS = 512
MANY_FRAMES = 256


def stream_parts(
    prompt: Prompt, stream: Stream, lines: Lines, q: Tensor, k: Tensor
) -> list[AttnPart]:
    """The parts of one stream of one layer.

    Args:
        q, k: see `plan_prefill`; only block_sparse looks at them.
    """
    maker = _Maker(prompt, stream, lines)
    parts = []
    pairs = list(zip(stream.heads, stream.mine, strict=True))
    for local in sorted({_window(h, prompt) for h, m in pairs if m}):
        mine = [m and _window(h, prompt) == local for h, m in pairs]
        here = torch.tensor(mine, device=stream.device)
        parts.append(maker.window(local, here))
        if local >= prompt.num_kv:
            continue
        some = [h for h, m in zip(stream.heads, mine, strict=True) if m]
        if lines.max_columns:
            parts.append(maker.columns(local, here))
        if lines.slashes.shape[-1] and any(h.seeks_slashes for h in some):
            parts.append(maker.slash(local, here))
        if any(h.seeks_blocks for h in some):
            parts.append(maker.blocks(local, here, q, k))
        if any(lines.grids) and any(h.seeks_grid and h.s for h in some):
            parts.append(maker.grid_lines(local, here))
    if lines.max_rows:
        parts.append(maker.rows())
    return parts


def no_parts(prompt: Prompt) -> AttnPart:
    """Nobody sees anything: a prompt of padding, or of no queries."""
    q = Permutation.identity(prompt.num_q, prompt.device)
    kv = Permutation.identity(prompt.num_kv, prompt.device)
    rows = ceil_div(prompt.num_q, BLOCK)
    zero = torch.zeros(1, 1, rows, dtype=torch.int64, device=prompt.device)
    index = BlockIndex.from_ranges(
        zero[..., None],
        zero[..., None],
        num_full_ranges=0,
        capacity=0,
        block_q=BLOCK,
        block_kv=BLOCK,
    )
    return AttnPart(q, kv, index, TokenBand(prompt.num_q - prompt.num_kv))


def compact(mask: Tensor, capacity: int) -> Tensor:
    """Positions of True along the last axis, ascending, padded with -1: int32 [..., capacity]."""
    # Place 0 collects what is not kept; the slice drops it.
    place = mask.cumsum(-1, dtype=torch.int32).mul_(mask)
    place.masked_fill_(place > capacity, 0)
    flat = torch.full((*mask.shape[:-1], capacity + 1), -1, dtype=torch.int32, device=mask.device)
    position = torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device)
    flat.scatter_(-1, place.long(), position.expand(mask.shape))
    return flat[..., 1:].contiguous()


def _window(head: HeadPattern, prompt: Prompt) -> int:
    """The head's local window; a dense head has one that holds every key."""
    return prompt.num_kv if head.pattern == "dense" else min(head.local, prompt.num_kv)


class _Maker:
    """Makes the parts of one stream out of shared permutations."""

    def __init__(self, prompt: Prompt, stream: Stream, lines: Lines) -> None:
        self.prompt, self.stream, self.lines = prompt, stream, lines
        self.device = stream.device
        self.q_perm = self._without_rows(stream.blocks.perm)
        self.kv_perm = stream.axis.perm
        self._sparse: list[tuple[Permutation, Permutation]] = []
        self._columns: Permutation | None = None

    def _without_rows(self, perm: Permutation) -> Permutation:
        return perm.without_tokens(self.lines.rows) if self.lines.max_rows else perm

    def _sparse_keys(self, perm: Permutation) -> Permutation:
        """Keys with holes at the kept columns; made once for every axis."""
        if not self.lines.max_columns:
            return perm
        for whole, sparse in self._sparse:
            if whole is perm:
                return sparse
        self._sparse.append((perm, perm.without_tokens(self.lines.columns)))
        return self._sparse[-1][1]

    def _band(self, min_lag: int, max_lag: int | None = None) -> TokenBand:
        """A band in positions, as one in tokens: query token i stands at position i + q_offset."""
        shift = self.prompt.q_offset
        return TokenBand(min_lag - shift, None if max_lag is None else max_lag - shift)

    def _to_index(
        self, starts: list[Tensor], stops: list[Tensor], mine: Tensor, full: int
    ) -> BlockIndex:
        """Host ranges [Bx, nQ] of key blocks as the lists of the heads in `mine`."""
        begin, end = torch.stack(starts, -1), torch.stack(stops, -1)
        capacity = int((end - begin).clamp_min(0).sum((-1, -2)).max()) if begin.numel() else 0
        end = torch.where(mine[:, None, None], end.to(self.device)[:, None], 0)
        return BlockIndex.from_ranges(
            begin.to(self.device)[:, None].expand(end.shape),
            end,
            num_full_ranges=full,
            capacity=capacity,
            block_q=BLOCK,
            block_kv=BLOCK,
        )

    def window(self, local: int, mine: Tensor) -> AttnPart:
        axis, blocks = self.stream.axis, self.stream.blocks
        low = axis.coordinate(blocks.first - local + 1)
        high = axis.coordinate(blocks.last + 1)
        start = low // BLOCK
        stop = torch.maximum(-(-high // BLOCK), start)
        stop = torch.where(high > low, stop, start)
        # Full: every key is in the window of the last query, and not after the first one.
        inner = axis.coordinate(blocks.last - local + 1)
        full_start = torch.minimum(torch.maximum(-(-inner // BLOCK), start), stop)
        full_stop = axis.coordinate(blocks.first + 1) // BLOCK
        full_stop = torch.minimum(torch.maximum(full_stop, full_start), stop)
        if axis.has_holes:
            full_stop = full_start
        starts, stops = [full_start, start, full_stop], [full_stop, full_start, stop]
        index = self._to_index(starts, stops, mine, full=1)
        return AttnPart(self.q_perm, self.kv_perm, index, self._band(0, local))

    def columns(self, local: int, mine: Tensor) -> AttnPart:
        blocks, num_kv = self.stream.blocks, self.prompt.num_kv
        if self._columns is None:
            token = compact(self.lines.columns, self.lines.max_columns)
            self._columns = Permutation.from_token_of_slot(token, num_kv, validate=False)
        keys = self._columns
        token = torch.where(keys.token_of_slot < 0, num_kv, keys.token_of_slot).contiguous()
        shape = (*token.shape[:2], blocks.count)

        def seen_from(position: Tensor) -> Tensor:
            # A block without queries has a first one past the end; its last one sees nothing.
            limit = (position - local).to(self.device, torch.int32)[:, None]
            count = torch.searchsorted(token, limit.expand(shape).contiguous(), right=True)
            return torch.where(mine[:, None], count, 0)

        stop = -(-seen_from(blocks.last) // BLOCK)
        full = torch.minimum(seen_from(blocks.first) // BLOCK, stop)
        zero = torch.zeros_like(full)
        # A query at position p sees columns up to p - local; there are no more than that many.
        bound = (blocks.last - local + 1).clamp(0, keys.num_slots)
        capacity = -(-bound // BLOCK)
        index = BlockIndex.from_ranges(
            torch.stack((zero, full), -1),
            torch.stack((full, stop), -1),
            num_full_ranges=1,
            capacity=int(capacity.sum(-1).max()) if capacity.numel() else 0,
            block_q=BLOCK,
            block_kv=BLOCK,
        )
        return AttnPart(self.q_perm, keys, index, self._band(local))

    def slash(self, local: int, mine: Tensor) -> AttnPart:
        """Diagonals are the same for every block of queries, shifted: one list of distances."""
        stream, device = self.stream, self.device
        axis, home = stream.slash_axis, stream.slash_blocks.home
        granules = ceil_div(axis.size, GRANULE)
        # A lag over BLOCK queries covers BLOCK keys: `span` granules at some distance back. A
        # distance starts a little below 0, where the granule lies ahead of the block's start.
        span = shift = ceil_div(BLOCK + GRANULE - 1, GRANULE)
        phase = (home[:, :1] % GRANULE).to(device)[:, None, None]
        lag = self.lines.slashes[..., None]
        back = -((phase - lag) // GRANULE) - torch.arange(span, device=device)
        last_touched = -((phase - lag + BLOCK - 1) // GRANULE)
        used = (lag >= 0) & (back >= last_touched) & mine[:, None, None]
        missing = granules + shift + 1
        shape = (*used.shape[:2], missing + 1)
        touched = torch.zeros(shape, dtype=torch.bool, device=device)
        place = torch.where(used, back + shift, missing).clamp(0, missing)
        touched.scatter_(-1, place.flatten(-2), True)
        count = min(self.lines.slashes.shape[-1] * span, missing)
        distance = compact(touched[..., :-1], count)
        distance = torch.where(distance < 0, missing, distance - shift).contiguous()
        home_granule = home // GRANULE
        row_home = home_granule.to(device, torch.int32)[:, None].expand(*used.shape[:2], -1)
        row_home = row_home.contiguous()
        # Row i reaches back at most to granule 0 and ahead at most to the last: a run of distances.
        skipped = torch.searchsorted(distance, row_home - (granules - 1))
        counts = torch.searchsorted(distance, row_home, right=True) - skipped
        offsets = torch.nn.functional.pad(counts.cumsum(-1), (1, 0))
        bound = (home_granule + shift + 1).clamp(0, count)
        capacity = int(bound.sum(-1).max()) if bound.numel() else 0
        entry = torch.arange(capacity, device=device).expand(*used.shape[:2], -1).contiguous()
        row = torch.searchsorted(offsets.contiguous(), entry, right=True) - 1
        row = row.clamp_max(max(home.shape[-1] - 1, 0))
        nth = entry - offsets.gather(-1, row) + skipped.gather(-1, row)
        granule = row_home.gather(-1, row) - distance.gather(-1, nth.clamp(0, max(count - 1, 0)))
        index = BlockIndex(
            granule.clamp(0, max(granules - 1, 0)).to(torch.int32),
            offsets.to(torch.int32),
            torch.zeros(row_home.shape, dtype=torch.int32, device=device),
            BLOCK,
            GRANULE,
        )
        if axis.has_holes:
            there = torch.nn.functional.pad(stream.is_key, (0, -axis.size % GRANULE))
            index = index.without_blocks(~there.unflatten(-1, (granules, GRANULE)).any(-1))
        q_perm = self.q_perm
        if stream.slash_blocks is not stream.blocks:
            q_perm = self._without_rows(stream.slash_blocks.perm)
        return AttnPart(q_perm, self._sparse_keys(axis.perm), index, self._band(local))

    def blocks(self, local: int, mine: Tensor, q: Tensor, k: Tensor) -> AttnPart:
        """Key blocks by the product of pooled queries and pooled keys.

        Source: MInference (arXiv 2407.02490), Algorithm 3.
        """
        stream, device = self.stream, self.device
        axis, blocks = stream.axis, stream.blocks
        q_token = stream.blocks.perm.token_of_slot
        kv_token = axis.perm.token_of_slot
        last = axis.coordinate(blocks.last - local + 1)
        full = axis.coordinate(blocks.first - local + 1) // BLOCK
        stop = torch.where(mine[:, None], (-(-last // BLOCK)).to(device)[:, None], 0)
        budget = (stream.each("blocks") * stream.flag("seeks_blocks"))[:, 0]
        shares = [1.0 if h.coverage is None else h.coverage for h in stream.heads]
        ends_early = any(share < 1.0 for share in shares)
        chosen = strongest_blocks(
            pooled_blocks(q, BLOCK, q_token),
            pooled_blocks(k, BLOCK, kv_token),
            allowed_stop=stop.expand(q.shape[0], -1, -1),
            budget=budget,
            coverage=torch.tensor(shares, device=device) if ends_early else None,
            max_blocks=min(stream.most("blocks", "seeks_blocks"), ceil_div(axis.size, BLOCK)),
            scale=q.shape[-1] ** -0.5,
            allowed_start=(axis.start[:, 0] // BLOCK).expand(q.shape[0]).to(device),
        )
        keys = self._sparse_keys(axis.perm)
        hole = torch.nn.functional.pad(keys.token_of_slot < 0, (0, -axis.size % BLOCK))
        hole = hole.unflatten(-1, (-1, BLOCK)).any(-1).expand(*chosen.shape[:2], -1)
        place = chosen.clamp_min(0).long().flatten(-2)
        whole = ~hole.gather(-1, place).view(chosen.shape)
        whole &= chosen < full.to(device)[:, None, :, None]
        return AttnPart(
            self.q_perm, keys, list_blocks(chosen, whole, BLOCK, BLOCK), self._band(local)
        )

    def rows(self) -> AttnPart:
        """Queries that see every earlier key of the stream."""
        prompt, axis, device = self.prompt, self.stream.axis, self.device
        token = compact(self.lines.rows, self.lines.max_rows)
        q_perm = Permutation.from_token_of_slot(token, prompt.num_q, validate=False)
        size = MANY if self.lines.max_rows >= MANY_ROWS else FEW
        blocks = ceil_div(token.shape[-1], size)
        pad = blocks * size - token.shape[-1]
        tiles = torch.nn.functional.pad(token, (0, pad), value=-1)
        tiles = tiles.unflatten(-1, (blocks, size))
        some = tiles[..., 0] >= 0
        begin, end = axis.start.to(device)[..., None], axis.stop.to(device)[..., None]

        def seen_from(row: Tensor) -> Tensor:
            count = row.long() + prompt.q_offset + 1
            if axis.order is not None:
                position = axis.position.to(device)[:, None]
                position = position.expand(*count.shape[:2], -1).contiguous()
                count = torch.searchsorted(position, count.contiguous())
            return torch.minimum(torch.maximum(count, begin), end)

        stop = torch.where(some, -(-seen_from(tiles.amax(-1)) // BLOCK), 0)
        start = torch.minimum((begin // BLOCK).expand(stop.shape), stop)
        full_start = torch.minimum(-(-begin // BLOCK), stop)
        full_stop = torch.minimum(seen_from(tiles[..., 0]) // BLOCK, stop)
        full_stop = torch.maximum(full_stop, full_start)
        if axis.has_holes:
            full_stop = full_start
        index = BlockIndex.from_ranges(
            torch.stack((full_start, start, full_stop), -1),
            torch.stack((full_stop, full_start, stop), -1),
            num_full_ranges=1,
            capacity=blocks * ceil_div(axis.size, BLOCK),
            block_q=size,
            block_kv=BLOCK,
        )
        return AttnPart(q_perm, self.kv_perm, index, self._band(0))

    def grid_lines(self, local: int, mine: Tensor) -> AttnPart:
        """Slash lines of all videos, phase-major: a query phase meets one key phase.

        Source: MMInference, section 3.2 and Algorithm 5 (permutation by stride).
        """
        prompt = self.prompt
        videos = [video for row in self.lines.grids for video in row]
        repeats = min(video.grid.num_tokens // max(video.strides) for video in videos)
        size = MANY if repeats >= MANY_FRAMES else FEW
        made = [_phase_major(prompt, row, mine, size) for row in self.lines.grids]
        slots = max(m.token.shape[-1] for m in made)
        blocks = slots // size

        def stack(rows: list[Tensor], size: int, value: int) -> Tensor:
            fill = torch.nn.functional.pad
            return torch.stack([fill(x, (0, size - x.shape[-1]), value=value) for x in rows])

        position = stack([m.token for m in made], slots, -1)
        slot = torch.stack([m.slot for m in made])
        kv = q = Permutation(position, slot)
        if prompt.q_offset:
            q_token = torch.where(position >= prompt.q_offset, position - prompt.q_offset, -1)
            q = Permutation(q_token, slot[..., prompt.q_offset :].contiguous())
        index = BlockIndex.from_ranges(
            stack([m.start for m in made], blocks, 0)[..., None],
            stack([m.stop for m in made], blocks, 0)[..., None],
            num_full_ranges=0,
            capacity=max(m.capacity for m in made),
            block_q=size,
            block_kv=size,
        )
        return AttnPart(self._without_rows(q), self._sparse_keys(kv), index, self._band(local))


@dataclass(frozen=True, eq=False)
class _Lines:
    """The videos of one batch row, phase-major, every head by its own strides.

    Args:
        token: int32 [Hq, slots], -1 = padding.
        slot: int32 [Hq, Skv], -1 = not in a line.
        start, stop: int64 [Hq, slots / size of a block]: key blocks of every query block.
        capacity: a static bound on listed blocks.
    """

    token: Tensor
    slot: Tensor
    start: Tensor
    stop: Tensor
    capacity: int


def _phase_major(prompt: Prompt, videos: tuple[GridLines, ...], mine: Tensor, size: int) -> _Lines:
    device = mine.device
    tokens = [torch.empty(len(mine), 0, dtype=torch.int32, device=device)]
    starts, stops = [tokens[0].long()], [tokens[0].long()]
    slot = torch.full((len(mine), prompt.num_kv), -1, dtype=torch.int32, device=device)
    base = capacity = 0
    for video in videos:
        order = _stride_orders(video.grid, video.strides, size)
        strides = torch.tensor(video.strides, dtype=torch.int32, device=device)
        stride = torch.where(mine, video.s_stride, 0)[:, None]
        # The last order holds nothing: it is that of heads without lines.
        found = torch.cat((stride == strides, torch.ones_like(stride, dtype=torch.bool)), -1)
        pick = found.int().argmax(-1)
        tokens.append(order.token_of_slot[pick])
        by_rank = order.slot_of_rank[pick]
        by_rank = torch.where(by_rank >= 0, by_rank + base, -1) if base else by_rank
        if video.grid.is_contiguous:
            slot[:, video.grid.first : video.grid.stop] = by_rank
        else:
            slot[:, video.grid.token_of_rank.long()] = by_rank
        per_line = order.blocks_per_line[pick][:, None]
        block = torch.arange(tokens[-1].shape[-1] // size, device=device)
        line, step = block // per_line, block % per_line
        other = (line - video.s_phase[:, None]) % stride.clamp_min(1)
        starts.append(base // size + other * per_line)
        stops.append(torch.where(line < stride, starts[-1] + step + 1, starts[-1]))
        base += tokens[-1].shape[-1]
        capacity += order.capacity
    return _Lines(
        torch.cat(tokens, -1), slot, torch.cat(starts, -1), torch.cat(stops, -1), capacity
    )


@dataclass(frozen=True, eq=False)
class _StrideOrders:
    """One video in the phase-major order of every candidate stride, and an empty one at the end.

    Args:
        token_of_slot: int32 [strides + 1, slots], -1 = padding; a line is a whole number of blocks.
        slot_of_rank: int32 [strides + 1, n].
        blocks_per_line: int64 [strides + 1].
        capacity: a bound on the blocks that all lines of any stride list.
    """

    token_of_slot: Tensor
    slot_of_rank: Tensor
    blocks_per_line: Tensor
    capacity: int


@lru_cache(maxsize=32)
def _stride_orders(video: VideoGrid, strides: tuple[int, ...], size: int) -> _StrideOrders:
    """Depends on nothing that a layer decides: made once per prompt.

    Args:
        size: of a block.
    """
    # Cached tensors outlive the call: they must not be inference tensors.
    with torch.inference_mode(False):
        n = video.num_tokens
        per_line = [ceil_div(ceil_div(n, s), size) for s in strides]
        slots = max(s * per * size for s, per in zip(strides, per_line, strict=True))
        token = torch.full((len(strides) + 1, slots), -1, dtype=torch.int32)
        slot = torch.full((len(strides) + 1, n), -1, dtype=torch.int32)
        rank = torch.arange(n)
        for i, (stride, per) in enumerate(zip(strides, per_line, strict=True)):
            place = rank % stride * (per * size) + rank // stride
            token[i, place] = video.host_tokens.to(torch.int32)
            slot[i] = place
        # A query block sees its own line's blocks up to itself, and one more where the shift wraps.
        bound = max(s * (per * (per + 1) // 2) for s, per in zip(strides, per_line, strict=True))
        device = video.token_of_rank.device
        blocks = torch.tensor([*per_line, 1]).to(device)
        return _StrideOrders(token.to(device), slot.to(device), blocks, bound)
