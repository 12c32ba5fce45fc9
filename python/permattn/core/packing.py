"""A plan in flat form, tensors and integers: what operators take, in Python and in C++."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from permattn.core.block_index import BlockIndex
from permattn.core.permutation import Permutation
from permattn.core.plan import AttnPart, AttnPlan, TokenBand
from permattn.core.quant import PvFormat, QkFormat, QuantSpec

TENSORS_PER_PART = 7
INTS_PER_PART = 9
_QK: tuple[QkFormat, ...] = ("none", "int8", "int4")
_PV: tuple[PvFormat, ...] = ("none", "fp8", "int8", "int4")


def pack_plan(plan: AttnPlan) -> tuple[list[Tensor], list[int]]:
    """The plan as tensors (seven a part) and integers (a header, then nine a part)."""
    tensors: list[Tensor] = []
    quant = plan.quant
    ints = [
        _QK.index(quant.qk),
        _PV.index(quant.pv),
        quant.q_rows_per_scale,
        quant.kv_rows_per_scale,
        int(quant.smooth_k) + 2 * int(quant.balance),
    ]
    for part, group in zip(plan.parts, plan.q_groups(), strict=True):
        tensors += part.tensors()
        band = part.band
        ints += [
            part.index.block_q,
            part.index.block_kv,
            int(band.min_lag is not None),
            0 if band.min_lag is None else band.min_lag,
            int(band.max_lag is not None),
            0 if band.max_lag is None else band.max_lag,
            int(part.q_perm.is_identity),
            int(part.kv_perm.is_identity),
            group,
        ]
    return tensors, ints


def unpack_plan(tensors: Sequence[Tensor], ints: Sequence[int]) -> AttnPlan:
    """The inverse of pack_plan; parts of one group share their q_perm object again."""
    qk, pv = _QK[ints[0]], _PV[ints[1]]
    quant = QuantSpec(qk, pv, ints[2], ints[3], bool(ints[4] & 1), bool(ints[4] & 2))
    parts = []
    group_perm: dict[int, Permutation] = {}
    for i in range(len(tensors) // TENSORS_PER_PART):
        t = tensors[TENSORS_PER_PART * i : TENSORS_PER_PART * (i + 1)]
        n = ints[5 + INTS_PER_PART * i : 5 + INTS_PER_PART * (i + 1)]
        q_perm = group_perm.setdefault(n[8], Permutation(t[0], t[1], bool(n[6])))
        kv_perm = Permutation(t[2], t[3], bool(n[7]))
        band = TokenBand(n[3] if n[2] else None, n[5] if n[4] else None)
        parts.append(AttnPart(q_perm, kv_perm, BlockIndex(t[4], t[5], t[6], n[0], n[1]), band))
    return AttnPlan(tuple(parts), quant, validate=False)
