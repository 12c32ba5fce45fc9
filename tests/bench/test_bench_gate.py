"""The gate lets right results pass and stops wrong ones; the run fails with them."""

from __future__ import annotations

import json

import permattn
import pytest
import torch
from permattn.testing import split_plan, visible_pairs

from bench import run
from bench.gate import judge, sample_rows, visible_rows
from bench.plans import RandomBlocks, TwoParts
from bench.results import load

QUICK = ["--quick", "tiny", "--backend", "reference"]


def inputs(num_tokens: int = 512, heads: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, num_tokens, 32, generator=generator) for _ in range(3)]


def test_rows_are_looked_up_as_the_oracle_says():
    plan = split_plan(150, 170, heads=3, batch=2, seed=1)
    rows = torch.tensor([0, 3, 77, 149])
    want = visible_pairs(plan, 2, 3)[:, :, rows] == 1
    assert torch.equal(visible_rows(plan, rows, 2, 3), want)


def test_sample_holds_both_ends():
    rows = sample_rows(8192)
    assert len(rows) == 48
    assert {0, 8191} <= set(rows.tolist())


def test_right_result_passes():
    q, k, v = inputs()
    plan = TwoParts(0.6, window=64)(512, 2)
    assert judge(permattn.sparse_attention(q, k, v, plan), q, k, v, plan).ok


@pytest.mark.parametrize("fault", ["one-row", "nan", "other-plan"])
def test_wrong_result_is_stopped(fault: str):
    q, k, v = inputs()
    plan = RandomBlocks(0.5)(512, 2)
    computed = RandomBlocks(0.5, seed=1)(512, 2) if fault == "other-plan" else plan
    out = permattn.sparse_attention(q, k, v, computed)
    if fault == "one-row":
        out[0, 1, -1] *= 1.001
    if fault == "nan":
        out[0, 1, 17, 0] = float("nan")
    assert not judge(out, q, k, v, plan).ok


def test_quick_run_writes_a_complete_row(tmp_path, capsys):
    out = tmp_path / "results.jsonl"
    assert run.main([*QUICK, "--out", str(out)]) == 0
    (row,) = load(out)
    assert set(row.runs) == {"sdpa", "kernel", "call"}
    assert {"ms", "p10", "p90", "kept", "tried", "gflop", "gflops"} <= set(row.runs["call"])
    assert {"cpu", "isa", "threads", "torch", "device"} <= set(row.machine)
    assert row.utc.endswith("+00:00")
    assert row.gate["call"]["ok"]
    assert "tiny" in capsys.readouterr().out


def test_wrong_result_fails_the_run_and_is_not_timed(tmp_path, monkeypatch, capsys):
    def wrong(q, k, v, plan, backend):
        return torch.zeros_like(q)

    monkeypatch.setattr(permattn, "sparse_attention", wrong)
    out = tmp_path / "results.jsonl"
    assert run.main([*QUICK, "--out", str(out)]) == 1
    assert not out.exists()
    assert "wrong" in capsys.readouterr().out


def test_unknown_case_is_an_error():
    assert run.main(["no-such-case"]) == 2


def test_a_backend_that_cannot_run_is_one_line(capsys):
    if torch.cuda.is_available():
        pytest.skip("the triton backend can run here")
    assert run.main(["--quick", "tiny", "--backend", "triton"]) == 2
    assert "triton" in capsys.readouterr().out


def test_list_names_every_case(capsys):
    assert run.main(["--list"]) == 0
    assert "memory-128k" in capsys.readouterr().out


def test_memory_is_measured_in_a_process_of_its_own():
    from dataclasses import replace

    from bench.memory import measure_memory
    from bench.registry import MEMORY

    small = replace(MEMORY, shape=replace(MEMORY.shape, num_tokens=1024))
    facts = measure_memory(small, "reference", 1)
    assert json.dumps(facts)
    assert 0.05 < facts["before_gb"] <= facts["peak_gb"] < 5
    assert facts["ok"]
