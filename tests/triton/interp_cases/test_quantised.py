"""Quantised attention on the kernels: numbers, poison, repeatability, launches."""

from dataclasses import replace

import pytest
import torch
from permattn import AttnPart, TokenBand, sparse_attention_with_lse
from permattn.backends import resolve, triton
from permattn.core import AttnPlan, BlockIndex, Permutation, QuantSpec
from permattn.core.problem import Problem
from permattn.testing import random_permutation, random_plan
from permattn.triton_kernels import launch
from quantised_cases import CASES, FP8, SMOOTH, QuantCase, check, check_case, run, two_parts

pytestmark = [
    # Formats are emulated here, and NaN is nobody's integer.
    pytest.mark.filterwarnings("ignore:triton"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in cast"),
]
BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_is_what_the_reference_means(case):
    check_case(case)


@pytest.mark.parametrize(
    "name", ["int8-fp8", "two-orders-batch", "negative-scale", "groups-of-16-fp8"]
)
def test_float8_as_hardware_has_it(name, monkeypatch):
    monkeypatch.setattr(launch, "capability_of", lambda device: 89)
    check_case(BY_NAME[name])


@pytest.mark.parametrize(
    "spec",
    [QuantSpec("int8"), QuantSpec("int8", "int8", kv_rows_per_scale=32), FP8, SMOOTH],
    ids=["none", "int8", "fp8", "smooth"],
)
def test_tokens_in_no_slot_and_unlisted_groups_are_not_read(spec):
    g = torch.Generator().manual_seed(2)
    q_perm = random_permutation(90, heads=2, keep=0.8, holes=7, generator=g)
    kv_perm = random_permutation(180, heads=1, keep=0.8, holes=7, generator=g)
    mask = torch.tensor([[True, False, True], [True, False, False]]).expand(1, 2, 2, 3)
    index = BlockIndex.from_block_mask(mask, 64, 64)
    plan = AttnPlan((AttnPart(q_perm, kv_perm, index, TokenBand(-30)),), spec)
    args = QuantCase("holes", lambda: plan, spec=spec).arguments()
    want = run(args)
    rows = [kv_perm.slot_of_token[0, 0] < 0]
    if not spec.smooth_k:
        # Smoothing reads every key that stands in a slot; nothing else looks at unlisted ones.
        rows.append(kv_perm.slot_of_token[0, 0] // 64 == 1)
    k, v = args.k.clone(), args.v.clone()
    for row in rows:
        k[:, :, row], v[:, :, row] = float("nan"), float("nan")
    q = args.q.clone()
    for head in range(2):
        q[:, head, q_perm.slot_of_token[0, head] < 0] = float("nan")
    got = run(replace(args, q=q, k=k, v=v))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_a_nan_that_is_listed_is_not_hidden():
    args = replace(QuantCase("nan", lambda: two_parts(100, heads=2)).arguments())
    v = args.v.clone()
    v[0, 0, 95, 3] = float("nan")
    out, _ = run(replace(args, v=v))
    assert bool(out[..., 3].isnan().all()) and not bool(out[..., :3].isnan().any())


def test_two_runs_are_bit_identical_and_inputs_stay():
    args = BY_NAME["two-orders"].arguments()
    before = [x.clone() for x in (args.q, args.k, args.v)]
    first, second = run(args), run(args)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    after = (args.q, args.k, args.v)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("name", "launches"),
    # q once, then keys and values of two parts, and one attention for both; the numbers of a shared
    # order are made once; state of two orders is finished by a launch of its own.
    [("two-parts-one-launch", 6), ("int8-none", 3), ("two-orders", 9), ("prologue-unquantised", 3)],
)
def test_rows_are_read_and_written_once(checker, name, launches):
    args = BY_NAME[name].arguments()
    before = checker.launches
    run(args)
    assert checker.launches - before == launches


@pytest.mark.parametrize(("sq", "skv"), [(0, 40), (40, 0)], ids=["no-queries", "no-keys"])
def test_empty_tensors_give_the_defined_result(sq, skv):
    plan = random_plan(sq, skv, block_q=64, block_kv=64)
    out, lse = run(QuantCase("empty", lambda: plan, spec=FP8).arguments())
    assert not bool(out.any()) and bool((lse == float("-inf")).all())


@pytest.mark.parametrize("spec", [QuantSpec("int8"), FP8], ids=["none", "fp8"])
def test_numbers_out_of_range_are_holes_and_skipped_blocks(spec):
    order = torch.arange(128, dtype=torch.int32)
    holes = order.clone()
    holes[[3, 60, 127]] = -1
    bad = holes.clone()
    bad[[3, 60, 127]] = torch.tensor([128, 2**31 - 1, -(2**31)], dtype=torch.int32)

    def case(token, kv, offsets, num_full):
        perm = Permutation(token[None, None], order[None, None])
        rows = [torch.tensor([[x]], dtype=torch.int32) for x in (kv, offsets, num_full)]
        part = AttnPart(perm, perm, BlockIndex(*rows, 64, 64), TokenBand(0))
        plan = AttnPlan((part,), spec, validate=False)
        return QuantCase("unchecked", lambda: plan, spec=spec, heads=1)

    args = case(bad, [0, 2**31 - 1, -1, 1, 99], [0, 3, 500], [9, -4]).arguments()
    meant = case(holes, [0, 1], [0, 1, 2], [1, 0]).arguments()
    out, lse = run(args)
    want, want_lse = run(replace(args, plan=meant.plan))
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (QuantSpec("none", "int8"), "only together with Q and K"),
        (QuantSpec("int8", "int8", 64, 8), "kv_rows_per_scale of .16, 32, 64, 128., got 8"),
        (QuantSpec("int8", "none", 256, 64), "q_rows_per_scale up to 128, got 256"),
    ],
    ids=["pv-alone", "small-groups", "large-groups"],
)
def test_what_no_kernel_can_is_said(spec, why):
    facts = ("cpu", torch.float32, 2, 1, 32, 32, ((256, 256),), spec)
    with pytest.raises(NotImplementedError, match=why):
        resolve(Problem(*facts), "triton")
    assert "gradients" in str(triton.why_not(Problem(*facts[:-1], FP8, needs_grad=True)))


def test_the_front_door_leads_here():
    case = BY_NAME["prologue"]
    args = case.arguments()
    ours = sparse_attention_with_lse(
        *(args.q, args.k, args.v, args.plan),
        scale=args.scale,
        prologue=args.prologue,
        backend="triton",
    )
    check(ours, args, "front door")
