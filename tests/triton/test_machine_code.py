"""Kernels compiled for GPUs that are not here: no spills, no surprise, the right instructions."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
import sass_table as table

_spec = importlib.util.find_spec("triton")
pytestmark = pytest.mark.skipif(
    _spec is None or _spec.origin is None, reason="triton is not installed"
)
ARCHS = tuple(table.SHARED_LIMIT)


@pytest.fixture(scope="module")
def core_rows() -> list[table.Row]:
    return table.compile_rows(table.CORE_CASES, table.CORE_ARCHS)


def test_core_kernels_compile_without_spills_to_matrix_instructions(core_rows):
    assert {row["kernel"] for row in core_rows} >= {"fwd_kernel", "dq_kernel", "dkdv_kernel"}
    assert {row["arch"] for row in core_rows} == set(table.CORE_ARCHS)
    faults = [fault for row in core_rows for fault in table.faults_of(row)]
    assert not faults, "\n".join(faults)


def test_core_kernels_are_as_the_table_has_them(core_rows):
    import triton

    version, rows = table.read_table()
    if version != triton.__version__:
        pytest.skip(f"the table is of triton {version}, here is {triton.__version__}")
    changed = table.differences(core_rows, rows)
    hint = "if that was meant: python tests/triton/aot/sass_table.py --write"
    assert not changed, "\n".join([*changed, hint])


def test_lengths_do_not_compile_anew():
    command = [sys.executable, str(table.HERE / "compile_launches.py"), "--lengths"]
    lengths = ["1", "15", "16", "17", "256", "1000"]
    done = subprocess.run(
        [*command, *lengths], env=table.environment(), capture_output=True, text=True, check=True
    )
    counts = json.loads(done.stdout.splitlines()[-1])
    probe = {f"probe_{name}_kernel" for name in ("total", "lse", "mass", "edge")}
    others = {"delta_kernel", "dq_kernel", "dkdv_kernel", "block_mass_kernel"} | probe
    others |= {f"region_{name}_kernel" for name in ("fwd", "dq", "dkdv", "mean")}
    others.add("reverse_graph_kernel")
    # fwd: plain and of small numbers; prepare: rows of q, k and v; route: a power of two of key
    # regions, from 16 to 1024, here four of them.
    several = {"fwd_kernel": 2, "prepare_kernel": 3, "route_kernel": 4}
    assert counts == {**dict.fromkeys(others, 1), **several}


def test_every_row_of_the_table_holds_what_is_promised():
    _, rows = table.read_table()
    faults = [fault for row in rows.values() for fault in table.faults_of(row)]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("arch", ARCHS, ids=lambda a: f"sm_{a}")
def test_table_has_every_kernel_of_every_architecture(arch):
    _, rows = table.read_table()
    kernels = {row["kernel"] for row in rows.values() if row["arch"] == arch}
    assert kernels >= {"fwd_kernel", "delta_kernel", "dq_kernel", "dkdv_kernel"}
    assert kernels >= {"region_fwd_kernel", "region_dq_kernel", "region_dkdv_kernel"}
    assert kernels >= {"region_mean_kernel", "route_kernel", "reverse_graph_kernel"}


@pytest.mark.parametrize(
    "change",
    [{"spills": 4}, {"stack": 8}, {"shared": 300000}, {"matrix": {"FFMA": 9}}],
    ids=["spill", "stack", "shared", "no-matrix-instruction"],
)
def test_checks_see_a_planted_fault(change):
    _, rows = table.read_table()
    row = next(r for r in rows.values() if r["kernel"] == "fwd_kernel" and r["arch"] == 90)
    assert not table.faults_of(row)
    assert table.faults_of({**row, **change})
    assert table.differences([{**row, **change}], rows)


def test_products_of_small_numbers_are_looked_for():
    _, rows = table.read_table()
    for name in ("int8-none-r64-none", "int8-int8-r64-pairs", "int8-fp8-r64-none"):
        key = f"quant-orders-{name}-bfloat16-d128/fwd_kernel/"
        row = next(r for k, r in rows.items() if k.startswith(key) and r["arch"] == 90)
        assert not table.faults_of(row)
        for opcode in row["matrix"]:
            fewer = {k: n for k, n in row["matrix"].items() if k != opcode}
            assert table.faults_of({**row, "matrix": fewer})
