"""What a backend is asked: a description to accept or refuse, and the arguments of one call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from permattn.core.plan import AttnPlan
from permattn.core.prologue import Prologue
from permattn.core.quant import QuantSpec


@dataclass(frozen=True)
class Problem:
    """The static facts on which a backend decides whether it can run a call.

    Sizes that change from call to call (B, Sq, Skv) are left out on purpose: a decision must not
    make torch.compile specialise on them.
    """

    device_type: str
    dtype: torch.dtype
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    blocks: tuple[tuple[int, int], ...]
    quant: QuantSpec = QuantSpec()
    needs_grad: bool = False

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, plan: AttnPlan, *, needs_grad: bool) -> Problem:
        return cls(
            device_type=q.device.type,
            dtype=q.dtype,
            num_q_heads=q.shape[1],
            num_kv_heads=k.shape[1],
            head_dim=q.shape[3],
            head_dim_v=v.shape[3],
            blocks=tuple((p.index.block_q, p.index.block_kv) for p in plan.parts),
            quant=plan.quant,
            needs_grad=needs_grad,
        )


def why_not_quantised(problem: Problem) -> str | None:
    """What no kernel offers of a quantised problem; None where nothing is quantised."""
    if not problem.quant.is_quantised:
        return None
    if problem.needs_grad:
        return "quantised attention has no gradients"
    if problem.quant.qk == "none":
        return f"quantises P and V only together with Q and K, got pv = {problem.quant.pv!r} alone"
    return None


@dataclass(frozen=True, eq=False)
class FwdArgs:
    """q [B, Hq, Sq, D], k [B, Hkv, Skv, D], v [B, Hkv, Skv, Dv], any strides, last one 1.

    `prologue` is what q and k still have to go through; a backend fuses it with what it does to
    rows anyway.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    plan: AttnPlan
    scale: float
    prologue: Prologue | None = None


@dataclass(frozen=True, eq=False)
class BwdArgs:
    """The forward's arguments and results, and the gradients of both results.

    out, dout [B, Hq, Sq, Dv]; lse, dlse float32 [B, Hq, Sq] (natural log). dlse is zero where lse
    is -inf, so that `exp(s - lse)` never meets an infinity.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    dout: Tensor
    dlse: Tensor
    plan: AttnPlan
    scale: float


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
