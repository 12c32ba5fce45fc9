"""The cases and their plans: what is listed is what the case says."""

from __future__ import annotations

import pytest
import torch
from permattn.testing import visible_pairs

from bench.baselines import block_mask
from bench.plans import Dense, RandomBlocks, TwoParts, num_pairs
from bench.registry import CASES, TARGETS

BUILDERS = [
    Dense(),
    Dense(causal=True),
    RandomBlocks(0.25, block_q=32, block_kv=32),
    RandomBlocks(0.25, causal=True, block_q=32, block_kv=32),
    RandomBlocks(0.5, causal=True, block_q=32, block_kv=16),
    TwoParts(0.6, window=64, block_q=32, block_kv=32),
]


@pytest.mark.parametrize("builder", BUILDERS, ids=str)
def test_plan_is_legal_and_parts_are_disjoint(builder):
    plan = builder(512, 2)
    plan.check_values()
    assert visible_pairs(plan, 1, 2).max() == 1


@pytest.mark.parametrize("density", [0.5, 0.25, 0.125])
def test_random_rows_hold_the_stated_share(density: float):
    index = RandomBlocks(density)(4096, 3).parts[0].index
    lengths = index.row_offsets.diff()
    assert (lengths == density * 32).all()
    assert (index.kv_num_full == lengths).all()


def test_heads_have_different_lists():
    index = RandomBlocks(0.25)(4096, 3).parts[0].index
    mask = index.to_block_mask(32)[0]
    assert not torch.equal(mask[0], mask[1])


def test_two_parts_list_as_much_as_one():
    one, two = RandomBlocks(0.25, causal=True)(8192, 4), TwoParts(0.25)(8192, 4)
    assert num_pairs(two, 1, 4) == pytest.approx(num_pairs(one, 1, 4), rel=0.01)


def test_every_causal_query_sees_itself():
    seen = visible_pairs(RandomBlocks(0.1, causal=True, block_q=32, block_kv=32)(512, 2), 1, 2)
    assert (seen[0].diagonal(dim1=-2, dim2=-1) == 1).all()


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_flex_gets_the_same_blocks(causal: bool):
    plan = RandomBlocks(0.4, causal=causal, block_q=128, block_kv=128)(2048, 2)
    index = plan.parts[0].index
    mask = block_mask(plan)
    assert torch.equal(mask.to_dense().bool(), index.to_block_mask(16))
    assert torch.equal(mask.full_kv_num_blocks, index.kv_num_full)


def test_flex_refuses_what_it_cannot_say():
    with pytest.raises(NotImplementedError, match="second part"):
        block_mask(TwoParts(0.5)(512, 1))


def test_registry_is_consistent():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert any(case.quick for case in CASES)
    for case in CASES:
        runs = {run.name for run in case.runs}
        for goal in case.goals:
            assert {goal.slow, goal.fast, goal.own or goal.fast} <= runs, (case.name, goal.name)
        assert (case.small().shape.num_tokens) <= 512


def test_every_row_of_the_table_has_a_case_and_its_targets():
    for (dtype, head_dim), targets in TARGETS.items():
        case = next(c for c in CASES if c.name == f"{dtype}-d{head_dim}")
        wanted = [g.target for g in case.goals if "vs SDPA" in g.name and g.slow == "sdpa"]
        assert wanted[:4] == list(targets[:4])
        causal = next(g for g in case.goals if g.name.startswith("causal 25 %"))
        assert causal.target == targets[4]
        assert str(case.shape) == f"B=1 H=8 N=8192 D={head_dim} {dtype}"
