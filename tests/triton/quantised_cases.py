"""Quantised cases that the Triton kernels must get right, under the interpreter and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from kernel_cases import BRAIN, HALF, WINDOW, Case, all_partial, drawn
from permattn.backends import reference, triton
from permattn.core import AttnPart, AttnPlan, Permutation, QuantSpec, TokenBand
from permattn.core.problem import FwdArgs
from permattn.core.prologue import Prologue, RowTransform
from permattn.core.quant import FORMATS
from permattn.patterns.dense import plan_dense
from permattn.testing import random_index, random_permutation, split_plan
from torch import Tensor

# Rows of a result in which one P was next to a tie and fell the other way.
TIES = 0.01
BYTES = QuantSpec("int8", "int8", 32, 32)


@dataclass(frozen=True)
class QuantCase(Case):
    """A case with numbers to quantise by.

    Args:
        prologue: makes what q and k go through first.
        outlier: channel 3 of every key is so many times larger.
    """

    spec: QuantSpec = BYTES
    prologue: Callable[[Case, AttnPlan], Prologue] | None = None
    outlier: float = 1.0

    __str__ = Case.__str__

    def arguments(self) -> FwdArgs:
        plan = self.plan()
        q, k, v, *_ = self.inputs(plan)
        if self.outlier != 1.0:
            k = k.clone()
            k[..., 3] *= self.outlier
        plan = AttnPlan(plan.parts, self.spec, validate=False)
        made = None if self.prologue is None else self.prologue(self, plan)
        return FwdArgs(q, k, v, plan, self.scale, made)


def two_parts(tokens: int, *, heads: int = 4, text: int = 20, seed: int = 0) -> AttnPlan:
    """An order of each head; vision keys in it and text keys are two parts of one query order."""
    g = torch.Generator().manual_seed(seed)
    vision = torch.stack([torch.randperm(tokens - text, generator=g) for _ in range(heads)])
    words = torch.arange(tokens - text, tokens)
    q_perm = Permutation.from_token_of_slot(
        torch.cat((vision, words.expand(heads, -1)), -1)[None], tokens
    )
    parts = []
    for order, density in ((vision[None], 0.5), (words[None, None], 1.0)):
        kv_perm = Permutation.from_token_of_slot(order, tokens)
        facts = {"block_q": 64, "block_kv": 64, "heads": heads, "generator": g}
        index = random_index(q_perm, kv_perm, TokenBand(), density=density, **facts)
        parts.append(AttnPart(q_perm, kv_perm, index, TokenBand()))
    return AttnPlan(tuple(parts))


def two_orders(sq: int, skv: int, *, heads: int = 2, batch: int = 1) -> AttnPlan:
    """Two query orders that show every query different keys: state goes through memory."""
    g = torch.Generator().manual_seed(4)
    first = torch.rand(batch, heads, skv, generator=g) < 0.5
    whole, parts = Permutation.identity(skv), []
    for q_perm, dropped, block_q in (
        (Permutation.identity(sq), first, 32),
        (random_permutation(sq, heads=heads, batch=batch, holes=5, generator=g), ~first, 16),
    ):
        kv_perm = whole.without_tokens(dropped)
        facts = {"block_kv": 32, "density": 0.8, "heads": heads, "batch": batch, "generator": g}
        index = random_index(q_perm, kv_perm, TokenBand(-20), block_q=block_q, **facts)
        parts.append(AttnPart(q_perm, kv_perm, index, TokenBand(-20)))
    return AttnPlan(tuple(parts))


def transform(heads: int, dim: int, tokens: int, *, across: bool) -> RowTransform:
    """A norm and a rotation of most tokens: interleaved, or halves of which the last pairs stay."""
    g = torch.Generator().manual_seed(heads)
    width = heads * dim if across else dim
    weight, bias = (torch.randn(width, generator=g) * 0.2 for _ in "wb")
    angle = torch.randn(tokens - 5, dim // 2 - (2 if across else 0), generator=g)
    return RowTransform(
        norm="layer" if across else "rms",
        weight=1 + weight,
        bias=bias if across else None,
        across_heads=across,
        cos=angle.cos(),
        sin=angle.sin(),
        rope_start=3,
        interleaved=not across,
    )


def prologue(*, across: bool = False) -> Callable[[Case, AttnPlan], Prologue]:
    def make(case: Case, plan: AttnPlan) -> Prologue:
        sizes = ((case.heads, plan.num_q_tokens), (case.kv_heads, plan.num_kv_tokens))
        return Prologue(*(transform(h, case.dim, n, across=across) for h, n in sizes))

    return make


def formats() -> list[QuantCase]:
    """Every pair of formats on orders of each head, holes, and a band of two ends."""
    plan = drawn(100, 120, heads=4, density=0.7, permuted=True, holes=5, band=WINDOW)
    facts = {"heads": 4, "kv_heads": 2, "dim": 40, "dim_v": 24}
    pairs = [(qk, pv) for qk in ("int8", "int4") for pv in ("none", "int8", "int4", "fp8")]
    return [
        QuantCase(f"{qk}-{pv}", plan, **facts, spec=QuantSpec(qk, pv, 32, 64, smooth_k=True))
        for qk, pv in pairs
    ]


SMOOTH = QuantSpec("int8", "int8", 16, 32, smooth_k=True, balance=True)
FP8 = QuantSpec("int8", "fp8", 64, 64)
CASES = (
    *formats(),
    QuantCase("two-parts-one-launch", lambda: two_parts(150), heads=4, kv_heads=2, dtype=BRAIN),
    QuantCase(
        "two-parts-smooth", lambda: two_parts(150), heads=4, kv_heads=4, spec=SMOOTH, outlier=20.0
    ),
    QuantCase("two-orders", lambda: two_orders(70, 90), spec=SMOOTH),
    QuantCase(
        "two-orders-batch",
        lambda: two_orders(70, 90, batch=2),
        batch=2,
        dtype=HALF,
        spec=QuantSpec("int8", "fp8", 8, 32),
    ),
    QuantCase(
        "three-parts-two-orders",
        lambda: split_plan(90, 101, heads=2, batch=2, seed=2),
        batch=2,
        spec=QuantSpec("int8", "none", 1, 8, smooth_k=True),
    ),
    QuantCase(
        "one-token", lambda: plan_dense(1, 1, causal=True, block_q=64, block_kv=64), spec=FP8
    ),
    QuantCase(
        "tails-causal",
        lambda: plan_dense(131, 131, causal=True, block_q=64, block_kv=64),
        heads=4,
        kv_heads=2,
        dim=64,
        dim_v=64,
        dtype=BRAIN,
        spec=QuantSpec("int8", "int8", 64, 64),
    ),
    QuantCase("empty-rows", drawn(130, 130, heads=2, density=0.2, block_q=32, block_kv=32)),
    QuantCase("no-entry-at-all", drawn(70, 70, density=0.0)),
    QuantCase("all-partial-blocks", lambda: all_partial(100, 100), dtype=HALF),
    QuantCase("plan-of-a-batch", drawn(70, 70, batch=2, permuted=True), batch=2, layout="views"),
    QuantCase("expanded-keys", drawn(70, 70, heads=2), batch=2, layout="expanded", dtype=BRAIN),
    QuantCase(
        "groups-of-128",
        drawn(140, 260, heads=2, permuted=True, block_q=128, block_kv=128),
        dim=128,
        dim_v=64,
        spec=QuantSpec("int8", "int8", 128, 128),
    ),
    *(
        QuantCase(
            f"groups-of-16-{pv}",
            drawn(100, 130, heads=2, permuted=True, holes=5, block_q=32, block_kv=32),
            dim=32,
            dim_v=24,
            dtype=BRAIN,
            spec=QuantSpec(qk, pv, 1, 16, smooth_k=True, balance=True),
        )
        for qk, pv in (("int8", "int8"), ("int4", "int4"), ("int8", "fp8"))
    ),
    QuantCase(
        "groups-of-24-and-48",
        drawn(130, 130, permuted=True, block_q=48, block_kv=24, band=TokenBand(0)),
        spec=QuantSpec("int8", "none", 48, 24),
    ),
    QuantCase("groups-inside-blocks", drawn(100, 200, block_q=32, block_kv=128), dim=16, dim_v=16),
    QuantCase("negative-scale", drawn(64, 64), scale=-0.3, spec=FP8),
    QuantCase("prologue", lambda: two_parts(110), heads=4, kv_heads=2, prologue=prologue()),
    QuantCase(
        "prologue-across-heads",
        lambda: two_parts(110),
        heads=4,
        kv_heads=2,
        dtype=BRAIN,
        spec=SMOOTH,
        prologue=prologue(across=True),
    ),
    QuantCase(
        "prologue-unquantised",
        lambda: two_parts(110),
        heads=4,
        kv_heads=2,
        spec=QuantSpec(),
        prologue=prologue(),
    ),
)


def in_float64(args: FwdArgs) -> tuple[Tensor, Tensor]:
    """The reference's results in float64: the same integers, every sum close to exact."""
    q, k, v = (x.double() for x in (args.q, args.k, args.v))
    return reference.forward(FwdArgs(q, k, v, args.plan, args.scale, args.prologue))


