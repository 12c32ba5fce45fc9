"""Quantised attention in plain torch: the meaning of a QuantSpec, block by block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from permattn.backends.reference.prepare import prepare, prepared_rows
from permattn.backends.reference.tiles import Tile, tiles_of_part
from permattn.core.plan import AttnPart
from permattn.core.prepare import PrepareArgs, Smoothing, smoothing_of
from permattn.core.problem import FwdArgs, empty_out
from permattn.core.prologue import Prologue
from permattn.core.quant import FORMATS, QuantSpec, quantise_probabilities


def forward_quantised(args: FwdArgs) -> tuple[Tensor, Tensor]:
    """Integers are multiplied as floats: every sum of products stays below 2^24, so it is exact."""
    batch, heads, sq, _ = args.q.shape
    dtype = torch.promote_types(args.q.dtype, torch.float32)
    high = args.q.new_full((batch, heads, sq + 1), float("-inf"), dtype=dtype)
    total = torch.zeros_like(high)
    acc = args.q.new_zeros((batch, heads, sq + 1, args.v.shape[3]), dtype=dtype)
    smoothing = smoothing_of(args)
    empty = args.q.numel() == 0 or args.k.shape[2] == 0
    for part in () if empty else args.plan.parts:
        operands = _Operands.of(args, part, smoothing, dtype)
        for tile in tiles_of_part(part, batch, heads):
            row = tile.q_row
            score = operands.score(tile, args.scale)
            before = high.gather(2, row)
            now = torch.maximum(before, score.amax(-1))
            safe = torch.where(now == float("-inf"), 0.0, now)
            shrink = torch.exp(before - safe)
            value, weight = operands.values(tile, score, safe)
            high.scatter_(2, row, now)
            total.scatter_(2, row, total.gather(2, row) * shrink + weight)
            place = row[..., None].expand_as(value)
            acc.scatter_(2, place, acc.gather(2, place) * shrink[..., None] + value)
    high, total, acc = high[:, :, :-1], total[:, :, :-1], acc[:, :, :-1]
    seen = total > 0
    divisor = torch.where(seen, total, 1.0)
    out = empty_out(args.q, args.v)
    out.copy_(torch.where(seen[..., None], acc / divisor[..., None], 0.0))
    lse = high + torch.log(divisor)
    if smoothing.mean is not None:
        lse = lse + args.scale * _dot_mean(args, smoothing.mean).to(dtype)
    return out, torch.where(seen, lse, float("-inf"))


def _dot_mean(args: FwdArgs, mean: Tensor) -> Tensor:
    """[B, Hq, Sq]: what smoothing took from every score of a query, before the scale."""
    transform = None if args.prologue is None else args.prologue.q
    q = args.q.float() if transform is None else transform(args.q).float()
    group = args.q.shape[1] // mean.shape[1]
    return (q * mean.repeat_interleave(group, 1)[:, :, None]).sum(-1)


@dataclass(frozen=True, eq=False)
class _Operands:
    """Rows of one part in slot order, for all Hq heads, with a spare row of zeros at the end."""

    quant: QuantSpec
    q: Tensor  # [B, Hq, q slots + 1, D]
    k: Tensor
    v: Tensor
    q_scale: Tensor  # [B, Hq, q slots + 1]
    k_scale: Tensor
    v_scale: Tensor | None  # [B, Hq, groups + 1, Dv]

    @classmethod
    def of(cls, args: FwdArgs, part: AttnPart, smoothing: Smoothing, dtype: torch.dtype):
        quant, heads = args.plan.quant, args.q.shape[1]
        prologue = args.prologue or Prologue()
        q_token, kv_token = part.q_perm.token_of_slot, part.kv_perm.token_of_slot
        rows = quant.q_rows_per_scale, quant.kv_rows_per_scale
        q_args = PrepareArgs(
            args.q, q_token, prologue.q, None, smoothing.q_factor, quant.qk, rows[0]
        )
        k_args = PrepareArgs(
            args.k, kv_token, prologue.k, smoothing.mean, smoothing.k_factor, quant.qk, rows[1]
        )
        v_args = PrepareArgs(
            args.v, kv_token, fmt=quant.pv, rows_per_scale=rows[1], per_column=True
        )

        def slots(prepared: PrepareArgs) -> tuple[Tensor, Tensor]:
            if prepared.format is None:
                wide = prepared_rows(prepared).to(dtype)
                scale = wide.new_ones(wide.shape[:3])
            else:
                values, scale = prepare(prepared)
                wide = values.to(dtype)
                if not prepared.per_column:
                    scale = scale.repeat_interleave(prepared.rows_per_scale, -1)
                    scale = scale[..., : wide.shape[2]]
            group = heads // wide.shape[1]
            wide, scale = (x.repeat_interleave(group, 1) for x in (wide, scale.to(dtype)))
            pad = torch.nn.functional.pad
            per_slot = scale.dim() == 3
            return pad(wide, (0, 0, 0, 1)), pad(scale, (0, 1) if per_slot else (0, 0, 0, 1))

        q, q_scale = slots(q_args)
        k, k_scale = slots(k_args)
        v, v_scale = slots(v_args)
        return cls(quant, q, k, v, q_scale, k_scale, v_scale if quant.pv != "none" else None)

    def score(self, tile: Tile, scale: float) -> Tensor:
        q, k = _take(self.q, tile.q_slot), _take(self.k, tile.kv_slot)
        factor = self.q_scale.gather(2, tile.q_slot)[..., None] * scale
        s = (q @ k.mT) * factor * self.k_scale.gather(2, tile.kv_slot)[..., None, :]
        return torch.where(tile.visible, s, float("-inf"))

    def values(self, tile: Tile, score: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """(sum of p v [B, Hq, rows, Dv], sum of p [B, Hq, rows]), p relative to exp(high)."""
        v = _take(self.v, tile.kv_slot)
        if self.v_scale is None:
            p = torch.exp(score - high[..., None])
            return p @ v, p.sum(-1)
        fmt, rows = FORMATS[self.quant.pv], self.quant.kv_rows_per_scale
        # The last block of slots may be short: it is padded with slots that nobody sees.
        grouped = score.unflatten(-1, (-1, rows))
        block_high = grouped.amax(-1, keepdim=True)
        nothing = block_high == float("-inf")
        p = torch.exp(grouped - torch.where(nothing, 0.0, block_high))
        p = quantise_probabilities(p, fmt)
        weight = torch.exp(block_high[..., 0] - high[..., None]) / fmt.p_high
        group = tile.kv_slot.unflatten(-1, (-1, rows)).amin(-1) // rows
        v_scale = _take(self.v_scale, group.clamp_max(self.v_scale.shape[2] - 1))
        products = p.transpose(2, 3) @ v.unflatten(2, (-1, rows))
        products = products * v_scale[..., None, :] * weight.transpose(2, 3)[..., None]
        return products.sum(2), (weight * p.sum(-1)).sum(-1)


def _take(x: Tensor, row: Tensor) -> Tensor:
    return x.gather(2, row[..., None].expand(*row.shape, x.shape[3]))
