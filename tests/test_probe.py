"""The probe operator: every backend against float64, and what it promises beside numbers."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from permattn.backends import AUTO_ORDER, BACKENDS, cpu
from permattn.core.probe import ProbeArgs
from permattn.probe import ProbeMass, probe_mass, probe_mass_op
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).parent / "triton"))
cases = importlib.import_module("probe_cases")

NAMES = cases.NAMES
native = pytest.mark.skipif(not cpu.available_isas(), reason=f"{cpu.load()}")
ON_CPU = [pytest.param("reference"), pytest.param("cpu", marks=native)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# An instruction set with bf16 products has kernels of its own for bf16 alone.
KERNELS = [
    (isa, dtype)
    for isa in cpu.available_isas()
    for dtype in DTYPES
    if "bf16" not in isa or dtype == torch.bfloat16
]


def equal(first: ProbeMass, second: ProbeMass) -> bool:
    return all(torch.equal(getattr(first, x), getattr(second, x)) for x in NAMES)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("case", [*cases.CASES, *cases.LONG], ids=str)
def test_masses_are_within_the_bound(case, backend):
    cases.check_case(case, backend)


@native
@pytest.mark.parametrize(
    ("isa", "dtype"), KERNELS, ids=lambda x: str(x).removeprefix("torch.").replace("_", "-")
)
@pytest.mark.parametrize("dim", [8, 33, 80])
def test_every_instruction_set_is_within_the_bound(isa, dtype, dim):
    for rows, kv_heads in ((1, 1), (5, 2), (17, 1), (64, 4), (100, 2)):
        case = cases.Case("isa", 250, rows, heads=4, kv_heads=kv_heads, dim=dim, dtype=dtype)
        for axis in ("positions", "unchecked"):
            found = replace(case, axis=axis, skip=True).inputs()
            first = found.get("first_coordinate", found["first_position"])
            args = ProbeArgs(
                *(found[x] for x in ("q", "k", "first_position", "key_range")),
                *(found.get("order"), first, None, found["skip"]),
            )
            mass = ProbeMass(*cpu.probe(args, isa=isa))
            cases.assert_probe(mass, found, f"{isa} {rows} rows {axis}")


def test_reference_is_the_same_in_chunks(monkeypatch):
    found = cases.LONG[2].inputs()
    home = importlib.import_module("permattn.backends.reference.probing")
    monkeypatch.setattr(home, "_PROBE_CHUNK_BYTES", 1)
    cases.assert_probe(probe_mass(**found, backend="reference"), found, "chunks")


def test_reference_computes_float64_in_float64():
    found = replace(cases.WHOLE, dtype=torch.float64).inputs()
    ours = probe_mass(**found)
    for name, want in zip(NAMES, cases.expected(found, torch.float64), strict=True):
        torch.testing.assert_close(getattr(ours, name), want.float(), rtol=0, atol=1e-7, msg=name)


@pytest.mark.parametrize("backend", ON_CPU)
def test_mass_is_complete_and_lags_hold_all_of_it(backend):
    mass = probe_mass(**cases.Case("complete", 700, 64).inputs(), backend=backend)
    one = torch.ones(1, 2)
    torch.testing.assert_close(mass.column.sum(-1), one, rtol=0, atol=1e-5)
    torch.testing.assert_close(mass.diagonal.sum(-1), one, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_an_own_lse_given_back_changes_little(backend, dtype):
    found = replace(cases.CASES[13], dtype=dtype).inputs()
    first = probe_mass(**found, backend=backend)
    second = probe_mass(**found, lse=first.lse, backend=backend)
    assert second.lse is first.lse
    for name in NAMES[1:]:
        a, b = getattr(first, name), getattr(second, name)
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-7, msg=name)


@native
def test_threads_do_not_change_a_bit():
    found = cases.LONG[3].inputs()
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 4, 1):
            torch.set_num_threads(threads)
            results.append(probe_mass(**found, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert equal(results[0], results[1]) and equal(results[0], results[2])


@pytest.mark.parametrize("backend", ON_CPU)
def test_inputs_are_not_modified_and_two_runs_are_equal(backend):
    found = replace(cases.CASES[14], given=True).inputs()
    before = {name: x.clone() for name, x in found.items()}
    first, second = (probe_mass(**found, backend=backend) for _ in range(2))
    assert equal(first, second)
    for name, x in found.items():
        assert torch.equal(x.nan_to_num(7.0), before[name].nan_to_num(7.0)), name


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize(
    "edit",
    [
        lambda f: {"k": f["k"][:, :, :0], "key_range": torch.zeros(1, 2, dtype=torch.int32)},
        lambda f: {"k": f["k"][:, :, :0], "order": torch.full((1, 9), 3, dtype=torch.int32)},
        lambda f: {"order": torch.zeros(1, 0, dtype=torch.int32)},
        lambda f: {x: f[x][:0] for x in ("q", "k", "first_position", "key_range")},
    ],
    ids=["no-keys", "no-keys-but-an-order", "empty-order", "no-batch-row"],
)
def test_empty_tensors_give_no_mass(backend, edit):
    found = cases.Case("empty", 40, 8).inputs()
    found |= edit(found)
    if "order" in found:
        found["first_coordinate"] = found["first_position"]
    mass = probe_mass(**found, backend=backend)
    n = found["order"].shape[1] if "order" in found else found["k"].shape[2]
    assert mass.column.shape == (len(found["q"]), 2, n)
    assert bool((mass.lse == float("-inf")).all())
    assert not any(bool(getattr(mass, x).any()) for x in NAMES[1:])


@pytest.mark.parametrize("backend", ON_CPU)
def test_strides_of_a_cache_and_of_one_shared_row(backend):
    found = cases.Case("strides", 100, 16, heads=4, kv_heads=2, batch=2).inputs()
    want = probe_mass(**found, backend=backend)
    cache = torch.full((2, 2, 160, 40), float("nan"))
    cache[:, :, 30:130, 4:36] = found["k"]
    assert equal(probe_mass(**{**found, "k": cache[:, :, 30:130, 4:36]}, backend=backend), want)
    one = probe_mass(**{**found, "k": found["k"][:1].expand(2, -1, -1, -1)}, backend=backend)
    assert torch.equal(one.column[0], want.column[0])


def test_the_operator_holds_what_torch_asks_of_one():
    found = cases.Case("opcheck", 50, 8, axis="subset", skip=True, batch=2).inputs()
    tensors = [found[x] for x in ("q", "k", "first_position", "key_range", "order")]
    rest = (found["first_coordinate"], None, found["skip"], "reference")
    torch.library.opcheck(probe_mass_op, (*tensors, *rest))


def test_results_carry_no_gradient():
    found = cases.Case("gradient", 50, 8).inputs()
    mass = probe_mass(**{**found, "q": found["q"].requires_grad_()})
    assert not any(getattr(mass, x).requires_grad for x in NAMES)


@pytest.mark.parametrize("case", [cases.WHOLE, cases.CASES[14]], ids=str)
def test_shapes_without_data(case):
    found = case.inputs()
    want = probe_mass(**found)
    meta = probe_mass(**{name: x.to("meta") for name, x in found.items()})
    with FakeTensorMode() as mode:
        fake = probe_mass(**{name: mode.from_tensor(x) for name, x in found.items()})
    for name in NAMES:
        shapes = {getattr(x, name).shape for x in (want, meta, fake)}
        assert len(shapes) == 1, name
        assert getattr(meta, name).is_meta


def test_compiles_whole():
    found = cases.Case("compiled", 80, 16, skip=True).inputs()

    @torch.compile(fullgraph=True, backend="eager")
    def total(found):
        return probe_mass(**found).column * 2

    assert torch.equal(total(found), probe_mass(**found).column * 2)


BAD = {
    "q-axes": (lambda f: {"q": f["q"][0]}, ValueError, "q: wants 4 axes"),
    "k-dtype": (lambda f: {"k": f["k"].half()}, TypeError, "k: wants q's dtype"),
    "integers": (lambda f: {"q": f["q"].int(), "k": f["k"].int()}, TypeError, "q: wants a float"),
    "k-device": (lambda f: {"k": f["k"].to("meta")}, ValueError, "k: wants q's device"),
    "k-batch": (lambda f: {"k": f["k"].repeat(3, 1, 1, 1)}, ValueError, "batch size 2, got 6"),
    "head-dim": (lambda f: {"k": f["k"][..., :8]}, ValueError, "head dim 32, at least 1, got 8"),
    "heads": (lambda f: {"q": f["q"][:, :3]}, ValueError, "Hq = 3, Hkv = 2"),
    "no-rows": (lambda f: {"q": f["q"][:, :, :0]}, ValueError, "at least one row"),
    "k-stride": (lambda f: {"k": f["k"].mT.contiguous().mT}, ValueError, "last stride must be 1"),
    "position-dtype": (
        lambda f: {"first_position": f["first_position"].long()},
        TypeError,
        "first_position: wants torch.int32",
    ),
    "range-shape": (lambda f: {"key_range": f["key_range"][:, :1]}, ValueError, "[2, 2]"),
    "order-batch": (
        lambda f: {"order": torch.zeros(3, 5, dtype=torch.int32)},
        ValueError,
        "order: wants [1 or 2, n]",
    ),
    "order-alone": (
        lambda f: {"order": torch.zeros(1, 5, dtype=torch.int32)},
        ValueError,
        "first_coordinate: wants int32 [B] beside an order",
    ),
    "skip-shape": (
        lambda f: {"skip": torch.zeros(2, 4, 7, dtype=torch.bool)},
        ValueError,
        "skip: wants shape [2, 4, 60], got [2, 4, 7]",
    ),
    "lse-dtype": (lambda f: {"lse": torch.zeros(2, 4, 8).double()}, TypeError, "lse: wants"),
    "backend": (lambda f: {"backend": "gpu"}, ValueError, "backend: wants one of"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    edit, error, words = BAD[name]
    found = cases.Case("bad", 60, 8, heads=4, kv_heads=2, batch=2).inputs()
    with pytest.raises(error) as caught:
        probe_mass(**{**found, **edit(found)})
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "backend", "words"),
    [
        ({}, "triton", "needs a CUDA device"),
        ({"dtype": torch.float64}, "cpu", "float16, got torch.float64"),
        ({"rows": 129}, "cpu", "at most 128 rows, got 129"),
        ({"dim": 264}, "cpu", "head dims to 256, got 264"),
    ],
    ids=["triton-on-cpu", "float64", "129-rows", "wide-heads"],
)
def test_a_named_backend_never_falls_back(edit, backend, words):
    if backend == "triton" and BACKENDS["triton"].INTERPRETED:
        pytest.skip("the interpreter takes cpu tensors")
    found = replace(cases.Case("named", 150, 16), **edit).inputs()
    with pytest.raises(NotImplementedError, match=words):
        probe_mass(**found, backend=backend)
    # What one cannot run another can.
    cases.assert_probe(probe_mass(**found), found, "auto")


def test_every_backend_answers_for_a_probe():
    assert set(AUTO_ORDER) == set(BACKENDS)
    assert all(hasattr(x, "probe") and hasattr(x, "why_not_probe") for x in BACKENDS.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("case", [*cases.CASES, *cases.LONG], ids=str)
def test_masses_on_a_gpu(case):
    cases.check_case(case, "triton", "cuda")
    found = case.inputs("cuda")
    assert equal(*(probe_mass(**found, backend="triton") for _ in range(2)))
