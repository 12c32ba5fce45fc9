"""The kernel for sm_90a as users call it: operators whose launches run on the simulator."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from kernel_cases import BRAIN, Case, drawn, expected
from permattn import sparse_attention_with_lse
from permattn.backends.cuda import launch
from permattn.testing import assert_within
from simulated import ANYWHERE, Simulator, why_not

sys.path.insert(0, str(Path(__file__).parents[1] / "backends"))
from cuda_on_cpu import on_cpu, shim_path  # noqa: F401

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
CASES = [
    Case(
        f"blocks-of-{unit}",
        drawn(300, 200, heads=2, density=0.4, block_q=unit, block_kv=64),
        dtype=BRAIN,
    )
    for unit in (64, 128)
]


@pytest.mark.parametrize("sorts", [False, True], ids=["as-numbered", "longest-first"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(shim, on_cpu, monkeypatch, case, sorts):  # noqa: F811
    """Unequal lists of single blocks, which come in pairs, and of blocks of 128 queries."""
    on_cpu(90)
    monkeypatch.setattr(launch, "SORTED_TILES", (1, 1 << 15) if sorts else (1 << 15, 0))
    plan = case.plan()
    inputs = case.inputs(plan)
    simulator = Simulator()
    with simulator.taking_launches(shim, [ANYWHERE]):
        found = sparse_attention_with_lse(*inputs[:3], plan, scale=case.scale, backend="cuda")
    assert len(simulator.kernels) == 1
    plain, exact = expected(plan, inputs, case.scale)
    for name, value in zip(("out", "lse"), found, strict=True):
        assert_within(value, plain[name], exact[name], f"{case} {name}")
