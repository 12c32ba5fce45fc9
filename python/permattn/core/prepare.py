"""Rows of q, k or v made ready for a kernel: transformed, permuted and quantised in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from permattn.core.permutation import Permutation
from permattn.core.problem import FwdArgs
from permattn.core.prologue import Prologue, RowTransform
from permattn.core.quant import FORMATS, LEAST_MAXIMUM, Format


@dataclass(frozen=True, eq=False)
class PrepareArgs:
    """One pass over x.

    Args:
        x: [B, H, S, D], any strides, last one 1.
        token_of_slot: int32 [Bx, Hx, n], the order of the result; holes become zero rows. None =
            token order. Hx is 1, H, or Hq (a multiple of H: query heads that share a key head but
            not an order); the result has Hp = max(H, Hx) heads.
        transform: norm and rotation, done first. None = none.
        mean, factor: float32 [B, H, D], subtracted from every row and multiplied into it, in this
            order, before quantising; None = nothing is.
        fmt: "none" keeps x's dtype and makes no scales; else a name of `quant.FORMATS`.
        rows_per_scale, per_column: see `quant.quantise`.
    """

    x: Tensor
    token_of_slot: Tensor | None = None
    transform: RowTransform | None = None
    mean: Tensor | None = None
    factor: Tensor | None = None
    fmt: str = "none"
    rows_per_scale: int = 64
    per_column: bool = False

    @property
    def format(self) -> Format | None:
        return FORMATS.get(self.fmt)

    @property
    def num_heads(self) -> int:
        """Hp, heads of the result."""
        return max(
            self.x.shape[1], 1 if self.token_of_slot is None else self.token_of_slot.shape[1]
        )

    @property
    def num_slots(self) -> int:
        return self.x.shape[2] if self.token_of_slot is None else self.token_of_slot.shape[-1]


Prepared = tuple[Tensor, Tensor]
"""rows [B, Hp, n, D] of the format's dtype (x's for "none"), and scales: float32 [B, Hp, groups] or
[B, Hp, groups, D]; empty for "none"."""


def empty_prepared(args: PrepareArgs) -> Prepared:
    """Uninitialised contiguous results."""
    x, fmt = args.x, args.format
    batch, dim = x.shape[0], x.shape[3]
    shape = (batch, args.num_heads, args.num_slots)
    if fmt is None:
        return x.new_empty((*shape, dim)), x.new_empty(0, dtype=torch.float32)
    groups = -(-args.num_slots // args.rows_per_scale)
    scale = (*shape[:2], groups, dim) if args.per_column else (*shape[:2], groups)
    return (
        x.new_empty((*shape, dim), dtype=fmt.dtype),
        x.new_empty(scale, dtype=torch.float32),
    )


@dataclass(frozen=True, eq=False)
class Smoothing:
    """What is done to columns before rows are quantised; the softmax does not see it.

    Args:
        mean: float32 [B, Hkv, D], taken from every key: all scores of a query move by one number.
        k_factor: float32 [B, Hkv, D], multiplies the keys' columns.
        q_factor: its inverse, float32 [B, Hq, D], multiplies the queries'.
    """

    mean: Tensor | None = None
    k_factor: Tensor | None = None
    q_factor: Tensor | None = None


def smoothing_of(args: FwdArgs) -> Smoothing:
    """What `QuantSpec.smooth_k` and `balance` ask for, over the tokens that stand in any slot.

    A key counts once, whichever query heads and parts list it; keys in no slot are not read, so a
    NaN there stays out. A column of no magnitude keeps the factor 1.
    """
    quant, parts = args.plan.quant, args.plan.parts
    if not (quant.smooth_k or quant.balance):
        return Smoothing()
    prologue = args.prologue or Prologue()
    k = _seen_rows(args.k, [p.kv_perm for p in parts], prologue.k)
    mean = k.sum(2) / k.count if quant.smooth_k else None
    if not quant.balance:
        return Smoothing(mean)
    q = _seen_rows(args.q, [p.q_perm for p in parts], prologue.q)
    centred = k.rows if mean is None else torch.where(k.seen, k.rows - mean[:, :, None], 0.0)
    return Smoothing(mean, *_balanced(args, q.rows.abs().amax(2), centred.abs().amax(2)))


def _balanced(args: FwdArgs, q_high: Tensor, k_high: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the columns of k and q, out of their largest magnitudes, [B, Hq or Hkv, D]."""
    batch, heads, dim = args.q.shape[0], args.k.shape[1], args.q.shape[3]
    q_high = q_high.view(batch, heads, -1, dim).amax(2)
    flat = (q_high < LEAST_MAXIMUM) | (k_high < LEAST_MAXIMUM)
    k_factor = torch.where(flat, 1.0, (q_high / k_high).sqrt())
    return k_factor, (1.0 / k_factor).repeat_interleave(args.q.shape[1] // heads, 1)


ColumnStatistics = Callable[
    [Tensor, RowTransform | None, Tensor | None], tuple[Tensor, Tensor, Tensor]
]
"""(x, transform, seen) -> sum, minimum and maximum of transformed columns, float32 [B, H, D], over
the tokens of `seen` (bool [1 or B, 1 or H, S], contiguous; None = all)."""


def smoothing_from_columns(args: FwdArgs, statistics: ColumnStatistics) -> Smoothing:
    """`smoothing_of` for backends that read k once, and q once where columns are balanced."""
    quant, parts = args.plan.quant, args.plan.parts
    if not (quant.smooth_k or quant.balance):
        return Smoothing()
    prologue = args.prologue or Prologue()
    seen = _seen_tokens(args.k, [p.kv_perm for p in parts])
    total, low, high = statistics(args.k, prologue.k, seen)
    mean = None
    if quant.smooth_k:
        mean = total / (
            max(args.k.shape[2], 1) if seen is None else seen.sum(-1, keepdim=True).clamp_min(1)
        )
    if not quant.balance:
        return Smoothing(mean)
    if mean is not None:
        low, high = low - mean, high - mean
    k_high = torch.maximum(high, -low)
    seen = _seen_tokens(args.q, [p.q_perm for p in parts])
    _, low, high = statistics(args.q, prologue.q, seen)
    return Smoothing(mean, *_balanced(args, torch.maximum(high, -low), k_high))


def _seen_tokens(x: Tensor, perms: Sequence[Permutation]) -> Tensor | None:
    """Tokens of x in a slot of some order, bool [1 or B, 1 or H, S]; None = all."""
    if any(perm.is_identity for perm in perms):
        return None
    seen: Tensor | None = None
    for perm in perms:
        there = perm.slot_of_token >= 0
        if there.shape[1] > x.shape[1]:
            there = there.unflatten(1, (x.shape[1], -1)).any(2)
        seen = there if seen is None else seen | there
    return None if seen is None else seen.contiguous()


@dataclass(frozen=True, eq=False)
class _SeenRows:
    """Transformed rows in float32, zeros where no slot holds the token; and how many are held."""

    rows: Tensor  # [B, H, S, D]
    seen: Tensor  # bool [B, H, S, 1]

    def sum(self, axis: int) -> Tensor:
        return self.rows.sum(axis)

    @property
    def count(self) -> Tensor:
        return self.seen.sum(2).clamp_min(1)


def _seen_rows(
    x: Tensor, perms: Sequence[Permutation], transform: RowTransform | None
) -> _SeenRows:
    rows = x.float() if transform is None else transform(x).float()
    batch, heads, tokens, _ = x.shape
    if any(perm.is_identity for perm in perms):
        return _SeenRows(rows, torch.ones_like(rows[..., :1], dtype=torch.bool))
    seen = torch.zeros(batch, heads, tokens, dtype=torch.bool, device=x.device)
    for perm in perms:
        there = perm.slot_of_token >= 0
        if there.shape[1] > heads:
            there = there.unflatten(1, (heads, -1)).any(2)
        seen |= there
    return _SeenRows(torch.where(seen[..., None], rows, 0.0), seen[..., None])
