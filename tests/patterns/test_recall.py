"""The planner keeps the attention of heads that were built to have some, at a tenth of the cost.

Signal to noise: every score is a structure plus unit normal noise. A structure is worth 8 to 18
logits on its pairs (`bench.heads` states each), just enough that at 16k tokens it holds all but a
few percent of the mass: what the noise holds is the recall that no sparse plan can reach. Codes
that tell positions apart add noise of their own, up to 2.3 logits.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from permattn import AttnPlan, HeadPattern, plan_prefill

from bench.gate import visible_rows
from bench.heads import HEADS, Prompt, constructed, recall

AUTO = HeadPattern("auto", sink=64, local=256, last=64, vertical=256, slash=8)
# A line every 28 tokens is a third of the budget; rows as many would be another.
AUTO_OF = {"v-row": replace(AUTO, h=False, local=192)}
NAMED = {
    "local": HeadPattern("a_shape", sink=16, local=256),
    "sink": HeadPattern("tri_shape", sink=16, local=256, last=64),
    "vertical": replace(AUTO, pattern="vertical_slash"),
    "diagonal": replace(AUTO, pattern="vertical_slash", vertical=16, slash=4),
    "v-frame": replace(AUTO, pattern="grid", s=False),
    "v-row": replace(AUTO, pattern="grid", h=False, s=False, local=192),
    "s-frame": replace(AUTO, pattern="grid", h=False, v=False),
    "s-shifted": replace(AUTO, pattern="grid", h=False, v=False),
    "v-and-h": replace(AUTO, pattern="grid", s=False),
    "vertical-diagonal": replace(AUTO, pattern="vertical_slash"),
}


def densities(plan: AttnPlan) -> torch.Tensor:
    """Pairs in listed blocks over causal pairs, per head."""
    sq, skv = plan.num_q_tokens, plan.num_kv_tokens
    return plan.num_block_pairs()[0].double() / (sq * skv - sq * (sq - 1) / 2)


def check(names: list[str], heads: list[HeadPattern], n: int, seed: int, dtype: torch.dtype):
    prompt = Prompt(n)
    q, k, v = constructed(names, prompt, dtype=dtype, seed=seed)
    plan = plan_prefill(q, k, [prompt.segments], heads)
    found = zip(names, recall(plan, q, k, v).tolist(), densities(plan).tolist(), strict=True)
    wrong = [x for x in found if x[1] < 0.95 or x[2] > 0.10]
    assert not wrong, f"(head, recall, density): {wrong}"


@pytest.mark.parametrize(
    ("n", "seed", "dtype"),
    [(16384, 0, torch.float32), (15477, 1, torch.bfloat16)],
    ids=["16384-fp32", "15477-bf16"],
)
def test_auto_keeps_95_percent_of_every_head_at_10_percent_density(n, seed, dtype):
    names = list(HEADS)
    check(names, [AUTO_OF.get(name, AUTO) for name in names], n, seed, dtype)


def test_named_patterns_do_too():
    check(list(NAMED), list(NAMED.values()), 16384, 2, torch.float32)


def test_a_chunk_of_a_prefill_does_too():
    names = ["vertical", "v-frame", "s-shifted", "vertical-diagonal"]
    prompt = Prompt(16384)
    q, k, v = constructed(names, prompt, seed=3)
    # A chunk that ends inside the video, so that its last rows are visual.
    stop = prompt.video.stop - 1000
    q, k, v = q[:, :, stop - 4000 : stop], k[:, :, :stop], v[:, :, :stop]
    plan = plan_prefill(q, k, [prompt.segments[:2]], [AUTO] * len(names))
    assert recall(plan, q, k, v).min() >= 0.95 and densities(plan).max() <= 0.10


def test_a_planner_that_finds_nothing_has_no_recall():
    names = ["vertical", "diagonal", "v-frame", "s-frame"]
    prompt = Prompt(8000)
    q, k, v = constructed(names, prompt)
    plan = plan_prefill(q, k, None, [HeadPattern("a_shape", sink=64, local=256)] * 4)
    assert recall(plan, q, k, v).max() < 0.6


def test_a_diagonal_head_keeps_diagonals_not_columns():
    """Each of 64 probe rows sees another key; none of those keys is seen by all rows."""
    prompt = Prompt(8000)
    q, k, _ = constructed(["diagonal"], prompt)
    plan = plan_prefill(q, k, [prompt.segments], [AUTO])
    rows = prompt.video.stop - torch.tensor([1333, 1000, 500])
    seen = visible_rows(plan, rows, 1, 1)[0, 0]
    for lag in (430, 611):
        assert seen[torch.arange(3), rows - lag].all()
    assert seen[:, AUTO.sink : int(rows[0]) - AUTO.local].all(0).sum() <= 4
