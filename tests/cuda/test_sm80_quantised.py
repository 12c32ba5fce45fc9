"""The kernel for mma.sync over small numbers, against the reference's meaning of the same ones."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import BRAIN, HALF, WINDOW, drawn
from launches import Call, attend, shape_of
from permattn.core import AttnPlan, QuantSpec, TokenBand
from permattn.patterns.dense import plan_dense
from quantised_cases import QuantCase, check, in_float64

PAIRS = (
    *(("int8", pv) for pv in ("none", "int8", "int4", "fp8")),
    *(("int4", pv) for pv in ("none", "int4")),
)
WIDE = {"dim": 64, "dim_v": 64}


def spec(qk: str, pv: str, q_rows: int = 64) -> QuantSpec:
    return QuantSpec(qk, pv, q_rows, 64)


def causal():
    return plan_dense(131, 131, causal=True, block_q=64, block_kv=64)


CASES = [
    *(
        QuantCase(
            f"{qk}-{pv}",
            drawn(
                *(100, 150),
                heads=4,
                density=0.7,
                permuted=True,
                holes=5,
                band=WINDOW,
                block_q=64,
                block_kv=64,
            ),
            heads=4,
            kv_heads=2,
            dim=64,
            dim_v=40,
            dtype=BRAIN,
            spec=spec(qk, pv, 32),
        )
        for qk, pv in PAIRS
    ),
    QuantCase(
        "int8-none-tiles-of-128-queries",
        drawn(260, 260, block_q=128, block_kv=64, band=TokenBand(0)),
        dim=128,
        dim_v=128,
        dtype=BRAIN,
        spec=spec("int8", "none", 32),
    ),
    QuantCase(
        "groups-of-8-keys",
        drawn(90, 100, permuted=True, block_q=32, block_kv=32),
        **WIDE,
        dtype=HALF,
        spec=QuantSpec("int8", "none", 1, 8),
    ),
    QuantCase(
        "empty-rows",
        drawn(130, 130, heads=2, density=0.2, block_q=64, block_kv=64),
        **WIDE,
        dtype=BRAIN,
        spec=spec("int8", "int8"),
    ),
    QuantCase(
        "negative-scale",
        drawn(64, 64, block_q=64, block_kv=64),
        **WIDE,
        dtype=HALF,
        scale=-0.3,
        spec=spec("int8", "fp8"),
    ),
    QuantCase(
        "negative-scale-int4",
        drawn(64, 64, block_q=64, block_kv=64),
        **WIDE,
        dtype=HALF,
        scale=-0.3,
        spec=spec("int4", "int4"),
    ),
]


def run(shim, case: QuantCase, capability: int):
    args = case.arguments()
    call = Call(args.q, args.k, args.v, args.plan, args.scale, capability)
    return args, attend(shim, call)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_meaning_of_the_same_integers(shim, case):
    args, (out, lse) = run(shim, case, 89)
    if case.spec.pv != "none":
        check((out, lse), args, case.name)
        return
    # P is rounded to 16 bits, and the sum of a row adds what it was rounded to.
    want, want_lse = in_float64(args)
    eps = torch.finfo(args.v.dtype).eps
    seen = torch.isfinite(want_lse)
    assert torch.equal(seen, torch.isfinite(lse))
    assert float((out.double() - want).abs().max()) <= 2 * eps * float(args.v.float().abs().max())
    assert float(torch.where(seen, lse.double() - want_lse, 0.0).abs().max()) <= eps


def test_rows_of_four_bits_run_as_bytes_where_the_hardware_has_no_such_product(shim):
    """The same integers give the same bits."""
    case = next(c for c in CASES if c.name == "int4-none")
    args, native = run(shim, case, 89)
    call = Call(args.q, args.k, args.v, args.plan, args.scale, 120)
    config = shim.select_config(shape_of(shim, call, args.plan.parts))
    assert config.qk == shim.Format.int8
    for a, b in zip(attend(shim, call), native, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["int8-none", "int8-int8", "int4-int4"])
def test_bits_do_not_depend_on_the_schedule(shim, name):
    case = next(c for c in CASES if c.name == name)
    _, first = run(shim, case, 89)
    for seed, eager in ((2, False), (3, True)):
        shim.set_options(seed, eager)
        for a, b in zip(run(shim, case, 89)[1], first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("qk", "dim"), [("int8", 128), ("int8", 256), ("int4", 128)])
def test_the_largest_sums_are_exact(shim, qk, dim, sign):
    """One key: lse is its score, the largest sum of products that there is."""
    plan = plan_dense(1, 1, causal=False, block_q=64, block_kv=64)
    plan = AttnPlan(plan.parts, QuantSpec(qk))
    q = torch.full((1, 1, 1, dim), 0.5, dtype=BRAIN)
    v = torch.randn(1, 1, 1, 64, generator=torch.Generator().manual_seed(1)).to(BRAIN)
    out, lse = attend(shim, Call(q, sign * q, v, plan, 2.0))
    assert torch.equal(out, v)
    # The format's largest number times its scale is what it was.
    torch.testing.assert_close(lse.flatten(), torch.tensor([sign * 0.5 * dim]), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("qk", "pv"), [("int8", "int8"), ("int8", "int4"), ("int8", "fp8")])
def test_the_largest_sums_of_values_are_exact(shim, qk, pv):
    """Every score is the same: a row is the mean of values that are largest numbers."""
    plan = plan_dense(64, 64, causal=False, block_q=64, block_kv=64)
    plan = AttnPlan(plan.parts, QuantSpec(qk, pv))
    q = torch.ones(1, 1, 64, 64, dtype=BRAIN)
    v = torch.where(torch.arange(64) % 2 == 0, 0.75, -0.75).to(BRAIN).expand(1, 1, 64, 64)
    out, lse = attend(shim, Call(q, q, v.contiguous(), plan, 0.0, 89))
    assert torch.equal(out, v)
    torch.testing.assert_close(lse, torch.full((1, 1, 64), math.log(64)), rtol=1e-6, atol=0)