def check(ours: tuple[Tensor, Tensor], args: FwdArgs, what: str) -> None:
    """Against the reference's meaning of the same integers.

    P in 16 bits, or rounded once more at the end, is off by half an eps each, of the largest value.
    A P next to a tie may fall the other way, which is one step of one weight, in few rows.
    """
    (out, lse), (want, want_lse) = ours, in_float64(args)
    seen = torch.isfinite(want_lse)
    assert torch.equal(seen, torch.isfinite(lse)), f"{what}: rows that see nothing"
    assert out.dtype == args.q.dtype and lse.dtype == torch.float32
    high = float(args.v.float().abs().max())
    eps = torch.finfo(args.v.dtype).eps
    if args.v.dtype == torch.float32:
        eps *= 16
    error = (out.double() - want).abs().amax(-1)
    lse_error = torch.where(seen, lse.double() - want_lse, 0.0).abs()
    off = (error > eps * high) | (lse_error > 2e-5)
    step = 0.0 if args.plan.quant.pv == "none" else 1 / FORMATS[args.plan.quant.pv].p_high
    if args.prologue is not None:
        # Sums of a norm in another order move a number in a group by a step of its own.
        step = max(step, 0.01)
    share = float(off.double().mean())
    assert share <= (TIES if step else 0.0), f"{what}: {share:.1%} of the rows are off"
    worst = float(error.max())
    assert worst <= (eps + step) * high, f"{what}: off by {worst:.2e}"
    assert float(lse_error.max()) <= 2e-5 + step, f"{what}: lse"


def run(args: FwdArgs, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """What the kernels make of the arguments of a case, back on the CPU."""
    if device != "cpu":
        args = moved(args, device)
    out, lse = triton.forward(args)
    return out.cpu(), lse.cpu()


def moved(args: FwdArgs, device: str) -> FwdArgs:
    made = args.prologue
    if made is not None:
        made = Prologue(
            *(None if t is None else _moved_transform(t, device) for t in (made.q, made.k))
        )
    q, k, v = (x.to(device) for x in (args.q, args.k, args.v))
    return FwdArgs(q, k, v, args.plan.to(device), args.scale, made)


def _moved_transform(t: RowTransform, device: str) -> RowTransform:
    weight, bias, cos, sin = (
        None if x is None else x.to(device) for x in (t.weight, t.bias, t.cos, t.sin)
    )
    return RowTransform(
        *(t.norm, weight, bias, t.eps, t.across_heads, cos, sin, t.rope_start, t.interleaved)
    )


def check_case(case: QuantCase, device: str = "cpu") -> None:
    args = case.arguments()
    check(run(args, device), args, case.name)
