"""The Triton backend's own launches, executed on their PTX and held to the float64 bound.

Shared cases of tests/triton; by hand, all of them: python tests/ptxsim/triton_cases.py
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
_spec = importlib.util.find_spec("triton")
pytestmark = pytest.mark.skipif(
    _spec is None or _spec.origin is None, reason="triton is not installed"
)
CASES = {
    "attention/tails-causal-bfloat16": {"fwd_kernel", "delta_kernel", "dq_kernel", "dkdv_kernel"},
    "quantised/int8-int8": {"prepare_kernel", "fwd_kernel"},
    "quantised/prologue-across-heads": {"row_statistics_kernel", "prepare_kernel", "fwd_kernel"},
    "regions/seven-by-eleven": {
        *("region_fwd_kernel", "region_dq_kernel", "region_dkdv_kernel", "reverse_graph_kernel")
    },
    "forward/two-orders": {"fwd_kernel", "finish_kernel"},
    "probe/one-row": {
        *("probe_total_kernel", "probe_lse_kernel", "probe_mass_kernel", "probe_edge_kernel")
    },
    "mass/bfloat16": {"block_mass_kernel"},
    "routes/tiny": {"region_mean_kernel", "route_kernel"},
}
# Of the barriers, waits and fences that run in the bf16 forward. What is left stands twice: one
# fence covers K and V, and some barriers follow each other.
LEAST_CAUGHT = {80: 0.85, 90: 0.85}


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    # The interpreter would not compile.
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(HERE / script), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def test_every_kernel_has_a_case():
    sources = (HERE.parents[1] / "triton_kernels").glob("*.py")
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    assert set(re.findall(r"^def (\w+_kernel)\(", text, re.MULTILINE)) == set().union(
        *CASES.values()
    )


@pytest.mark.parametrize("arch", [80, 90])
def test_shared_cases_on_ptx(arch: int):
    wanted = "^(" + "|".join(CASES) + ")$"
    done = run("triton_cases.py", "--arch", str(arch), "--case", wanted)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["case"] for row in rows} == set(CASES)
    for row in rows:
        assert row["fault"] is None, row
        assert set(row["kernels"]) >= CASES[row["case"]], row
        assert row["conflicts"] == {}, row


@pytest.mark.parametrize("arch", [80, 90])
def test_a_forward_with_one_instruction_missing_is_noticed(arch: int):
    done = run("triton_mutants.py", "--arch", str(arch))
    print(done.stderr)
    rows = json.loads(done.stdout.splitlines()[-1])
    made, caught = (sum(row[k] for row in rows.values()) for k in (0, 1))
    assert made >= 12, done.stderr
    assert caught >= LEAST_CAUGHT[arch] * made, done.stderr
    assert rows["cp.async.wait_group"][0] == rows["cp.async.wait_group"][1], done.stderr
    if arch == 90:
        for target in ("wgmma.fence", "wgmma.commit_group", "wgmma.wait_group"):
            assert rows[target][0] == rows[target][1] > 0, done.stderr
