"""The bench of regions: contenders agree, what is wrong is not timed, pages tell what was found."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench import bilevel, bilevel_model, gpu_bilevel, gpu_prefill, gpu_record
from bench.bilevel_baselines import STAGES, Stage, attends, gather
from bench.bilevel_pages import bilevel_section
from bench.bilevel_pages import gpu_bilevel as gpu_page
from bench.clock import Timing
from bench.pages import performance_page

SMALL = Stage("small", 2, 12, 2, 3, 4, head_dim=16)
WIDE = replace(SMALL, columns=18)
QUICK = Timing(rounds=1, max_rounds=1, min_seconds=0.0)


@pytest.mark.parametrize("stage", [SMALL, WIDE], ids=["square", "wide"])
@pytest.mark.parametrize("phase", ["forward", "both"])
def test_contenders_agree(stage, phase):
    qkv, graph, grad = (
        x.double() if x.is_floating_point() else x for x in stage.draw(torch.float32)
    )
    results = [bilevel.prepared(f, qkv, graph, grad, phase)() for f in attends(stage).values()]
    assert len(results) == 4 and results[0].shape == (qkv if phase == "both" else grad).shape
    for x in results[1:]:
        torch.testing.assert_close(x, results[0], atol=1e-10, rtol=1e-10)


def test_stages_are_those_of_the_networks():
    keys = [s.topk * s.box[0] * s.box[1] for s in STAGES]
    assert keys == [64, 64, 64, 256, 256, 256]
    assert all(s.height % s.regions == 0 for s in STAGES)


def test_speed_of_a_small_stage_and_its_page():
    row = bilevel.speed(SMALL, "fp32", QUICK, compiled=False)
    for phase in ("forward", "both"):
        assert row[phase]["best_other"] in ("gather", "index_select", "mask")
        assert set(row[phase]["ms"]) == {"ours", "gather", "index_select", "mask"}
    found = {
        "machine": {"cpu": "a CPU", "isa": "portable", "threads": 2, "torch": "2"},
        "speed": {"small-fp32": row, "commit": "abc", "dirty": False},
        "routing": {"small": bilevel.routing(SMALL, QUICK), "commit": "abc", "dirty": False},
        "memory": {
            **{
                n: {"megabytes": m}
                for n, m in (("ours", 2.0), ("gather", 9.0), ("index_select", 4))
            },
            "stage": "small",
            "gather_over_ours": 4.5,
        },
        "model": {"runs": [{"title": "forward", "ours": 1.0, "gather": 2.0, "gain": 2.0}]},
    }
    page = bilevel_section(bilevel.rounded(found))
    assert "| small: 12x12, B=2, 2 heads of 16, 9 regions of 16, k=4 |" in page
    assert "4.5x; wanted: 8x, **missed**" in page and "| forward | 1 | 2 | 2.00x |" in page
    assert "Commit abc." in page


def test_a_wrong_result_is_not_timed(monkeypatch):
    real = attends

    def wrong(stage):
        made = real(stage)
        return made | {"ours": lambda qkv, graph: 1.01 * made["ours"](qkv, graph)}

    monkeypatch.setattr(bilevel, "attends", wrong)
    with pytest.raises(AssertionError, match="small fp32 forward: error"):
        bilevel.speed(SMALL, "fp32", QUICK, compiled=False)


def test_memory_is_measured_beyond_inputs(monkeypatch):
    monkeypatch.setattr(bilevel, "STAGES", (replace(SMALL, name="512-stage1"),))
    assert bilevel.peak_of("512-stage1", "ours")["megabytes"] >= 0.0


def test_arguments_are_checked(capsys):
    with pytest.raises(SystemExit):
        bilevel.main(["--stage", "nowhere"])
    assert "wants any of" in capsys.readouterr().err


@pytest.fixture
def on_cpu(monkeypatch):
    for module in (gpu_bilevel, gpu_prefill):
        monkeypatch.setattr(module, "DEVICE", torch.device("cpu"))


def test_the_gpu_suite_runs_as_far_as_it_can_here(on_cpu, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_prefill, "BUDGET_MS", 1.0)
    monkeypatch.setattr(gpu_bilevel, "CHECKED", (SMALL,))
    assert all(x["error"] <= x["bound"] for x in gpu_bilevel.correctness("auto"))
    data = gpu_bilevel.timing("auto", (SMALL, WIDE), compiled=False)
    names = set(data["ratios"])
    assert "small: forward over compulsory traffic" in names and "small: both over gather" in names
    assert "| small | routing | ours |" in "\n".join(gpu_page(data))
    section = gpu_record.Section("bilevel", "triton", "passed", "", 1.0, 60.0, data)
    facts = {"utc": "2026-01-01T00:00:00", "device": "a GPU", "cc": [9, 0], "driver": "1"}
    facts |= {"cuda_runtime": "13.0", "torch": "2", "triton": "3", "python": "3", "argv": ""}
    run = gpu_record.Record(False, "abc", False, **facts, sections=[section])
    gpu_record.write(run, tmp_path / "gpu")
    assert "compulsory traffic" in performance_page(tmp_path)


def test_another_contenders_failure_is_a_row(on_cpu, monkeypatch):
    monkeypatch.setattr(gpu_prefill, "BUDGET_MS", 1.0)

    def broken(qkv, graph):
        raise RuntimeError("no memory\nat all")

    qkv, graph, grad = SMALL.draw(torch.float32)
    found = gpu_bilevel._recorded("mask", broken, qkv, graph, grad, "forward")
    assert found == {"why_not": "RuntimeError: no memory"}
    with pytest.raises(RuntimeError):
        gpu_bilevel._recorded("ours", broken, qkv, graph, grad, "forward")


def test_the_gathers_gradient_is_as_large_as_said():
    """The premise of the comparison: a tensor R times the map is filled in the backward."""
    from torch.profiler import ProfilerActivity, profile

    qkv, graph, grad = SMALL.draw(torch.float32)
    leaf = qkv.requires_grad_()
    out = gather(leaf, graph, SMALL)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        out.backward(grad)
    largest = max(x.self_cpu_memory_usage for x in record.events())
    assert largest >= 4 * SMALL.num_regions * qkv[..., 2 * SMALL.channels // 2 :].numel()


def test_a_whole_model_is_compared():
    found = bilevel_model.model(QUICK, size=112, depths=(1, 1, 1, 1), dims=(32, 32, 32, 64))
    assert [run["title"].split(",")[0] for run in found["runs"]] == [
        "inference",
        "training step",
    ] * 2
    assert all(run["gain"] > 0 for run in found["runs"])


def test_released_attention_is_put_back():
    from permattn.models.vision import attention

    before = attention.attend_routed
    with bilevel_model.released():
        assert attention.attend_routed is not before
    assert attention.attend_routed is before
