"""The judge: plain torch, tiled over query blocks, float32 or float64 inside. Any device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from permattn.core.plan import AttnPart, TokenBand
from permattn.core.problem import BwdArgs, FwdArgs, Problem, empty_out

NAME = "reference"


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
