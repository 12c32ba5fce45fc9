"""The GPU bench: shapes, times, goals and rooflines, as far as they are arithmetic."""

from __future__ import annotations

import pytest
import torch

from bench import gpu_bench, gpu_goals, gpu_layers, gpu_peers
from bench.gpu_clock import Clock, times_of
from bench.gpu_record import Record, Run
from bench.gpu_shapes import BF16, INT8_FP8, PEAKS, SHAPES, SWEEP
from bench.gpu_suite import Journal, Suite

BY_NAME = {shape.name: shape for shape in SHAPES}


def test_shapes_are_those_of_the_protocol():
    facts = {s.name: (s.tokens, s.heads, s.head_dim) for s in SHAPES}
    assert facts == {
        "a": (109_632, 7, 128),
        "b": (115_200, 24, 128),
        "c": (75_600, 40, 128),
        "d": (17_550 + 226, 48, 64),
        "e-4k": (4_096 + 512, 24, 128),
        "e-16k": (16_384 + 512, 24, 128),
    }
    assert BY_NAME["d"].text == 226 and BY_NAME["a"].top == 64
    assert BY_NAME["e-16k"].densities == SWEEP and BY_NAME["e-16k"].blocks == (128, 64)
    assert 0.1 in BY_NAME["b"].densities and BY_NAME["c"].densities == (0.5, 0.3, 0.2)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_lists_have_the_density_that_they_say(shape):
    """On the shape of a rehearsal, whose text is dense."""
    small = shape.tiny()
    layer = gpu_layers.Layer(small, torch.device("cpu"))
    listed = gpu_layers.Listed.of(layer, 64, 0.2)
    mask, kept = listed.mask, listed.kept
    assert (mask.sum(-1) == kept).all() and mask.shape[0] == small.heads
    blocks = -(-layer.vision // 64)
    assert float(listed.plan.parts[0].index.num_entries().double().mean()) >= kept * blocks
    inputs = (layer.q, layer.k, layer.v, listed.plan)
    out = gpu_bench.permattn.sparse_attention(*inputs, backend="reference")
    error, bound = listed.gate(out, quantised=False)
    assert error <= bound
    for wrong in (out.masked_fill(out > 0, float("nan")), 1.1 * out):
        error, bound = listed.gate(wrong, quantised=False)
        assert not error <= bound
    error, bound = listed.gate(out * float("nan"), quantised=True)
    assert not error <= bound


@pytest.fixture
def suite(tmp_path) -> Suite:
    made = Suite(torch.device("cpu"), Journal(tmp_path / "journal"), rehearsal=True)
    made.backends, made.stand_ins = ("triton",), {"triton": "reference"}
    made.deadline = float("inf")
    return made


def runs_of(suite: Suite) -> list[dict]:
    return [line["run"] for line in suite.journal.read() if line["kind"] == "run"]


def test_a_wrong_result_is_not_timed(suite, monkeypatch):
    real = gpu_bench.permattn.sparse_attention
    monkeypatch.setattr(gpu_bench.permattn, "sparse_attention", lambda *a, **k: 1.5 * real(*a, **k))
    gpu_bench.bench(suite, BY_NAME["e-4k"])
    ours = [run for run in runs_of(suite) if run["contender"] == "triton"]
    assert [run["why_not"] for run in ours if run["what"] == "total"] == ["the result is wrong"]
    assert suite.wrong


def test_a_package_that_is_missing_or_fails_is_data(suite, monkeypatch):
    def broken(x: gpu_peers.Inputs) -> gpu_peers.Call:
        raise torch.OutOfMemoryError("no room\nfor it")

    monkeypatch.setitem(gpu_peers.DENSE, "broken", (broken, "bf16"))
    gpu_bench.bench(suite, BY_NAME["e-4k"])
    why = {run["contender"]: run["why_not"] for run in runs_of(suite) if run["why_not"]}
    assert why["broken"] == "OutOfMemoryError: no room"
    for name in ("flash-attn-3", "flash-attn-4"):
        assert why[name].startswith("not importable: No module named")


def test_a_long_call_is_sampled_as_often_as_its_budget_allows(monkeypatch):
    clock = Clock(torch.device("cpu"), budget_s=1.0)
    monkeypatch.setattr(clock, "_once", lambda call: 400.0)
    assert clock(lambda: None).reps == 3 and clock(lambda: None).first_ms >= 0
    clock = Clock(torch.device("cpu"))
    monkeypatch.setattr(clock, "_once", lambda call: 100.0)
    assert clock(lambda: None).reps == 30


def test_times_are_median_and_quantiles():
    found = times_of([float(x) for x in range(11)])
    assert (found.ms, found.p10, found.p90, found.reps) == (5.0, 1.0, 9.0, 11)


@pytest.mark.parametrize(
    ("fmt", "rate"),
    [("bf16", 989.0), ("int8", 1319.0), ("int8+fp8", 1979.0), ("int8+int8", 1979.0)],
)
def test_ceilings_of_mixed_formats(fmt, rate):
    assert PEAKS["NVIDIA H200"].of(fmt) == pytest.approx(rate, rel=1e-3)


def timed(shape: str, contender: str, ms: float, **facts) -> Run:
    return Run("s", shape, contender, ms=ms, **{"block": 128, **facts})


def dense(shape: str, ms: float, rate: float, name: str = "sdpa-cudnn") -> Run:
    return Run("s", shape, name, ms=ms, tflops=rate)


def sweep(times: dict[float, float]) -> list[Run]:
    return [timed("e-16k", "cuda", ms, density=d) for d, ms in times.items()]


@pytest.mark.parametrize(
    ("times", "found"),
    [
        ({1.0: 12.0, 0.9: 11.0, 0.8: 9.0, 0.5: 6.0}, 0.85),
        ({1.0: 9.0, 0.5: 5.0}, 1.0),
        ({1.0: 30.0, 0.5: 20.0}, 0.0),
        ({1.0: 12.0}, None),
    ],
    ids=["between", "always-faster", "always-slower", "too-few"],
)
def test_break_even_lies_between_two_densities(times, found):
    runs = [dense("e-16k", 10.0, 500.0), dense("e-16k", 40.0, 125.0, "other"), *sweep(times)]
    value = gpu_goals.break_even(gpu_goals.Times("cuda", runs))
    assert value == (None if found is None else pytest.approx(found))


def judged(runs: list[Run]) -> dict[str, tuple[str, float | None]]:
    return {g.id: (g.status, g.value) for g in gpu_goals.judge(runs, ["cuda"])}


def test_goals_without_times_are_not_measured():
    assert set(judged([]).values()) == {("not measured", None)}


def test_goals_are_read_off_the_runs():
    b = {"density": 0.1}
    runs = [
        timed("a", "cuda", 5.0, tflops=320.0),
        timed("a", "cuda", 0.1, what="plan"),
        timed("b", "cuda", 20.0, **b),
        timed("b", "cuda", 1.0, what="plan", **b),
        timed("b", "cuda", 16.0, format=INT8_FP8, **b),
        timed("b", "cuda", 0.6, what="prepare", format=INT8_FP8, **b),
        timed("b", "cuda", 0.1, what="statistics", format=INT8_FP8, **b),
        timed("b", "cuda", 14.0, what="kernel", format=INT8_FP8, **b),
        timed("c", "cuda", 50.0, density=0.3),
        timed("c", "cuda", 25.0, density=0.3, format=INT8_FP8),
        dense("c", 150.0, 600.0, "sdpa-flash"),
    ]
    found = judged(runs)
    assert found["flashinfer"] == ("met", 320.0)
    assert found["plan"] == ("not met", 0.05)
    assert found["int8+fp8"] == ("not met", 1.25)
    assert found["prepare"] == ("met", pytest.approx(0.05))
    assert found["paro-30"] == ("met", 3.0)
    assert found["paro-50"] == ("not measured", None)


def test_rates_stand_beside_the_best_dense_kernel_and_the_ceilings():
    facts = {"utc": "2026", "cc": [9, 0], "driver": "", "cuda_runtime": "", "torch": ""}
    made = Record(False, "abc", False, device="NVIDIA H200", triton="", python="", argv="", **facts)
    made.ceilings = {"matmul_tflops": 800.0}
    made.bench = [
        dense("e-16k", 10.0, 600.0),
        dense("e-16k", 12.0, 500.0, "sdpa-flash"),
        *(
            timed("e-16k", "cuda", 1.0, density=d, tflops=rate, format=BF16)
            for d, rate in ((0.5, 580.0), (0.3, 570.0), (0.2, 480.0))
        ),
        Run("s", "e-16k", "sageattention", format="its own", ms=8.0, tflops=750.0),
    ]
    gpu_goals.complete(made)
    ours = made.bench[4]
    assert ours.of_best_dense == pytest.approx(0.8)
    assert ours.of_nominal == pytest.approx(480 / 989) and ours.of_measured == pytest.approx(0.6)
    assert made.bench[5].of_nominal is None
    assert made.goals == []
    gpu_goals.complete(made)
    assert judged(made.bench)["rate-128"] == ("not met", pytest.approx(0.8))
