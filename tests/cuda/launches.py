"""A plan and its tensors as launches of the attention kernel, on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from permattn.core import AttnPart, AttnPlan, Permutation
from permattn.core.quant import FORMATS, quantise
from torch import Tensor

LOG2E = 1.4426950408889634
MAX_PARTS = 4
# Where a token of sixteen (bytes) or thirty-two (nibbles) lies in V's tiles.
BYTE_ORDER = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)
NIBBLE_ORDER = tuple(8 * j + 2 * t + e for t in range(4) for j in range(4) for e in range(2))


def run_here(shim, args, config, tensors: list[Tensor]) -> None:
    """Runs a launch whose structs point into `tensors`."""
    shim.attend(args, config)


@dataclass(frozen=True, eq=False)
class Call:
    """One call of the kernel's host side.

    Args:
        order: an order of a head's items of work (tiles; pairs of them where `Config` says so),
            for all heads; None = the kernel's own.
        in_slots: k and v are brought into slot order before, where they are not quantised.
        run: as `run_here`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    plan: AttnPlan
    scale: float
    capability: int = 80
    order: Tensor | None = None
    in_slots: bool = False
    run: Callable[..., None] = run_here


def attend(shim, call: Call) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Sq, Dv] and lse [B, Hq, Sq]; memory that is not written is NaN."""
    q, v = call.q, call.v
    batch, heads, sq, _ = q.shape
    out = q.new_full((batch, heads, sq, v.shape[3]), float("nan"))
    lse = torch.full((batch, heads, sq), float("nan"))
    runs = _runs(call.plan)
    covers = len(runs) == 1 and call.plan.parts[0].q_perm.is_identity
    if not covers:
        out.zero_()
        lse.fill_(-math.inf)
    state = None
    if len(runs) > 1:
        acc = torch.zeros(batch, heads, sq, v.shape[3])
        state = (acc, torch.full_like(lse, -math.inf), torch.zeros_like(lse))
    for run in runs:
        _launch(shim, call, run, out, lse, state)
    if state is not None:
        acc, high, total = state
        empty = total == 0
        divisor = torch.where(empty, 1.0, total)
        out = (acc / divisor[..., None]).to(q.dtype)
        lse = torch.where(empty, -math.inf, (high + divisor.log2()) / LOG2E)
    return out, lse


def _runs(plan: AttnPlan) -> list[list[AttnPart]]:
    """Parts of one query order together, as many as a launch takes."""
    groups: dict[int, list[AttnPart]] = {}
    for part, group in zip(plan.parts, plan.q_groups(), strict=True):
        groups.setdefault(group, []).append(part)
    runs = []
    for parts in groups.values():
        cuts = [*range(0, len(parts), MAX_PARTS), len(parts)]
        runs += [parts[a:b] for a, b in pairwise(cuts)]
    return runs


class _Args:
    """AttentionArgs, and the tensors that it points into."""

    def __init__(self, shim) -> None:
        self.shim = shim
        self.kept: list[Tensor] = []

    def pointer(self, x: Tensor) -> int:
        self.kept.append(x)
        return x.data_ptr()

    def tensor(self, x: Tensor):
        assert x.stride(-1) == 1 or x.shape[-1] == 1
        return self.shim.TensorView(self.pointer(x), *x.stride()[:3])

    def ints(self, x: Tensor | None):
        if x is None:
            return self.shim.IntView(0, 0, 0, 0)
        x = x.contiguous()
        steps = [0 if x.shape[axis] == 1 else x.stride(axis) for axis in (0, 1)]
        return self.shim.IntView(self.pointer(x), *steps, x.shape[-1])


def _rows(x: Tensor, perm: Permutation, heads: int) -> Tensor:
    """x [B, H, S, D] in slot order, float32, one copy per head of the permutation; holes are 0."""
    token = perm.token_of_slot.expand(x.shape[0], -1, -1)
    if token.shape[1] == 1:
        token = token.expand(-1, x.shape[1], -1)
    x = x.repeat_interleave(token.shape[1] // x.shape[1], 1).float()
    there = (token >= 0) & (token < x.shape[2])
    rows = x.gather(
        2, torch.where(there, token, 0).long()[..., None].expand(-1, -1, -1, x.shape[3])
    )
    return torch.where(there[..., None], rows, 0.0)


def nibbles(x: Tensor) -> Tensor:
    """Pairs of the last axis as bytes, the first one low."""
    low, high = x[..., 0::2].int() & 15, x[..., 1::2].int() & 15
    return (low | high << 4).to(torch.uint8)


def value_tiles(rows: Tensor, fmt: str, group: int, packed: bool) -> tuple[Tensor, Tensor]:
    """V as the kernel reads it, [B, H, groups, Dv, group], and its scales."""
    value, scale = quantise(rows, FORMATS[fmt], group, per_column=True)
    pad = -value.shape[2] % group
    value = torch.nn.functional.pad(value.view(torch.uint8), (0, 0, 0, pad)).view(value.dtype)
    order = NIBBLE_ORDER if packed else BYTE_ORDER
    value = value.unflatten(2, (-1, group)).transpose(-1, -2)
    value = value.unflatten(-1, (-1, len(order))).view(torch.uint8)[..., list(order)].flatten(-2)
    return (nibbles(value) if packed else value).contiguous(), scale.contiguous()


def shape_of(shim, call: Call, run: Sequence[AttnPart]):
    quant, formats = call.plan.quant, shim.Format.__members__
    dtypes = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
    return shim.Shape(
        capability=call.capability,
        dtype=shim.Dtype.__members__[dtypes[call.q.dtype]],
        qk=formats[quant.qk],
        pv=formats[quant.pv],
        head_dim=call.q.shape[3],
        head_dim_v=call.v.shape[3],
        unit=math.gcd(*(p.index.block_q for p in run)),
        block_kv=math.gcd(*(p.index.block_kv for p in run)),
        q_rows=quant.q_rows_per_scale,
        kv_rows=quant.kv_rows_per_scale,
    )


def _launch(shim, call: Call, run, out: Tensor, lse: Tensor, state) -> None:
    q, quant = call.q, call.plan.quant
    shape = shape_of(shim, call, run)
    config = shim.select_config(shape)
    made = _Args(shim)
    args = shim.AttentionArgs()
    perm = run[0].q_perm
    batch, heads, sq, head_dim = q.shape
    args.batch, args.q_heads = batch, heads
    args.num_q_tokens, args.num_kv_tokens = sq, call.k.shape[2]
    args.head_dim, args.head_dim_v = head_dim, call.v.shape[3]
    args.scale_log2 = call.scale * LOG2E
    args.q_rows, args.kv_rows = quant.q_rows_per_scale, quant.kv_rows_per_scale
    args.q_token = made.ints(None if perm.is_identity else perm.token_of_slot)
    args.num_q_slots = perm.num_slots
    if quant.qk == "none":
        args.q = made.tensor(q)
    else:
        rows = _rows(q, perm, heads)
        value, scale = quantise(rows, FORMATS[quant.qk], quant.q_rows_per_scale)
        args.q = made.tensor(_small(shim, value, config.qk))
        args.q_scale = made.pointer(scale.contiguous())
    args.out_dtype = shim.Dtype.bfloat16 if q.dtype == torch.bfloat16 else shim.Dtype.float16
    args.out, args.lse = made.tensor(out), made.pointer(lse)
    if state is not None:
        args.set_state(*(made.pointer(x) for x in state))
    unit = math.gcd(*(p.index.block_q for p in run))
    args.unit, args.tiles_per_unit = unit, -(-unit // config.block_m)
    tiles = -(-perm.num_slots // unit) * args.tiles_per_unit
    args.num_tiles, args.tiles_per_item = tiles, config.tiles_per_item
    if call.order is not None:
        items = -(-tiles // config.tiles_per_item)
        first = torch.arange(batch * heads)[:, None] * items
        args.order = made.pointer((first + call.order[None]).int().contiguous())
    for part in run:
        args.add_part(_part(shim, made, call, part, config))
    call.run(shim, args, config, made.kept)


def _small(shim, value: Tensor, computed) -> Tensor:
    return nibbles(value) if computed == shim.Format.int4 else value.contiguous()


def _as_they_are(made: _Args, call: Call, x: Tensor, perm: Permutation):
    """k or v that is not quantised, and its heads."""
    if call.in_slots:
        x = _rows(x, perm, call.q.shape[1]).to(x.dtype)
    return made.tensor(x), x.shape[1]


def _part(shim, made: _Args, call: Call, part: AttnPart, config):
    quant, index, perm = call.plan.quant, part.index, part.kv_perm
    made_part = shim.PartArgs()
    if quant.qk == "none":
        made_part.k, made_part.k_heads = _as_they_are(made, call, call.k, perm)
        made_part.k_in_slots = call.in_slots
    else:
        rows = _rows(call.k, perm, call.q.shape[1])
        value, scale = quantise(rows, FORMATS[quant.qk], quant.kv_rows_per_scale)
        made_part.k, made_part.k_heads = made.tensor(_small(shim, value, config.qk)), rows.shape[1]
        made_part.k_scale = made.pointer(scale.contiguous())
    if quant.pv == "none":
        made_part.v, made_part.v_heads = _as_they_are(made, call, call.v, perm)
        made_part.v_in_slots = call.in_slots
    else:
        rows = _rows(call.v, perm, call.q.shape[1])
        packed = config.pv == shim.Format.int4
        tiles, scale = value_tiles(rows, quant.pv, quant.kv_rows_per_scale, packed)
        made_part.v_heads = rows.shape[1]
        made_part.v_tiles, made_part.v_scale = made.pointer(tiles), made.pointer(scale)
    made_part.kv_token = made.ints(None if perm.is_identity else perm.token_of_slot)
    made_part.kv_indices = made.ints(index.kv_indices)
    made_part.row_offsets = made.ints(index.row_offsets)
    made_part.num_full = made.ints(index.kv_num_full)
    made_part.num_slots = perm.num_slots
    made_part.block_q, made_part.block_kv = index.block_q, index.block_kv
    made_part.set_band(part.band.min_lag, part.band.max_lag)
    return made_part
