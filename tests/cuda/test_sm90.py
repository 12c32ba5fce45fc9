"""The kernel for sm_90a: what nvcc makes of it, on the simulator, against float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from kernel_cases import BRAIN, HALF, WINDOW, Case, a_shape, dense, drawn, expected
from launches import Call, attend
from permattn.core import AttnPart, AttnPlan, BlockIndex, Permutation, TokenBand
from permattn.testing import assert_within, poison_unseen, random_plan, visible_pairs
from simulated import Simulator, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
WIDE = {"dim": 64, "dim_v": 64}


def pairs_of_lists(rows: int) -> Callable[[], AttnPlan]:
    """Blocks of 64 queries whose neighbours share some key blocks, and one that has none."""
    lists = [[0, 1, 3], [1, 2, 3], [], [3, 0], [0, 1, 2, 3]][:rows]

    def plan() -> AttnPlan:
        mask = torch.zeros(rows, 4, dtype=torch.bool)
        for row, listed in enumerate(lists):
            mask[row, listed] = True
        q_perm, kv_perm = Permutation.identity(64 * rows - 6), Permutation.identity(250)
        index = BlockIndex.from_block_mask(mask, 64, 64)
        return AttnPlan((AttnPart(q_perm, kv_perm, index, TokenBand()),))

    return plan


CASES = [
    Case("one-token", dense(1, 1), **WIDE, dtype=BRAIN),
    Case("causal-float16", dense(131, 131), heads=2, **WIDE, dtype=HALF),
    Case("full-blocks", dense(200, 256, causal=False), heads=1, **WIDE, dtype=BRAIN),
    Case(
        "blocks-of-128",
        drawn(256, 256, heads=2, density=0.6, block_q=128, block_kv=128),
        dim=128,
        dim_v=128,
        dtype=BRAIN,
    ),
    Case("pairs-of-lists", pairs_of_lists(4), heads=1, dim=128, dim_v=128, dtype=BRAIN),
    Case("empty-rows", drawn(130, 130, density=0.2, block_q=64, block_kv=64), **WIDE, dtype=BRAIN),
    Case(
        "gqa-different-orders",
        drawn(70, 90, heads=4, permuted=True, holes=5, block_q=32, block_kv=16, band=WINDOW),
        heads=4,
        kv_heads=2,
        **WIDE,
        dtype=HALF,
    ),
    Case("two-parts-one-launch", lambda: a_shape(150), heads=1, **WIDE, dtype=BRAIN),
    Case("negative-scale", dense(64, 64), heads=1, **WIDE, dtype=BRAIN, scale=-0.3),
]


def run(shim, case: Case, **options):
    plan = case.plan()
    q, k, v, *_ = inputs = case.inputs(plan)
    simulator = Simulator()
    call = Call(q, k, v, plan, case.scale, 90, run=simulator, **options)
    return plan, inputs, attend(shim, call), simulator


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(shim, case):
    plan, inputs, found, simulator = run(shim, case)
    assert simulator.kernels
    plain, exact = expected(plan, inputs, case.scale)
    for name, value in zip(("out", "lse"), found, strict=True):
        assert_within(value, plain[name], exact[name], f"{case} {name}")


@pytest.mark.parametrize("eager", [False, True], ids=["late", "early"])
def test_keys_in_slot_order_come_in_bulk(shim, eager):
    """Gathered once before, rows are copied by TMA; copies may land as late or as early as ever."""
    plan = drawn(150, 256, heads=2, permuted=True, block_q=64, block_kv=64, density=0.6)
    case = Case("slots", plan, heads=2, **WIDE, dtype=BRAIN)
    made = case.plan()
    q, k, v, *_ = inputs = case.inputs(made)
    simulator = Simulator(options={"eager": eager})
    found = attend(shim, Call(q, k, v, made, case.scale, 90, in_slots=True, run=simulator))
    # Rows of Q come one by one, whatever they hold.
    assert simulator.executed("cp.async.bulk.tensor.4d")
    plain, exact = expected(made, inputs, case.scale)
    for name, value in zip(("out", "lse"), found, strict=True):
        assert_within(value, plain[name], exact[name], name)


def test_keys_of_tokens_in_another_order_are_gathered(shim):
    case = Case("gathered", drawn(70, 90, heads=2, permuted=True), heads=2, **WIDE, dtype=BRAIN)
    *_, simulator = run(shim, case)
    assert simulator.kernels and not simulator.executed("cp.async.bulk.tensor")


@pytest.mark.parametrize(
    ("case", "items"),
    [
        (Case("tiles", dense(300, 300), heads=2, **WIDE, dtype=BRAIN), 3),
        (Case("pairs", pairs_of_lists(5), heads=2, dim=128, dim_v=128, dtype=BRAIN), 3),
    ],
    ids=str,
)
def test_items_in_any_order_give_the_same_bits(shim, case, items):
    first = run(shim, case)[2]
    order = torch.arange(items).roll(1)
    for a, b in zip(run(shim, case, order=order)[2], first, strict=True):
        assert torch.equal(a, b)


def test_keys_that_no_query_sees_are_not_read(shim):
    plan = random_plan(100, 120, heads=2, density=0.5, block_q=32, block_kv=32, band=TokenBand(0))
    case = Case("poison", lambda: plan, heads=2, kv_heads=1, **WIDE, dtype=BRAIN)
    q, k, v, *_ = case.inputs(plan)
    seen = (visible_pairs(plan, 1, 2) > 0).any(2).any(1, keepdim=True)
    assert not seen.all()
    clean = attend(shim, Call(q, k, v, plan, case.scale, 90, run=Simulator()))
    poisoned = [poison_unseen(x, seen) for x in (k, v)]
    found = attend(shim, Call(q, *poisoned, plan, case.scale, 90, run=Simulator()))
    for a, b in zip(found, clean, strict=True):
        assert torch.equal(a, b)


def test_carried_state_adds_up(shim):
    """Two query orders are two launches that share one softmax."""
    from permattn.testing import split_plan

    case = Case("split", lambda: split_plan(70, 80, heads=2, batch=1, seed=2), **WIDE, dtype=BRAIN)
    plan, inputs, found, simulator = run(shim, replace(case, heads=2))
    assert len(simulator.kernels) > 1
    plain, exact = expected(plan, inputs, case.scale)
    assert_within(found[0], plain["out"], exact["out"], "out")
