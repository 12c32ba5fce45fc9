"""The online probe: where the last rows of a prompt put their attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from permattn.patterns.mminference.prompt import Prompt, VideoGrid

LAST_Q = 64
# Bytes of one chunk of probe scores: the probe never holds last_q x Skv for long prompts.
_CHUNK_BYTES = 1 << 26


@dataclass(frozen=True, eq=False)
class Probe:
    """Softmax of `rows` consecutive queries per batch row, read chunk by chunk.

    Args:
        q: [B, Hkv, G * rows, D], scaled.
        k: [B, Hkv, Skv, D].
        position: int64 [B, rows]: key position at which each probe row stands.
        first_position: the same for the first row of every batch row, on the host.
        lse: float32 [B, Hkv, G * rows].
        prompt: sizes.
        whole: all probabilities, kept when they fit one chunk.
    """

    q: Tensor
    k: Tensor
    position: Tensor
    first_position: tuple[int, ...]
    lse: Tensor
    prompt: Prompt
    whole: Tensor | None

    @property
    def heads(self) -> int:
        return self.q.shape[1] * self.q.shape[2] // self.position.shape[1]

    def chunks(self) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, probabilities float32 [B, Hq, rows, stop - start])."""
        if self.whole is not None:
            yield 0, self.prompt.num_kv, self.whole
            return
        for start, stop in _chunk_bounds(self.q, self.k):
            score = _scores(self, start, stop).float()
            p = score.sub_(self.lse[..., None]).exp_()
            yield start, stop, p.view(p.shape[0], self.heads, -1, stop - start)


def make_probe(q: Tensor, k: Tensor, prompt: Prompt, *, visual: bool) -> Probe:
    """Probes the last rows of every batch row.

    Source: MMInference, Algorithm 1 (last_q = 64). Deviation: with `visual` the rows end at the
    last visual query, since rows of the trailing text do not show how visual rows attend.

    Args:
        q: [B, Hq, Sq, D]; k: [B, Hkv, Skv, D].
        visual: end at the last visual query where the prompt has one.
    """
    batch, heads, _, head_dim = q.shape
    group = heads // k.shape[1]
    ends = []
    for i in range(batch):
        seen = prompt.last_visual(i) if visual else None
        ends.append(prompt.stop[i] if seen is None else seen)
    low = [max(prompt.q_offset, first) for first in prompt.first]
    rows = max(1, min([LAST_Q, *(end - lo for end, lo in zip(ends, low, strict=True))]))
    begin = tuple(max(end - rows, 0) for end in ends)
    position = torch.tensor(begin)[:, None] + torch.arange(rows)
    position = position.to(q.device, non_blocking=True)
    row = (position - prompt.q_offset).clamp(0, q.shape[2] - 1)
    picked = q.gather(2, row[:, None, :, None].expand(batch, heads, rows, head_dim))
    picked = (picked * head_dim**-0.5).reshape(batch, k.shape[1], group * rows, head_dim)
    total = torch.full(picked.shape[:3], float("-inf"), device=q.device)
    probe = Probe(picked, k, position, begin, total, prompt, None)
    bounds = _chunk_bounds(picked, k)
    # A probe row that sees nothing (padding) has no finite score; zeros do no harm.
    if len(bounds) == 1:
        # In place: torch.softmax would hold three of these at once.
        whole = _scores(probe, 0, prompt.num_kv).float()
        whole.sub_(whole.amax(-1, keepdim=True)).exp_()
        whole.div_(whole.sum(-1, keepdim=True))
        whole = whole.nan_to_num_(0.0) if prompt.padded else whole
        return replace(probe, whole=whole.view(batch, heads, rows, -1))
    for start, stop in bounds:
        total = torch.logaddexp(total, _scores(probe, start, stop).float().logsumexp(-1))
    return replace(probe, lse=torch.where(total == float("-inf"), 0.0, total))


def column_mass(probe: Probe) -> Tensor:
    """float32 [B, Hq, Skv]: share of the probe's mass that each key gets; sums to 1."""
    mass = torch.empty(probe.q.shape[0], probe.heads, probe.prompt.num_kv, device=probe.q.device)
    for start, stop, p in probe.chunks():
        torch.mean(p, dim=2, out=mass[..., start:stop])
    return mass


def diagonal_mass(probe: Probe, without: Tensor | None = None) -> Tensor:
    """float32 [B, Hq, Skv]: the probe's mass at every lag (row position - key position).

    Args:
        without: bool [B, Hq, Skv], keys whose mass does not count. They are cleared in the probe
            itself, so this comes last: another copy would be the planner's largest tensor.
    """
    rows = probe.position.shape[1]
    batch, heads, num_kv = probe.q.shape[0], probe.heads, probe.prompt.num_kv
    skew = torch.zeros(batch, heads, num_kv + rows, device=probe.q.device)
    for start, stop, p in probe.chunks():
        if without is not None:
            p.masked_fill_(without[:, :, None, start:stop], 0.0)
        skew[..., start : stop + rows - 1] += _skewed_sum(p)
    # Column c of the skew collects key c - (rows - 1 - r) of row r: the lag is last position - c.
    lag = torch.arange(num_kv, device=probe.q.device)
    place = probe.position[:, -1:] - lag
    inside = place >= 0
    place = place.clamp_min(0)[:, None].expand(batch, heads, num_kv)
    return torch.where(inside[:, None], skew.gather(-1, place), 0.0) / rows


