"""The kernels for mma.sync as users call them: the Triton kernels' cases through the backend."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kernel_cases import BRAIN, SINGLE, Case, dense, drawn, expected, three_parts
from kernel_cases import CASES as PLAIN
from permattn import sparse_attention_with_lse
from permattn.backends import cuda
from permattn.core.problem import FwdArgs, Problem
from permattn.core.quant import FORMATS
from permattn.testing import assert_within
from quantised_cases import CASES as QUANTISED
from quantised_cases import QuantCase, in_float64

sys.path.insert(0, str(Path(__file__).parents[1] / "backends"))
from cuda_on_cpu import on_cpu, shim_path  # noqa: F401

# What a kernel test has seen and the backend adds nothing to.
SLOW = {"head-dim-256", "head-dim-256-float32", "tails-causal-float16", "head-dims-128-and-64"}


def in_16_bits(case):
    return replace(case, dtype=BRAIN if case.dtype == SINGLE else case.dtype)


ATTENDED = [in_16_bits(c) for c in PLAIN if str(c) not in SLOW]


@pytest.mark.parametrize("case", ATTENDED, ids=str)
def test_matches_float64(on_cpu, case):  # noqa: F811
    plan = case.plan()
    inputs = case.inputs(plan)
    found = sparse_attention_with_lse(*inputs[:3], plan, scale=case.scale, backend="cuda")
    plain, exact = expected(plan, inputs, case.scale)
    for name, value in zip(("out", "lse"), found, strict=True):
        assert_within(value, plain[name], exact[name], f"{case} {name}")


def for_kernels(case: QuantCase) -> QuantCase:
    """The case in 16 bits, with groups of keys and widths that the kernels take."""
    spec = case.spec
    if spec.pv != "none":
        spec = replace(spec, kv_rows_per_scale=64)
    step = 32 if spec.qk == "int4" else 16
    return replace(in_16_bits(case), spec=spec, dim=-(-case.dim // step) * step)


def why_not(args: FwdArgs) -> str | None:
    return cuda.why_not(Problem.of(args.q, args.k, args.v, args.plan, needs_grad=False))


def fits(case: QuantCase) -> bool:
    """Whether groups of the case divide its blocks, and there are kernels for its formats."""
    if (case.spec.qk, case.spec.pv) in (("int4", "int8"), ("int4", "fp8")):
        return False
    return all(p.index.block_kv % case.spec.kv_rows_per_scale == 0 for p in case.plan().parts)


SMALL = [c for c in map(for_kernels, QUANTISED) if fits(c)]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_small_numbers_mean_what_the_reference_says(on_cpu, case):  # noqa: F811
    on_cpu(89)
    args = case.arguments()
    assert why_not(args) is None
    out, lse = cuda.forward(args)
    want, want_lse = in_float64(args)
    seen = torch.isfinite(want_lse)
    assert torch.equal(seen, torch.isfinite(lse))
    eps = torch.finfo(args.v.dtype).eps
    # Sums add P as it was rounded, to 16 bits or to a step of its format; numbers of the operands
    # move by a step where a norm sums in another order.
    step = eps if case.spec.pv == "none" else 1 / FORMATS[case.spec.pv].p_high
    if case.prologue is not None:
        step = max(step, 0.01)
    high = float(args.v.float().abs().max())
    assert float((out.double() - want).abs().max()) <= (eps + step) * high
    assert float(torch.where(seen, lse.double() - want_lse, 0.0).abs().max()) <= 2e-5 + step
    error = (out.double() - want).abs().amax(-1)
    assert float((error > 2 * eps * high).double().mean()) <= 0.01


def test_groups_that_no_kernel_takes_are_refused(on_cpu):  # noqa: F811
    case = next(c for c in QUANTISED if c.name == "groups-of-16-int8")
    args = in_16_bits(case).arguments()
    assert "kv_rows_per_scale of 64" in why_not(args)


@pytest.mark.parametrize(
    "case",
    [
        Case("dense", dense(70, 130), heads=2, dim=64, dim_v=64, dtype=BRAIN),
        Case("parts", three_parts(2, 0, 1), batch=2, dtype=BRAIN),
        Case("permuted", drawn(100, 90, heads=2, permuted=True, holes=5), dim=80, dtype=BRAIN),
    ],
    ids=str,
)
def test_two_runs_are_bit_identical(on_cpu, case):  # noqa: F811
    plan = case.plan()
    q, k, v, *_ = case.inputs(plan)
    first, second = (
        sparse_attention_with_lse(q, k, v, plan, scale=case.scale, backend="cuda") for _ in "ab"
    )
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
