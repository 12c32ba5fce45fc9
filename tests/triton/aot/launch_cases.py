"""The launches that are compiled ahead of time: every shipped config, plain and at its heaviest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from permattn.core import AttnPlan, TokenBand
from permattn.patterns.dense import plan_dense
from permattn.testing import random_plan, split_plan


@dataclass(frozen=True)
class Case:
    """One call of a launcher.

    Args:
        kernels: the kernels whose code is of interest (a call may launch others beside them).
        plan: "dense" (one causal part in token order), "gather" (permuted, blocks smaller than
            tiles, a band with two ends) or "parts" (three parts in two orders, state carried in
            memory).
    """

    kernels: tuple[str, ...]
    plan: str
    dtype: torch.dtype
    head_dim: int
    head_dim_v: int

    @property
    def name(self) -> str:
        dims = f"d{self.head_dim}"
        if self.head_dim_v != self.head_dim:
            dims += f"v{self.head_dim_v}"
        kind = "fwd" if "fwd_kernel" in self.kernels else "bwd"
        return f"{kind}-{self.plan}-{str(self.dtype).removeprefix('torch.')}-{dims}"

    def launch(self) -> None:
        from permattn.backends.triton import backward_kernels, forward_kernels
        from permattn.core.problem import BwdArgs, FwdArgs

        # A head of 64 tokens keeps this quick: no length enters the compiled code.
        q, k, v, out = (
            torch.zeros(2, heads, 256, dim, dtype=self.dtype)
            for heads, dim in (
                (4, self.head_dim),
                (2, self.head_dim),
                (2, self.head_dim_v),
                (4, self.head_dim_v),
            )
        )
        lse = torch.zeros(2, 4, 256)
        plan = make_plan(self.plan)
        if "fwd_kernel" in self.kernels:
            forward_kernels(FwdArgs(q, k, v, plan, 0.125), out, lse)
        else:
            backward_kernels(BwdArgs(q, k, v, out, lse, out, lse, plan, 0.125))


def make_plan(kind: str) -> AttnPlan:
    if kind == "dense":
        return plan_dense(256, 256, causal=True)
    if kind == "gather":
        band = TokenBand(0, 100)
        return random_plan(
            256, 256, batch=2, heads=4, block_q=128, block_kv=16, band=band, permuted=True
        )
    return split_plan(256, 256, batch=2, heads=4)


FORWARD = ("fwd_kernel",)
BACKWARD = ("dq_kernel", "dkdv_kernel")


def _cases() -> tuple[Case, ...]:
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    cases = []
    for kernels in (FORWARD, BACKWARD):
        for dim in (64, 128):
            cases += [Case(kernels, plan, brain, dim, dim) for plan in ("dense", "gather", "parts")]
            cases += [
                Case(kernels, "dense", half, dim, dim),
                Case(kernels, "gather", single, dim, dim),
            ]
        for dim, dim_v in ((16, 16), (80, 80), (128, 64), (256, 256)):
            cases.append(Case(kernels, "gather", brain, dim, dim_v))
        cases.append(Case(kernels, "dense", brain, 256, 256))
        cases.append(Case(kernels, "gather", single, 256, 256))
    cases.append(Case(("fwd_kernel", "finish_kernel"), "parts", half, 96, 96))
    cases.append(Case(("dq_kernel", "dkdv_kernel", "delta_kernel"), "parts", half, 96, 96))
    return tuple(cases)


CASES = _cases()