def vertical_mass(
    mass: Tensor, grid: VideoGrid, strides: tuple[int, ...], before: int
) -> list[tuple[Tensor, Tensor]]:
    """Mass on every vertical line of each stride, over the keys before a position.

    Args:
        mass: float32 [Hq, Skv], see `column_mass`.
        strides, before: see `slash_mass`.

    Returns: per stride (sum, spread), each [Hq, stride]: sum[p] adds keys of rank p modulo the
        stride; spread[p] is the share of the line's keys that carry it (1 = all, 1 / n = one).
    """
    count = int(torch.searchsorted(grid.host_tokens, max(before, 0)))
    on_grid = mass.index_select(-1, grid.token_of_rank[:count])
    found = []
    for stride in strides:
        lines = torch.nn.functional.pad(on_grid, (0, -count % stride)).unflatten(-1, (-1, stride))
        total = lines.sum(-2)
        members = max(1, lines.shape[-2])
        square = members * lines.square().sum(-2)
        found.append((total, total.square() / square.clamp_min(torch.finfo(square.dtype).tiny)))
    return found


def slash_mass(
    probe: Probe, batch_row: int, grid: VideoGrid, strides: tuple[int, ...], before: int
) -> list[Tensor]:
    """Mass on every slash line of each stride, over the keys before a position.

    Args:
        strides: candidate strides in visual tokens.
        before: keys at or past this position are left out (the local window finds those anyway).

    Returns: per stride [Hq, stride]: entry c sums pairs whose rank difference is c modulo the
        stride, over the probe rows that stand in the grid.
    """
    heads, rows = probe.heads, probe.position.shape[1]
    device = probe.q.device
    sums = [torch.zeros(heads, rows, s, device=device) for s in strides]
    tokens = grid.host_tokens[: int(torch.searchsorted(grid.host_tokens, max(before, 0)))]
    for start, stop, p in probe.chunks():
        lo, hi = (int(torch.searchsorted(tokens, x)) for x in (start, stop))
        if lo >= hi:
            continue
        first, last = int(tokens[lo]), int(tokens[hi - 1])
        if last - first == hi - lo - 1:
            part = p[batch_row, :, :, first - start : last - start + 1]
        else:
            index = (tokens[lo:hi] - start).to(device, non_blocking=True)
            part = p[batch_row].index_select(-1, index)
        for total, stride in zip(sums, strides, strict=True):
            # Whole strides without a copy; what is left is shorter than one.
            whole = (hi - lo) // stride * stride
            by_phase = part[..., :whole].unflatten(-1, (-1, stride)).sum(-2)
            by_phase[..., : hi - lo - whole] += part[..., whole:]
            total += by_phase.roll(lo % stride, -1)
    # Rank of the probe rows inside the grid; rows outside (timestamps) take no part in slash lines.
    position = probe.first_position[batch_row] + torch.arange(rows)
    known = torch.searchsorted(grid.host_tokens, position).clamp_max(grid.num_tokens - 1)
    inside = (grid.host_tokens[known] == position).float()
    weight = (inside / inside.sum().clamp_min(1.0)).to(device, non_blocking=True)
    known = known.to(device, non_blocking=True)
    found = []
    for total, stride in zip(sums, strides, strict=True):
        phase = (known[:, None] - torch.arange(stride, device=device)) % stride
        slash = total.gather(-1, phase.expand(heads, -1, -1))
        found.append((slash * weight[:, None]).sum(1))
    return found


def _chunk_bounds(q: Tensor, k: Tensor) -> list[tuple[int, int]]:
    num_kv = k.shape[2]
    per_key = 4 * q.shape[0] * q.shape[1] * q.shape[2]
    size = max(1024, _CHUNK_BYTES // max(per_key, 1))
    return [(i, min(i + size, num_kv)) for i in range(0, num_kv, size)]


def _scores(probe: Probe, start: int, stop: int) -> Tensor:
    """[B, Hkv, G * rows, stop - start], -inf where causality or padding hides the key."""
    score = probe.q @ probe.k[:, :, start:stop].mT
    rows = score.unflatten(2, (-1, probe.position.shape[1]))
    device = score.device
    # Only the keys around the probe rows, and those around the left padding, need a look.
    tail = min(max(min(probe.first_position), start), stop)
    if tail < stop:
        key = torch.arange(tail, stop, device=device)
        hidden = key > probe.position[..., None]
        rows[..., tail - start :].masked_fill_(hidden[:, None, None], float("-inf"))
    head = min(max(*probe.prompt.first, start, start), stop)
    if head > start:
        key = torch.arange(start, head, device=device)
        first = torch.tensor(probe.prompt.first).to(device, non_blocking=True)
        hidden = (key < first[:, None])[:, None, None, None]
        rows[..., : head - start].masked_fill_(hidden, float("-inf"))
    return score


def _skewed_sum(p: Tensor) -> Tensor:
    """Sums along diagonals: [..., rows, n] -> [..., n + rows - 1].

    Entry c sums p[r, c - (rows - 1) + r] over the rows where that key exists.
    """
    rows, n = p.shape[-2:]
    if n < 2 * rows:
        # Row r of the flipped matrix, shifted right by r: a flat reshape with one column less.
        flat = torch.nn.functional.pad(p.flip(-2), (0, rows)).flatten(-2)
        flat = flat[..., : rows * (n + rows - 1)].unflatten(-1, (rows, n + rows - 1))
        return flat.sum(-2)
    # Diagonals that cross every row, read where they lie; the corners are small.
    p = p.contiguous()
    strides = (*p.stride()[:-2], n + 1, 1)
    middle = p.as_strided((*p.shape[:-1], n - rows + 1), strides).sum(-2)
    first, last = _skewed_sum(p[..., : rows - 1]), _skewed_sum(p[..., n - rows + 1 :])
    return torch.cat((first[..., : rows - 1], middle, last[..., rows - 1 :]), -1)
