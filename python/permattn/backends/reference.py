"""The judge: plain torch, tiled over query blocks, float32 or float64 inside. Any device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from permattn.core.plan import AttnPart, TokenBand
from permattn.core.probe import Masses, ProbeArgs, ProbeProblem
from permattn.core.problem import BwdArgs, FwdArgs, Problem, empty_out

NAME = "reference"
# Bytes of one chunk of probe scores.
_PROBE_CHUNK_BYTES = 1 << 26


def why_not(problem: Problem) -> str | None:
    if not problem.dtype.is_floating_point:
        return f"needs a floating dtype, got {problem.dtype}"
    if problem.quant.is_quantised:
        return "does not quantise"
    return None


def forward(args: FwdArgs) -> tuple[Tensor, Tensor]:
    heads = args.q.shape[1]
    q, k, v = _working(args.q), _working(args.k, heads), _working(args.v, heads)
    # One running softmax over all parts: row maximum, row sum, unnormalised output.
    high = q.new_full(q.shape[:3], float("-inf"))
    total = q.new_zeros(q.shape[:3])
    acc = q.new_zeros(*q.shape[:3], v.shape[3])
    for tile in _tiles(args):
        row = tile.q_row
        score = tile.score(q, k, args.scale)
        before = high.gather(2, row)
        now = torch.maximum(before, score.amax(-1))
        safe = torch.where(now == float("-inf"), 0.0, now)
        p = torch.exp(score - safe[..., None])
        shrink = torch.exp(before - safe)
        high.scatter_(2, row, now)
        total.scatter_(2, row, total.gather(2, row) * shrink + p.sum(-1))
        value = _rows(acc, row) * shrink[..., None] + p @ _rows(v, tile.kv_row)
        acc.scatter_(2, row[..., None].expand_as(value), value)
    high, total, acc = high[:, :, :-1], total[:, :, :-1], acc[:, :, :-1]
    seen = total > 0
    divisor = torch.where(seen, total, 1.0)
    out = empty_out(args.q, args.v)
    out.copy_(torch.where(seen[..., None], acc / divisor[..., None], 0.0))
    lse = torch.where(seen, high + torch.log(divisor), float("-inf"))
    return out, lse


def backward(args: BwdArgs) -> tuple[Tensor, Tensor, Tensor]:
    heads, num_kv_heads = args.q.shape[1], args.k.shape[1]
    q, k, v = _working(args.q), _working(args.k, heads), _working(args.v, heads)
    out, dout = _working(args.out), _working(args.dout)
    pad = torch.nn.functional.pad
    lse = pad(args.lse.to(q.dtype), (0, 1))
    lse = torch.where(lse == float("-inf"), 0.0, lse)
    delta = (out * dout).sum(-1) - pad(args.dlse.to(q.dtype), (0, 1))
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for tile in _tiles(FwdArgs(args.q, args.k, args.v, args.plan, args.scale)):
        p = torch.exp(tile.score(q, k, args.scale) - lse.gather(2, tile.q_row)[..., None])
        dout_rows = _rows(dout, tile.q_row)
        dp = dout_rows @ _rows(v, tile.kv_row).mT
        ds = p * (dp - delta.gather(2, tile.q_row)[..., None]) * args.scale
        _add_rows(dq, tile.q_row, ds @ _rows(k, tile.kv_row))
        _add_rows(dk, tile.kv_row, ds.mT @ _rows(q, tile.q_row))
        _add_rows(dv, tile.kv_row, p.mT @ dout_rows)
    group = heads // max(num_kv_heads, 1)
    dk, dv = (x.unflatten(1, (num_kv_heads, group)).sum(2) for x in (dk, dv))
    grads = ((dq, args.q), (dk, args.k), (dv, args.v))
    dq, dk, dv = (g[:, :, :-1].to(x.dtype) for g, x in grads)
    return dq, dk, dv


def token_is_visible(q_token: Tensor, kv_token: Tensor, band: TokenBand) -> Tensor:
    """The token rule (see csrc/common/token_rule.h and triton_kernels/token_rule.py for its twins).

    Args:
        q_token, kv_token: integer tensors that broadcast; -1 = hole.
    """
    seen = (q_token >= 0) & (kv_token >= 0)
    lag = q_token.long() - kv_token.long()
    if band.min_lag is not None:
        seen &= lag >= band.min_lag
    if band.max_lag is not None:
        seen &= lag < band.max_lag
    return seen


@dataclass(frozen=True, eq=False)
class _Tile:
    """One query block of one part, all batch rows and heads at once, with its listed keys padded.

    Every working tensor has one spare row of zeros at its end. Holes, padding, and keys that no
    query of the tile may see point there: they read zeros (so a NaN nobody sees stays out) and
    write waste.
    """

    q_row: Tensor  # int64 [B, Hq, block_q]
    kv_row: Tensor  # int64 [B, Hq, n]
    visible: Tensor  # bool [B, Hq, block_q, n]

    def score(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        s = (_rows(q, self.q_row) @ _rows(k, self.kv_row).mT) * scale
        return torch.where(self.visible, s, float("-inf"))


def _tiles(args: FwdArgs) -> Iterator[_Tile]:
    batch, heads = args.q.shape[:2]
    if args.q.numel() == 0 or args.k.shape[2] == 0 or batch * heads == 0:
        return
    for part in args.plan.parts:
        yield from _tiles_of_part(part, batch, heads)


def _tiles_of_part(part: AttnPart, batch: int, heads: int) -> Iterator[_Tile]:
    index = part.index
    if index.capacity == 0:
        return

    def wide(x: Tensor) -> Tensor:
        return x.expand(batch, heads, -1)

    offsets, kv_indices = wide(index.row_offsets).long(), wide(index.kv_indices).long()
    q_tokens, kv_tokens = wide(part.q_perm.token_of_slot), wide(part.kv_perm.token_of_slot)
    num_full = wide(index.kv_num_full)
    # One sync for the longest row of every query block: the judge may wait.
    longest = (offsets[..., 1:] - offsets[..., :-1]).amax((0, 1)).tolist()
    for i, count in enumerate(longest):
        if count == 0:
            continue
        entry = torch.arange(count, device=offsets.device)
        place = offsets[..., i : i + 1] + entry
        used = place < offsets[..., i + 1 : i + 2]
        block = kv_indices.gather(-1, place.clamp_max(index.capacity - 1))
        slot = block[..., None] * index.block_kv + torch.arange(
            index.block_kv, device=offsets.device
        )
        in_range = (slot < part.kv_perm.num_slots) & used[..., None]
        slot = torch.where(in_range, slot, 0).flatten(-2)
        kv_token = torch.where(in_range.flatten(-2), kv_tokens.gather(-1, slot), -1)
        first = i * index.block_q
        q_token = q_tokens[..., first : first + index.block_q]
        visible = token_is_visible(q_token[..., None], kv_token[..., None, :], part.band)
        # A full block has no band to check, but a hole is a hole.
        full = (entry < num_full[..., i : i + 1]).repeat_interleave(index.block_kv, -1)
        both = (q_token >= 0)[..., None] & (kv_token >= 0)[..., None, :]
        visible |= full[..., None, :] & both
        yield _Tile(
            q_row=torch.where(q_token >= 0, q_token, part.q_perm.num_tokens).long(),
            kv_row=torch.where(visible.any(-2), kv_token, part.kv_perm.num_tokens).long(),
            visible=visible,
        )


def _working(x: Tensor, num_heads: int | None = None) -> Tensor:
    """float32 (float64 stays), K/V heads repeated to `num_heads`, one spare row of zeros."""
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if num_heads is not None and x.shape[1] != num_heads:
        x = x.repeat_interleave(num_heads // x.shape[1], 1)
    return torch.nn.functional.pad(x, (0, 0, 0, 1))


def _rows(x: Tensor, row: Tensor) -> Tensor:
    return x.gather(2, row[..., None].expand(*row.shape, x.shape[3]))


def _add_rows(x: Tensor, row: Tensor, value: Tensor) -> None:
    x.scatter_add_(2, row[..., None].expand_as(value), value)


def why_not_probe(problem: ProbeProblem) -> str | None:
    if not problem.dtype.is_floating_point:
        return f"needs a floating dtype, got {problem.dtype}"
    return None


def probe(args: ProbeArgs) -> Masses:
    """See `Backend.probe`. Chunked over the coordinates; no host sync, so meta tensors pass too."""
    batch, heads, rows, _ = args.q.shape
    n = args.num_coordinates
    dtype = torch.promote_types(args.q.dtype, torch.float32)
    lse = args.q.new_full((batch, heads, rows), float("-inf"), dtype=dtype)
    column, square = (args.q.new_zeros(batch, heads, n, dtype=dtype) for _ in range(2))
    skew = args.q.new_zeros(batch, heads, n + rows - 1, dtype=dtype)
    size = max(1024, _PROBE_CHUNK_BYTES // max(1, 4 * batch * heads * rows))
    bounds = [(i, min(i + size, n)) for i in range(0, n if args.k.shape[2] else 0, size)]
    whole = _probe_scores(args, *bounds[0]) if len(bounds) == 1 else None
    if args.lse is not None:
        lse = args.lse.to(dtype, copy=True)  # an operator must not return its input
    else:
        for bound in bounds:
            score = _probe_scores(args, *bound) if whole is None else whole
            lse = torch.logaddexp(lse, score.logsumexp(-1))
    # A row that sees nothing: exp(-inf - inf) is 0, where exp(-inf - -inf) is NaN.
    divisor = torch.where(lse == float("-inf"), float("inf"), lse)[..., None]
    for start, stop in bounds:
        score = _probe_scores(args, start, stop) if whole is None else whole
        p = score.sub_(divisor).exp_()
        column[..., start:stop] = p.mean(2)
        square[..., start:stop] = p.square().mean(2)
        if args.skip is not None:
            p.masked_fill_(args.skip[:, :, None, start:stop], 0.0)
        skew[..., start : stop + rows - 1] += _skewed_sum(p)
    diagonal = _lags_of_skew(skew, args.first_coordinate.long() + rows - 1, n) / rows
    return lse.float(), column.float(), square.float(), diagonal.float()


def _probe_scores(args: ProbeArgs, start: int, stop: int) -> Tensor:
    """[B, Hq, R, stop - start], float32 or float64; -inf where a row does not see the key."""
    q, k = args.q, args.k
    batch, heads, rows, dim = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    if args.order is None:
        key = torch.arange(start, stop, device=q.device)[None]
        k = k[:, :, start:stop]
    else:
        key = args.order[:, start:stop].long()
        row = key.clamp(0, k.shape[2] - 1).expand(batch, -1)[:, None, :, None]
        k = k.gather(2, row.expand(batch, k.shape[1], -1, dim))
    begin, end = args.key_range[:, :1], args.key_range[:, 1:]
    known = (key >= begin) & (key < end) & (key >= 0) & (key < args.k.shape[2])
    known = known & (args.first_position >= 0)[:, None]
    position = args.first_position.long()[:, None] + torch.arange(rows, device=q.device)
    seen = known[:, None] & (key[:, None] <= position[..., None])
    stacked = q.to(dtype).reshape(batch, k.shape[1], heads // k.shape[1] * rows, dim)
    score = (stacked @ k.to(dtype).mT).view(batch, heads, rows, stop - start)
    return score.masked_fill_(~seen[:, None], float("-inf"))


def _skewed_sum(p: Tensor) -> Tensor:
    """Sums along diagonals: [..., R, n] -> [..., n + R - 1]; entry s sums p[r, s - (R - 1) + r]."""
    rows, n = p.shape[-2:]
    if n < 2 * rows:
        # A padded row is R longer than p's; read with one column less, row r moves right by r.
        flat = torch.nn.functional.pad(p.flip(-2), (0, rows)).flatten(-2)
        flat = flat[..., : rows * (n + rows - 1)].unflatten(-1, (rows, n + rows - 1))
        return flat.sum(-2)
    # Diagonals that cross every row are read where they lie; the two corners are small.
    p = p.contiguous()
    strides = (*p.stride()[:-2], n + 1, 1)
    middle = p.as_strided((*p.shape[:-1], n - rows + 1), strides, p.storage_offset()).sum(-2)
    first, last = _skewed_sum(p[..., : rows - 1]), _skewed_sum(p[..., n - rows + 1 :])
    return torch.cat((first[..., : rows - 1], middle, last[..., rows - 1 :]), -1)


def _lags_of_skew(skew: Tensor, last: Tensor, n: int) -> Tensor:
    """[B, Hq, n] by lag, of `_skewed_sum`'s [B, Hq, m], whose entry s has lag last - s.

    Args:
        last: int64 [B], coordinate of the last row.
    """
    place = last[:, None] - torch.arange(n, device=skew.device)
    inside = (place >= 0) & (place < skew.shape[-1])
    place = torch.where(inside, place, 0)[:, None].expand(*skew.shape[:2], n)
    return torch.where(inside[:, None], skew.gather(-1, place), 0.0)
