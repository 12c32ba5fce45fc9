"""The static estimate of a tile's cost, against what a run of the kernel reads."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from kernel_cases import BRAIN, Case
from launches import Call, attend
from permattn.core import QuantSpec
from permattn.core.plan import AttnPlan
from permattn.patterns.dense import plan_dense

CSRC = Path(__file__).resolve().parents[2] / "csrc"
BYTES_OF_MATRIX = 128
KEYS = 256
PROGRAM = """
#include "cuda/sm80/estimate.h"
#include <cstdio>
#include <cstdlib>
using namespace permattn;
int main(int, char** a) {
  const int capability = std::atoi(a[1]), dim = std::atoi(a[4]), rows = std::atoi(a[5]);
  const auto qk = Format(std::atoi(a[2])), pv = Format(std::atoi(a[3]));
  const auto shape = sm80::tile_shape(qk, pv, dim, rows);
  const auto c = sm80::tile_cycles(capability, qk, pv, dim, rows);
  std::printf("%d %d %d %d %d %d %d %d %d\\n", shape.block_n, shape.q_in_registers,
              sm80::row_bytes(qk, dim), sm80::bytes_read(qk, pv, dim, rows), c.products, c.shared,
              c.exponentials, c.floats, c.bound());
}
"""
FORMATS = ("none", "int8", "int4", "fp8")
FACTS = (
    "block_n",
    "q_in_registers",
    "q_row",
    "read",
    "products",
    "shared",
    "exps",
    "floats",
    "bound",
)


@pytest.fixture(scope="module")
def estimate(tmp_path_factory):
    """estimate(capability, qk, pv, dim, rows) -> its numbers by name."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    folder = tmp_path_factory.mktemp("estimate")
    (folder / "main.cpp").write_text(PROGRAM)
    command = [compiler, "-std=c++20", f"-I{CSRC}", "-o", folder / "main", folder / "main.cpp"]
    subprocess.run(command, check=True)

    def run(capability: int, qk: str, pv: str, dim: int, rows: int) -> dict[str, int]:
        numbers = (capability, FORMATS.index(qk), FORMATS.index(pv), dim, rows)
        done = subprocess.run(
            [folder / "main", *map(str, numbers)], check=True, capture_output=True, text=True
        )
        return dict(zip(FACTS, map(int, done.stdout.split()), strict=True))

    return run


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
def test_a_run_reads_what_the_estimate_says(shim, estimate, qk, pv, dim, rows):
    made = plan_dense(rows, KEYS, causal=False, block_q=rows, block_kv=64)
    plan = AttnPlan(made.parts, QuantSpec(qk, pv))
    case = Case("x", lambda: plan, heads=1, dim=dim, dim_v=dim, dtype=BRAIN)
    q, k, v, *_ = case.inputs(plan)
    shim.take_statistics()
    attend(shim, Call(q, k, v, plan, 0.1))
    loads, _ = shim.take_statistics()
    facts = estimate(80, qk, pv, dim, rows)
    wanted = facts["read"] * KEYS // facts["block_n"]
    if facts["q_in_registers"]:
        wanted += rows * facts["q_row"]
    assert loads * BYTES_OF_MATRIX == wanted


def test_what_bounds_a_tile(estimate):
    """Of an A100, sixteen-bit tiles are bound by products, wide heads by shared memory."""
    facts = estimate(80, "none", "none", 128, 128)
    # 128 x 32 scores: 128 products each for Q K^T, and as many for P V, with 8 for the sum.
    assert facts["products"] == 128 * 32 * (128 + 136) // 1024 == facts["bound"]
    assert facts["exps"] == 128 * 32 // 16
    assert estimate(80, "none", "none", 256, 64)["bound"] > facts["products"]
    assert estimate(89, "none", "none", 128, 128)["products"] == 4 * facts["products"]
