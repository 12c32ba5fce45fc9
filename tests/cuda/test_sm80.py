"""The kernel for mma.sync against float64, and what it promises beside numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import (
    BRAIN,
    CASES,
    HALF,
    POISONED,
    SINGLE,
    WINDOW,
    Case,
    a_shape,
    dense,
    drawn,
    expected,
)
from launches import Call, attend
from permattn.core import AttnPart, AttnPlan, BlockIndex, Permutation, TokenBand
from permattn.testing import assert_within, poison_unseen, visible_pairs

# The kernel computes in 16 bits: cases of float32 run in bfloat16.
ATTENDED = [replace(c, dtype=BRAIN if c.dtype == SINGLE else c.dtype) for c in CASES]
MORE = [
    Case("tiles-of-128-queries", dense(300, 300), heads=2, dim=128, dim_v=128, dtype=BRAIN),
    Case(
        "blocks-of-128",
        drawn(400, 390, heads=2, density=0.5, block_q=128, block_kv=128),
        dim=64,
        dim_v=64,
        dtype=HALF,
    ),
    Case("head-dim-96", drawn(200, 200, permuted=True), dim=96, dim_v=96, dtype=BRAIN),
    Case(
        "head-dims-200-and-256",
        drawn(70, 90, permuted=True, holes=5, band=WINDOW, block_kv=32),
        dim=200,
        dim_v=256,
        dtype=HALF,
    ),
    Case(
        "permuted-dim-128",
        drawn(200, 260, heads=2, permuted=True, holes=9, block_q=64, block_kv=64, density=0.5),
        dim=128,
        dim_v=128,
        dtype=HALF,
    ),
]


def run(shim, case: Case, **options):
    plan = case.plan()
    q, k, v, *_ = inputs = case.inputs(plan)
    return plan, inputs, attend(shim, Call(q, k, v, plan, case.scale, **options))


@pytest.mark.parametrize("case", [*ATTENDED, *MORE], ids=str)
def test_matches_float64(shim, case):
    plan, inputs, found = run(shim, case)
    plain, exact = expected(plan, inputs, case.scale)
    for name, value in zip(("out", "lse"), found, strict=True):
        assert_within(value, plain[name], exact[name], f"{case} {name}")


@pytest.mark.parametrize("eager", [False, True], ids=["lazy", "eager"])
@pytest.mark.parametrize("case", [MORE[0], MORE[-1]], ids=str)
def test_bits_do_not_depend_on_the_schedule(shim, case, eager):
    _, _, first = run(shim, case)
    for seed in (0, 2, 3):
        shim.set_options(seed, eager)
        for a, b in zip(run(shim, case)[2], first, strict=True):
            assert torch.equal(a, b)


def test_panels_have_no_bank_conflicts(shim):
    shim.take_statistics()
    run(shim, MORE[-1])
    loads, conflicts = shim.take_statistics()
    assert loads > 0
    assert conflicts == 0


def test_tiles_in_any_order_give_the_same_bits(shim):
    case = Case("order", dense(300, 300), dim=64, dim_v=64, dtype=BRAIN)
    _, _, first = run(shim, case)
    order = torch.tensor([3, 0, 4, 1, 2])
    for a, b in zip(run(shim, case, order=order)[2], first, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("plan", POISONED.values(), ids=list(POISONED))
def test_keys_that_no_query_sees_are_not_read(shim, plan):
    case = Case("poison", lambda: plan, heads=2, kv_heads=1, dtype=BRAIN)
    q, k, v, *_ = case.inputs(plan)
    seen = visible_pairs(plan, 1, 2) > 0
    seen_by_head = seen.any(2).any(1, keepdim=True)
    assert not seen_by_head.all()
    clean = attend(shim, Call(q, k, v, plan, case.scale))
    poisoned = [poison_unseen(x, seen_by_head) for x in (k, v)]
    assert all(x.isnan().any() for x in poisoned)
    for a, b in zip(attend(shim, Call(q, *poisoned, plan, case.scale)), clean, strict=True):
        assert torch.equal(a, b)


def test_numbers_out_of_range_are_holes(shim):
    """A plan that was not checked reads nothing outside its tensors."""
    case = Case("wild", dense(64, 64, causal=False), dim=64, dim_v=64, dtype=BRAIN)
    tame = case.plan()
    q, k, v, *_ = inputs = case.inputs(tame)
    perm = Permutation.identity(64)
    entries = torch.tensor([[[0, 7, -3, 1 << 30, 1]]], dtype=torch.int32)
    offsets, full = (torch.tensor([[x]], dtype=torch.int32) for x in ([0, 5], [5]))
    index = BlockIndex(entries, offsets, full, 64, 32)
    wild = AttnPlan((AttnPart(perm, perm, index, TokenBand()),), validate=False)
    found = attend(shim, Call(q, k, v, wild, case.scale))
    plain, exact = expected(tame, inputs, case.scale)
    for name, value in zip(("out", "lse"), found, strict=True):
        assert_within(value, plain[name], exact[name], name)


def test_parts_share_a_launch(shim):
    case = Case("shared", lambda: a_shape(200), dim=64, dim_v=64, dtype=BRAIN)
    plan, inputs, found = run(shim, case)
    assert len(plan.parts) == 2
    assert len(set(plan.q_groups())) == 1
    plain, exact = expected(plan, inputs, case.scale)
    assert_within(found[0], plain["out"], exact["out"], "out")
