"""The static estimate of a tile's cost, against what a run of the kernel reads."""

from __future__ import annotations

import pytest
import sm80_estimate
from kernel_cases import BRAIN, Case
from launches import Call, attend
from machine_code_table import ROOT
from marked_pages import replaced
from permattn.core import QuantSpec
from permattn.core.plan import AttnPlan
from permattn.patterns.dense import plan_dense

BYTES_OF_MATRIX = 128
KEYS = 256


def cycles_of(shim, capability: int, qk: str, pv: str, dim: int, rows: int) -> dict[str, int]:
    formats = getattr(shim.Format, qk), getattr(shim.Format, pv)
    return shim.sm80_tile_cycles(capability, *formats, dim, rows)


@pytest.mark.parametrize(
    ("qk", "pv", "dim", "rows"),
    [
        ("none", "none", 64, 128),
        ("none", "none", 96, 64),
        ("none", "none", 128, 128),
        ("int8", "none", 128, 64),
        ("int8", "int8", 128, 64),
        ("int4", "int4", 64, 64),
    ],
    ids=str,
)
def test_a_run_reads_what_the_estimate_says(shim, qk, pv, dim, rows):
    made = plan_dense(rows, KEYS, causal=False, block_q=rows, block_kv=64)
    plan = AttnPlan(made.parts, QuantSpec(qk, pv))
    case = Case("x", lambda: plan, heads=1, dim=dim, dim_v=dim, dtype=BRAIN)
    q, k, v, *_ = case.inputs(plan)
    shim.take_statistics()
    attend(shim, Call(q, k, v, plan, 0.1))
    loads, _ = shim.take_statistics()
    facts = cycles_of(shim, 80, qk, pv, dim, rows)
    wanted = facts["read"] * KEYS // facts["keys"]
    if facts["q_in_registers"]:
        wanted += rows * facts["q_row"]
    assert loads * BYTES_OF_MATRIX == wanted


def test_what_bounds_a_tile(shim):
    """Of an A100, sixteen-bit tiles are bound by products, wide heads by shared memory."""
    facts = cycles_of(shim, 80, "none", "none", 128, 128)
    # 128 x 32 scores: 128 products each for Q K^T, and as many for P V, with 8 for the sum.
    assert facts["products"] == 128 * 32 * (128 + 136) // 1024 == facts["bound"]
    assert facts["exponentials"] == 128 * 32 // 16
    assert cycles_of(shim, 80, "none", "none", 256, 64)["bound"] > facts["products"]
    assert cycles_of(shim, 89, "none", "none", 128, 128)["products"] == 4 * facts["products"]


def test_a_shape_without_a_kernel_is_refused(shim):
    with pytest.raises(ValueError, match="no kernel"):
        cycles_of(shim, 80, "int8", "int8", 256, 64)


def test_the_page_has_the_tables_numbers(shim):
    page = (ROOT / sm80_estimate.PAGE).read_text(encoding="utf-8")
    assert page == replaced(page, sm80_estimate.MARK, sm80_estimate.block(shim))
