"""The torch.compile wall: operator schemas, fake kernels, autograd and the FLOP formula.

A plan and a prologue pass it in flat form, as tensors and numbers (`core.packing`,
`core.prologue`). Gradients never meet a prologue: the front door applies it before.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from permattn.backends import BACKENDS
from permattn.core.modes import offer_flop_formulas, without_autocast
from permattn.core.packing import INTS_PER_PART, TENSORS_PER_PART, unpack_plan
from permattn.core.problem import BwdArgs, FwdArgs, empty_out, lse_dtype
from permattn.core.prologue import unpack_prologue


@torch.library.custom_op("permattn::sparse_attention", mutates_args=())
def sparse_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan_tensors: Sequence[Tensor],
    plan_ints: Sequence[int],
    prologue_tensors: Sequence[Tensor],
    prologue_ints: Sequence[int],
    prologue_floats: Sequence[float],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    plan = unpack_plan(plan_tensors, plan_ints)
    prologue = unpack_prologue(prologue_tensors, prologue_ints, prologue_floats)
    with without_autocast(q):
        return BACKENDS[backend].forward(FwdArgs(q, k, v, plan, scale, prologue))


@sparse_attention_op.register_fake
def _(q, k, v, plan_tensors, plan_ints, p_tensors, p_ints, p_floats, scale, backend):
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
    with without_autocast(q):
        dq, dk, dv = BACKENDS[backend].backward(args)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@sparse_attention_backward_op.register_fake
def _(q, k, v, out, lse, dout, dlse, plan_tensors, plan_ints, scale, backend):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    q, k, v, plan_tensors, plan_ints, *prologue, scale, backend = inputs
    if any(prologue):
        raise NotImplementedError("sparse_attention: a prologue has no gradients; apply it before")
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
    # For torch an empty list is a list of tensors, whatever the schema says.
    return dq, dk, dv, [None] * ctx.num_plan_tensors, None, [], [], [], None, None


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


def register_flop_formulas() -> None:
    """Tells torch's FLOP counter what both operators cost; see `offer_flop_formulas`."""
    ops = torch.ops.permattn
    offer_flop_formulas(
        {
            ops.sparse_attention: _forward_flops,
            ops.sparse_attention_backward: _backward_flops,
        }
    )
