"""Tiles of a plan for the judge: one query block of one part, all batch rows and heads at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from permattn.core.plan import AttnPart, TokenBand
from permattn.core.problem import FwdArgs


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
class Tile:
    """One query block of one part, all batch rows and heads at once, with its listed keys padded.

    Every working tensor has one spare row of zeros at its end. Holes, padding, and keys that no
    query of the tile may see point there: they read zeros (so a NaN nobody sees stays out) and
    write waste.
    """

    q_row: Tensor  # int64 [B, Hq, block_q]
    kv_row: Tensor  # int64 [B, Hq, n]
    visible: Tensor  # bool [B, Hq, block_q, n]
    q_slot: Tensor  # int64, as q_row, in slots; num_slots where nothing is
    kv_slot: Tensor  # int64, as kv_row; a padded block keeps the slots that are its own

    def score(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        s = (rows_of(q, self.q_row) @ rows_of(k, self.kv_row).mT) * scale
        return torch.where(self.visible, s, float("-inf"))


def tiles(args: FwdArgs) -> Iterator[Tile]:
    batch, heads = args.q.shape[:2]
    if args.q.numel() == 0 or args.k.shape[2] == 0 or batch * heads == 0:
        return
    for part in args.plan.parts:
        yield from tiles_of_part(part, batch, heads)


def tiles_of_part(part: AttnPart, batch: int, heads: int) -> Iterator[Tile]:
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
        in_range = ((slot < part.kv_perm.num_slots) & used[..., None]).flatten(-2)
        kv_slot = torch.where(in_range, slot.flatten(-2), part.kv_perm.num_slots)
        slot = torch.where(in_range, kv_slot, 0)
        kv_token = torch.where(in_range, kv_tokens.gather(-1, slot), -1)
        first = i * index.block_q
        q_token = q_tokens[..., first : first + index.block_q]
        visible = token_is_visible(q_token[..., None], kv_token[..., None, :], part.band)
        # A full block has no band to check, but a hole is a hole.
        full = (entry < num_full[..., i : i + 1]).repeat_interleave(index.block_kv, -1)
        both = (q_token >= 0)[..., None] & (kv_token >= 0)[..., None, :]
        visible |= full[..., None, :] & both
        q_slot = torch.arange(first, first + q_token.shape[-1], device=offsets.device)
        yield Tile(
            q_row=torch.where(q_token >= 0, q_token, part.q_perm.num_tokens).long(),
            kv_row=torch.where(visible.any(-2), kv_token, part.kv_perm.num_tokens).long(),
            visible=visible,
            q_slot=q_slot.expand(batch, heads, -1),
            kv_slot=kv_slot,
        )


def working(x: Tensor, num_heads: int | None = None) -> Tensor:
    """float32 (float64 stays), K/V heads repeated to `num_heads`, one spare row of zeros."""
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if num_heads is not None and x.shape[1] != num_heads:
        x = x.repeat_interleave(num_heads // x.shape[1], 1)
    return torch.nn.functional.pad(x, (0, 0, 0, 1))


def rows_of(x: Tensor, row: Tensor) -> Tensor:
    return x.gather(2, row[..., None].expand(*row.shape, x.shape[3]))


def add_rows(x: Tensor, row: Tensor, value: Tensor) -> None:
    x.scatter_add_(2, row[..., None].expand_as(value), value)
