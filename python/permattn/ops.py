"""The torch.compile wall: operator schemas, fake kernels, autograd and the FLOP formula.

A plan becomes a flat list of tensors and integers here, and only here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from permattn.backends import BACKENDS
from permattn.core.block_index import BlockIndex
from permattn.core.permutation import Permutation
from permattn.core.plan import AttnPart, AttnPlan, TokenBand
from permattn.core.problem import BwdArgs, FwdArgs
from permattn.core.quant import QuantSpec

TENSORS_PER_PART = 7
INTS_PER_PART = 9
_QK = ("none", "int8", "int4")
_PV = ("none", "fp8", "int8", "int4")


def empty_out(q: Tensor, v: Tensor) -> Tensor:
    """Uninitialised [B, Hq, Sq, Dv] in q's dtype; heads innermost in memory where q's are.

    So a transposed [B, S, H, D] view comes back as one, and the reshape that follows is free.
    """
    batch, heads, sq, _ = q.shape
    if q.stride(1) < q.stride(2):
        return q.new_empty(batch, sq, heads, v.shape[3]).transpose(1, 2)
    return q.new_empty(batch, heads, sq, v.shape[3])


def lse_dtype(q: Tensor) -> torch.dtype:
    """float32, but float64 for float64 inputs, so that gradients can be checked closely."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def pack_plan(plan: AttnPlan) -> tuple[list[Tensor], list[int]]:
    """The plan as tensors (seven a part) and integers (a header, then nine a part)."""
    tensors: list[Tensor] = []
    quant = plan.quant
    ints = [
        _QK.index(quant.qk),
        _PV.index(quant.pv),
        quant.q_rows_per_scale,
        quant.kv_rows_per_scale,
        int(quant.smooth_k),
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
    quant = QuantSpec(_QK[ints[0]], _PV[ints[1]], ints[2], ints[3], bool(ints[4]))  # type: ignore[arg-type]
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


@torch.library.custom_op("permattn::sparse_attention", mutates_args=())
def sparse_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan_tensors: Sequence[Tensor],
    plan_ints: Sequence[int],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    plan = unpack_plan(plan_tensors, plan_ints)
    return BACKENDS[backend].forward(FwdArgs(q, k, v, plan, scale))


@sparse_attention_op.register_fake
def _(q, k, v, plan_tensors, plan_ints, scale, backend):
    return empty_out(q, v), q.new_empty(q.shape[:3], dtype=lse_dtype(q))


@torch.library.custom_op("permattn::sparse_attention_backward", mutates_args=())
def sparse_attention_backward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor,
    plan_tensors: Sequence[Tensor],
    plan_ints: Sequence[int],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    plan = unpack_plan(plan_tensors, plan_ints)
    dlse = torch.where(lse == float("-inf"), 0.0, dlse)
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    args = BwdArgs(q, k, v, out, lse, dout, dlse, plan, scale)
    dq, dk, dv = BACKENDS[backend].backward(args)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@sparse_attention_backward_op.register_fake
def _(q, k, v, out, lse, dout, dlse, plan_tensors, plan_ints, scale, backend):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    q, k, v, plan_tensors, plan_ints, scale, backend = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, *plan_tensors)
    ctx.plan_ints, ctx.scale, ctx.backend = plan_ints, scale, backend
    ctx.num_plan_tensors = len(plan_tensors)


def _backward(ctx, dout, dlse):
    q, k, v, out, lse, *plan_tensors = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dlse = torch.zeros_like(lse) if dlse is None else dlse
    dq, dk, dv = sparse_attention_backward_op(
        q, k, v, out, lse, dout, dlse, plan_tensors, ctx.plan_ints, ctx.scale, ctx.backend
    )
    return dq, dk, dv, [None] * ctx.num_plan_tensors, None, None, None


sparse_attention_op.register_autograd(_backward, setup_context=_setup_context)


def _block_pairs(plan_tensors: Sequence[Tensor], plan_ints: Sequence[int], heads: int) -> int:
    """Pairs in listed blocks, all batch rows and heads; the static capacity where data is fake."""
    total = 0
    for i in range(len(plan_tensors) // TENSORS_PER_PART):
        kv_indices, row_offsets = plan_tensors[TENSORS_PER_PART * i + 4 :][:2]
        block_q, block_kv = plan_ints[5 + INTS_PER_PART * i :][:2]
        entries: float
        if isinstance(row_offsets, torch._subclasses.FakeTensor) or row_offsets.is_meta:
            entries = kv_indices.shape[-1]
        else:
            entries = float(row_offsets[..., -1].double().mean())
        total += round(entries * heads) * block_q * block_kv
    return total


def _forward_flops(q, k, v, plan_tensors, plan_ints, *args, out_val=None, **kwargs) -> int:
    pairs = _block_pairs(plan_tensors, plan_ints, q.shape[0] * q.shape[1])
    return 2 * pairs * (q.shape[3] + v.shape[3])


def _backward_flops(
    q, k, v, out, lse, dout, dlse, plan_tensors, plan_ints, *args, out_val=None, **kwargs
) -> int:
    # Five products: S = QK, dP = dO V, dV = P dO, dQ = dS K, dK = dS Q.
    pairs = _block_pairs(plan_tensors, plan_ints, q.shape[0] * q.shape[1])
    return 2 * pairs * (3 * q.shape[3] + 2 * v.shape[3])


_registered = False


def register_flop_formulas() -> None:
    """Tells torch's FLOP counter what both operators cost, once somebody has imported it.

    Not at import: the counter imports triton, which `import permattn` must not.
    """
    global _registered
    if _registered or "torch.utils.flop_counter" not in sys.modules:
        return
    from torch.utils.flop_counter import register_flop_formula

    _registered = True
    ops = torch.ops.permattn
    register_flop_formula(ops.sparse_attention, get_raw=True)(_forward_flops)
    register_flop_formula(ops.sparse_attention_backward, get_raw=True)(_backward_flops)
