"""The probe by the CUDA kernels against float64, on the CPU."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from permattn.backends import cuda
from permattn.core.probe import ProbeProblem
from permattn.probe import probe_mass
from probe_cases import BRAIN, CASES, HALF, LONG, NAMES, SINGLE, Case, assert_probe, check_case

sys.path.insert(0, str(Path(__file__).parents[1] / "backends"))
from cuda_on_cpu import on_cpu, one_thread, shim_path  # noqa: F401

pytestmark = pytest.mark.usefixtures("on_cpu", "one_thread")
# The kernels compute in 16 bits: cases of float32 run in float16.
PROBED = [replace(c, dtype=HALF if c.dtype == SINGLE else c.dtype) for c in (*CASES, *LONG)]


@pytest.mark.parametrize("case", PROBED, ids=str)
def test_masses_are_within_the_bound(case):
    check_case(case, "cuda")


@pytest.mark.parametrize("eager", [False, True], ids=["late", "early"])
def test_bits_do_not_depend_on_the_schedule(shim, eager):
    found = Case("twice", 1100, 70, skip=True, dim=72, dtype=BRAIN).inputs()
    first = probe_mass(**found, backend="cuda")
    assert_probe(first, found, "twice")
    for seed in (0, 3):
        shim.set_options(seed, eager)
        again = probe_mass(**found, backend="cuda")
        assert all(torch.equal(getattr(first, x), getattr(again, x)) for x in NAMES)


def test_probabilities_have_no_bank_conflicts(shim):
    shim.take_statistics()
    probe_mass(**Case("banks", 130, 64, dim=128, dtype=BRAIN).inputs(), backend="cuda")
    loads, conflicts = shim.take_statistics()
    assert loads > 0
    assert conflicts == 0


def test_no_keys_give_no_mass():
    found = Case("none", 20, 5, axis="subset", dtype=BRAIN).inputs()
    empty = found["order"][:, :0].contiguous()
    mass = probe_mass(**{**found, "order": empty}, backend="cuda")
    assert mass.column.shape == (1, 2, 0) and bool((mass.lse == float("-inf")).all())


def test_inputs_stay_as_they_are_and_odd_strides_are_copied():
    found = Case("odd", 90, 20, dim=24, dtype=BRAIN).inputs()
    wide = torch.full((1, 1, 90, 27), float("nan"), dtype=BRAIN)
    wide[..., 1:25] = found["k"]
    before = {name: x.clone() for name, x in found.items()}
    mass = probe_mass(**{**found, "k": wide[..., 1:25]}, backend="cuda")
    assert_probe(mass, found, "odd")
    for name, x in found.items():
        assert torch.equal(x.nan_to_num(7), before[name].nan_to_num(7)), name


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (ProbeProblem("meta", BRAIN, 64, 16), "needs a CUDA device, got meta"),
        (ProbeProblem("cpu", SINGLE, 64, 16), "probes in bfloat16 or float16, got torch.float32"),
        (ProbeProblem("cpu", HALF, 20, 16), "multiples of 8 up to 256, got D = 20"),
        (ProbeProblem("cpu", HALF, 264, 16), "multiples of 8 up to 256, got D = 264"),
    ],
    ids=["device", "dtype", "odd-dim", "wide-dim"],
)
def test_what_it_cannot_probe_is_refused(problem, reason):
    assert reason in cuda.why_not_probe(problem)


def test_auto_probes_with_it():
    """Rows, keys and dtypes that it takes; float32 goes on to another backend."""
    from permattn.backends import resolve

    assert resolve(ProbeProblem("cpu", BRAIN, 128, 64), "auto") == "cuda"
    assert resolve(ProbeProblem("cpu", SINGLE, 128, 64), "auto") != "cuda"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"key_range": torch.zeros(2, 2, dtype=torch.int32)}, "key_range: wants 2"),
        ({"all_rows": 3}, "all_rows: wants at least 5"),
        ({"lse": torch.zeros(1, 2, 4)}, "results: wrong dtype or shape"),
        ({"column": torch.zeros(1, 2, 19)}, "results: wrong dtype or shape"),
        ({"k": torch.zeros(1, 1, 20, 40, dtype=BRAIN)[..., 1:33]}, "multiple of 16 bytes"),
        ({"q": torch.zeros(1, 2, 65, 32, dtype=BRAIN)}, "1 to 64 rows, got 65"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_the_operator_checks_what_it_reads(change, reason):
    ints = {"first_position": [15], "first_coordinate": [15], "key_range": [[0, 20]]}
    args = {
        "q": torch.zeros(1, 2, 5, 32, dtype=BRAIN),
        "k": torch.zeros(1, 1, 20, 32, dtype=BRAIN),
        **{name: torch.tensor(x, dtype=torch.int32) for name, x in ints.items()},
        "order": None,
        "skip": None,
        "lse_is_given": False,
        "all_rows": 5,
        "lse": torch.zeros(1, 2, 5),
        **{name: torch.zeros(1, 2, 20) for name in ("column", "square", "diagonal")},
    }
    torch.ops.permattn_native.cuda_probe(*args.values())
    with pytest.raises(RuntimeError, match=reason):
        torch.ops.permattn_native.cuda_probe(*{**args, **change}.values())
