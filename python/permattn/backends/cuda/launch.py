"""Launches of the attention kernels: which parts go together, and their arguments in flat form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import NamedTuple

import torch
from torch import Tensor

from permattn.backends.cuda.rows import FORMATS, last_stride_one
from permattn.core.plan import AttnPart, AttnPlan
from permattn.core.quant import QuantSpec

# csrc/cuda/attention.h: kMaxParts.
MAX_PARTS = 4
# A smaller common unit would leave rows of a tile idle; then parts are launched one by one.
MIN_FUSED_UNIT = 64
# Of fewer tiles all run at once; of more, the last ones to finish are few among many.
SORTED_TILES = (256, 32768)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SM80, SM90 = 0, 1


class Config(NamedTuple):
    """csrc/cuda/config.h: Config. `qk` and `pv` are formats as they are computed."""

    family: int
    dim: int
    block_m: int
    block_n: int
    warps: int
    stages: int
    qk: str
    pv: str


@dataclass(frozen=True, eq=False)
class Operand:
    """Keys and values of one part as a kernel reads them (csrc/cuda/attention.h: PartArgs)."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    k_in_slots: bool = False
    v_in_slots: bool = False


@dataclass(frozen=True, eq=False)
class Results:
    """What launches write: out and lse, or, of several launches, softmax state in token order."""

    out: Tensor
    lse: Tensor
    state: tuple[Tensor, Tensor, Tensor] | None


@dataclass(frozen=True, eq=False)
class Run:
    """Parts of one query order that share a launch, and the blocks that they read."""

    parts: tuple[AttnPart, ...]
    blocks: tuple[tuple[int, int], ...]

    @property
    def unit(self) -> int:
        """Query slots that lie in one block row of every part."""
        return math.gcd(*(q for q, _ in self.blocks))

    @property
    def block_kv(self) -> int:
        return math.gcd(*(kv for _, kv in self.blocks))


def shape_of(
    blocks: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    quant: QuantSpec,
    head_dim: int,
    head_dim_v: int,
) -> tuple[int, ...]:
    """csrc/cuda/config.h: Shape, without its capability.

    Plain numbers, also where torch.compile would have them change from call to call: `int` keeps
    those symbolic.
    """
    units, blocks_kv = [index(q) for q, _ in blocks], [index(kv) for _, kv in blocks]
    return (
        *(_DTYPES.index(dtype), FORMATS.index(quant.qk), FORMATS.index(quant.pv)),
        *(index(head_dim), index(head_dim_v), math.gcd(*units), math.gcd(*blocks_kv)),
        *(index(quant.q_rows_per_scale), index(quant.kv_rows_per_scale)),
    )


def config_of(capability: int, shape: tuple[int, ...]) -> Config:
    made = torch.ops.permattn_native.cuda_config([capability, *shape])
    family, dim, block_m, block_n, warps, stages, qk, pv = made
    return Config(family, dim, block_m, block_n, warps, stages, FORMATS[qk], FORMATS[pv])


def runs_of(plan: AttnPlan) -> list[Run]:
    """Parts in order, those that can share one launch together."""
    runs: list[list[AttnPart]] = []
    last_group = -1
    parts = sorted(zip(plan.q_groups(), plan.parts, strict=True), key=lambda pair: pair[0])
    for group, part in parts:
        if group == last_group and len(runs[-1]) < MAX_PARTS:
            sizes = [p.index.block_q for p in (*runs[-1], part)]
            if math.gcd(*sizes) >= min(MIN_FUSED_UNIT, *sizes):
                runs[-1].append(part)
                continue
        runs.append([part])
        last_group = group
    return [Run(tuple(run), tuple(_blocks(p, plan.quant) for p in run)) for run in runs]


def _blocks(part: AttnPart, quant: QuantSpec) -> tuple[int, int]:
    """block_q and block_kv; one block that is longer than all slots is cut to whole tiles."""
    sizes = (part.index.block_q, part.q_perm.num_slots, quant.q_rows_per_scale, 128)
    kv_sizes = (part.index.block_kv, part.kv_perm.num_slots, quant.kv_rows_per_scale, 64)
    return _cut(*sizes), _cut(*kv_sizes)


def _cut(block: int, num_slots: int, rows_per_scale: int, tile: int) -> int:
    step = math.lcm(rows_per_scale, tile)
    return min(block, max(1, -(-num_slots // step)) * step)


@dataclass(frozen=True, eq=False)
class Launch:
    """One launch.

    Args:
        q: [B, Hq, Sq, D], or rows in slots where Q K^T is quantised, with their scales.
        operands: of every part of the run.
        head_dim: D, whatever a row is packed to.
    """

    run: Run
    q: Tensor
    q_scale: Tensor | None
    operands: Sequence[Operand]
    head_dim: int
    quant: QuantSpec
    scale: float
    capability: int

    def ints(self, sq: int, sorts: bool) -> list[int]:
        """In the order of csrc/binding/cuda_attend.cpp."""
        quant, first = self.quant, self.run.parts[0]
        ints = [
            *(FORMATS.index(quant.qk), FORMATS.index(quant.pv)),
            *(quant.q_rows_per_scale, quant.kv_rows_per_scale),
            *(sq, first.kv_perm.num_tokens, self.run.unit, self.capability, self.head_dim),
            int(sorts),
        ]
        for part, blocks, operand in zip(
            self.run.parts, self.run.blocks, self.operands, strict=True
        ):
            band = part.band
            ints += [
                *blocks,
                int(band.min_lag is not None),
                0 if band.min_lag is None else band.min_lag,
                int(band.max_lag is not None),
                0 if band.max_lag is None else band.max_lag,
                int(part.kv_perm.is_identity),
                int(operand.k_in_slots),
                int(operand.v_in_slots),
            ]
        return ints

    def part_tensors(self) -> list[Tensor]:
        """Eight a part; an empty one is not there."""
        absent = self.q.new_empty(0)
        tensors: list[Tensor] = []
        for part, x in zip(self.run.parts, self.operands, strict=True):
            lists = part.index
            tensors += [
                *(x.k, x.v),
                absent if x.k_scale is None else x.k_scale,
                absent if x.v_scale is None else x.v_scale,
                absent if part.kv_perm.is_identity else last_stride_one(part.kv_perm.token_of_slot),
                last_stride_one(lists.kv_indices),
                last_stride_one(lists.row_offsets),
                last_stride_one(lists.kv_num_full),
            ]
        return tensors


def launch_attend(call: Launch, results: Results, config: Config) -> None:
    """Adds a run's parts to the results."""
    out, lse = results.out, results.lse
    q_perm, unit = call.run.parts[0].q_perm, call.run.unit
    tiles = -(-q_perm.num_slots // unit) * -(-unit // config.block_m)
    least, most = SORTED_TILES
    sorts = least <= tiles * lse.shape[0] * lse.shape[1] <= most
    token = None if q_perm.is_identity else last_stride_one(q_perm.token_of_slot)
    acc, high, total = results.state or (None, None, None)
    torch.ops.permattn_native.cuda_attend.default(
        *(call.q, call.q_scale, token, call.part_tensors(), out, lse, acc, high, total),
        *(None, call.ints(out.shape[2], sorts), call.scale),
    )


def launch_finish(results: Results) -> None:
    """The carried state as out and lse."""
    assert results.state is not None
    torch.ops.permattn_native.cuda_finish.default(*results.state, results.out, results.lse)
