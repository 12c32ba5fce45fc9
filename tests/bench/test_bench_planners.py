"""The cases of planners: what is planned, what of the attention it keeps, and what is printed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from permattn import plan_dense
from permattn.testing import visible_pairs
from rich.console import Console

from bench import run
from bench.clock import Timing
from bench.contenders import Bench, make_inputs, video_segments
from bench.heads import HEADS, Prompt, constructed, recall
from bench.pages import performance_page
from bench.planners import GRID_5, LAYER, LINES_8
from bench.registry import CASES, COMPARED, LONG, PLANNERS, Case, Shape
from bench.results import Row, break_even, merge

ONCE = Timing(rounds=1, max_rounds=1, min_seconds=0.001)


def shrunk(case: Case, num_tokens: int) -> Case:
    return replace(case.small(), shape=replace(case.shape, num_tokens=num_tokens))


def run_once(case: Case) -> Row:
    return run.run_case(case, "auto", ONCE, Console(quiet=True))


@pytest.mark.parametrize("name", PLANNERS)
def test_every_planner_keeps_causal_pairs_once(name: str):
    case = shrunk(COMPARED, 700)
    bench = Bench(case, "auto", 1)
    plan = bench.planned_by(PLANNERS[name])
    plan.check_values()
    seen = visible_pairs(plan, 1, 8)
    assert seen.max() == 1
    assert (seen[0].diagonal(dim1=-2, dim2=-1) == 1).all()
    assert not seen.triu(1).any()


def test_what_a_case_of_planners_records(tmp_path):
    row = run_once(shrunk(COMPARED, 1024))
    for name in PLANNERS:
        kept = row.runs[name]
        assert 0 < kept["least_recall"] <= kept["recall"] <= 1.001
        assert row.gate[name]["ok"] and f"{name}-plan" not in row.gate
        assert "recall" not in row.runs[f"{name}-plan"]
    merge(tmp_path / "cpu.jsonl", row)
    page = performance_page(tmp_path)
    assert all(f"| {name} |" in page for name in PLANNERS)


def test_a_prefill_case_is_itemised():
    case = next(c for c in CASES if c.name == "grid-32k-d64")
    row = run_once(shrunk(case, 1024))
    assert set(row.runs) == {"sdpa-causal", "causal-dense", "probe", *_PARTS}
    assert row.runs["probe"]["density"] is None and row.runs["plan"]["gflop"] == 0
    assert row.runs["attend"]["pairs"] == row.runs["plan-and-attend"]["pairs"]
    assert set(row.goals) == {goal.name for goal in case.goals}


_PARTS = ("plan", "attend", "plan-and-attend")


def test_targets_are_those_that_were_set():
    wanted = {c.name: [g.target for g in c.goals] for c in CASES if c.group == "prefill"}
    for head_dim in (64, 128):
        assert wanted[f"grid-32k-d{head_dim}"][0] == 8.0
        assert wanted[f"lines-32k-d{head_dim}"][0] == 6.0
    assert LONG.shape.num_tokens == 1 << 17 and wanted[LONG.name][0] == 0.05
    lengths = {c.shape.num_tokens: c.goals[0].target for c in CASES if c.group == "length"}
    assert lengths == {1024: None, 2048: None, 4096: 1.0, 8192: 1.0}


@pytest.mark.parametrize(
    ("planner", "low", "high"),
    [(GRID_5, 0.045, 0.055), (LINES_8, 0.07, 0.09)],
    ids=["grid", "lines"],
)
def test_the_stated_densities_at_32k_tokens(planner, low: float, high: float):
    shape = Shape("bf16", 64, num_tokens=32768, num_q_heads=1, num_kv_heads=1)
    q, k, _ = make_inputs(shape, video=True)
    assert low <= planner(q, k, video_segments(32768)).density() <= high


def test_a_layer_mixes_patterns():
    assert len(LAYER.heads) == 7
    assert {h.pattern for h in LAYER.heads} == {"grid", "vertical_slash", "tri_shape"}


def test_slow_cases_take_fewer_rounds():
    case = next(c for c in CASES if c.rounds == 3)
    usual = Timing(rounds=7, max_rounds=21, patience=30)
    timing = run.shortened(usual, case)
    assert (timing.rounds, timing.max_rounds, timing.patience) == (3, 4, 30)
    assert run.shortened(usual, CASES[0]) is usual
    assert run.shortened(run.QUICK, case) == run.QUICK


def length_row(num_tokens: int, ratio: float) -> Row:
    case = next(c for c in CASES if c.name == f"length-{num_tokens // 1024}k")
    row = Row(case.name, case.group, case.title, str(case.shape), "cpu", {}, "abc", False, "")
    row.goals[case.goals[0].name] = {"value": ratio}
    return row


@pytest.mark.parametrize(
    ("ratios", "want"),
    [
        ((0.5, 0.9, 1.2, 2.0), "ahead of SDPA from 4096 tokens."),
        ((1.5, 0.9, 1.2, 2.0), "ahead of SDPA from 4096 tokens."),
        ((1.1, 1.2, 1.3, 2.0), "ahead of SDPA from 1024 tokens, the shortest measured."),
        ((0.1, 0.2, 0.3, 0.9), "behind SDPA at every length up to 8192 tokens."),
    ],
    ids=["in-the-middle", "not-at-once", "everywhere", "nowhere"],
)
def test_break_even_is_where_all_longer_prompts_gain(ratios, want: str):
    rows = [length_row(1024 << i, ratio) for i, ratio in enumerate(ratios)]
    assert break_even(rows).endswith(want)
    assert break_even([]) == ""


def test_recall_of_everything_is_one():
    q, k, v = constructed(list(HEADS)[:3], Prompt(1000))
    plan = plan_dense(1000, 1000, causal=True)
    torch.testing.assert_close(recall(plan, q, k, v), torch.ones(3), atol=1e-5, rtol=0)


def test_recall_is_the_share_of_mass():
    q, k, v = constructed(["sink", "vertical"], Prompt(600))
    plan = PLANNERS["xattention"](q, k, ())
    seen = visible_pairs(plan, 1, 2)[0] > 0
    p = (q[0].double() @ k[0].double().mT / 128**0.5).masked_fill(
        torch.ones(600, 600).triu(1).bool(), float("-inf")
    )
    kept = (p.softmax(-1) * seen).sum(-1)[:, torch.arange(599, -1, -61)].mean(-1)
    torch.testing.assert_close(recall(plan, q, k, v).double(), kept, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", HEADS)
def test_constructed_scores_have_noise_of_one(name: str):
    """Outside a structure and its codes, scores are unit normal."""
    q, k, _ = constructed([name], Prompt(1500), seed=1)
    noise = q[0, 0, :, 64:] @ k[0, 0, :, 64:].T / 128**0.5
    assert abs(float(noise.std()) - 1) < 0.02 and abs(float(noise.mean())) < 0.02
