"""What the package promises beside numbers: memory, holes, repeatability, launches, lengths."""

import pytest
import torch
from interpreter.memory_checker import untouched_memory
from kernel_cases import POISONED, Case, a_shape, dense, expected, run_kernels, three_parts
from permattn import sparse_attention_with_lse
from permattn.core import AttnPart, AttnPlan, BlockIndex, Permutation, TokenBand
from permattn.testing import (
    assert_within,
    poison_unseen,
    random_plan,
    split_plan,
    visible_pairs,
)


@pytest.mark.parametrize("plan", POISONED.values(), ids=list(POISONED))
def test_keys_and_values_that_no_query_sees_never_reach_a_result(plan):
    case = Case("poison", lambda: plan, heads=2, kv_heads=1)
    q, k, v, dout, dlse = case.inputs(plan)
    seen = visible_pairs(plan, 1, 2).amax((1, 2))[:, None] > 0
    assert not bool(seen.all())
    clean = run_kernels(plan, [q, k, v, dout, dlse], 0.2)
    k, v = poison_unseen(k, seen), poison_unseen(v, seen)
    v[:, :, :, 0] = torch.where(seen, v[:, :, :, 0], float("inf"))
    dirty = run_kernels(plan, [q, k, v, dout, dlse], 0.2)
    for name, value in clean.items():
        assert torch.equal(value, dirty[name]), name


def test_queries_that_see_no_key_never_reach_a_gradient():
    # The band hides keys of listed blocks from the first queries: kernels meet those rows.
    band = TokenBand(30)
    plan = random_plan(100, 100, density=0.9, block_q=32, block_kv=32, band=band, seed=1)
    dead = ~(visible_pairs(plan, 1, 1).amax(-1) > 0)
    assert bool(dead[0, 0, :30].all()) and plan.parts[0].index.row_offsets[0, 0, 1] > 0
    q, k, v, dout, dlse = Case("dead", lambda: plan, heads=1).inputs(plan)
    clean = run_kernels(plan, [q, k, v, dout, dlse], 0.2)
    q, dout = (torch.where(dead[..., None], float("nan"), x) for x in (q, dout))
    dirty = run_kernels(plan, [q, k, v, dout, dlse], 0.2)
    for name, value in clean.items():
        assert torch.equal(value, dirty[name]), name


def test_two_runs_are_bit_identical():
    case = Case("twice", three_parts(0, 1, 2), batch=2, heads=2, kv_heads=1, dtype=torch.bfloat16)
    plan = case.plan()
    inputs = case.inputs(plan)
    first, second = run_kernels(plan, inputs, 0.2), run_kernels(plan, inputs, 0.2)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_inputs_are_not_modified():
    case = Case("inputs", three_parts(0, 1, 2), batch=2)
    plan = case.plan()
    inputs = case.inputs(plan)
    before = [x.clone() for x in (*inputs, *(t for p in plan.parts for t in p.tensors()))]
    run_kernels(plan, inputs, 0.2)
    after = [*inputs, *(t for p in plan.parts for t in p.tensors())]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize(("sq", "skv"), [(0, 0), (0, 40), (40, 0)], ids=["0x0", "0x40", "40x0"])
def test_empty_tensors_give_the_defined_result(sq, skv):
    plan = dense(sq, skv, causal=False)()
    results = run_kernels(plan, Case("empty", lambda: plan).inputs(plan), 0.2)
    assert not bool(results["out"].any())
    assert bool((results["lse"] == float("-inf")).all())
    assert not any(bool(results[name].any()) for name in ("dq", "dk", "dv"))


@pytest.mark.parametrize(
    ("plan", "launches"),
    [
        (dense(100, 100)(), 1),
        (a_shape(130), 1),
        # Two query orders: one launch each (one of them for two parts), and one to finish.
        (split_plan(90, 101, heads=2), 3),
    ],
    ids=["one-part", "two-parts-one-order", "three-parts-two-orders"],
)
def test_parts_of_one_query_order_share_a_launch(checker, plan, launches):
    q, k, v, *_ = Case("launches", lambda: plan).inputs(plan)
    before = checker.launches
    sparse_attention_with_lse(q, k, v, plan, backend="triton")
    assert checker.launches - before == launches


def unchecked_plan(tokens: int) -> tuple[AttnPlan, AttnPlan]:
    """A plan full of numbers out of range, and the plan that it must be read as."""
    order = torch.arange(tokens, dtype=torch.int32)
    holes = order.clone()
    holes[[3, 20, 41]] = -1
    bad = holes.clone()
    bad[[3, 20, 41]] = torch.tensor([tokens, 2**31 - 1, -(2**31)], dtype=torch.int32)

    def plan(token, kv, offsets, num_full):
        perm = Permutation(token[None, None], order[None, None])
        rows = [torch.tensor([[x]], dtype=torch.int32) for x in (kv, offsets, num_full)]
        part = AttnPart(perm, perm, BlockIndex(*rows, 16, 16), TokenBand(0))
        return AttnPlan((part,), validate=False)

    wrong = [0, 2**31 - 1, -1, 1, 99, 2, -(2**31), 0]
    return (
        plan(bad, wrong, [0, 3, 4, 500], [9, -4, 1]),
        plan(holes, [0, 1, 2, 0], [0, 1, 2, 4], [1, 0, 0]),
    )


def test_numbers_out_of_range_are_holes_and_skipped_blocks():
    bad, meant = unchecked_plan(48)
    inputs = Case("unchecked", lambda: bad, heads=1).inputs(bad)
    q, k, v, *_ = inputs
    ours = sparse_attention_with_lse(q, k, v, bad, scale=0.2, backend="triton")
    want = sparse_attention_with_lse(q, k, v, meant, scale=0.2, backend="triton")
    # Skipped blocks still fill lanes of a tile, so sums are grouped otherwise.
    torch.testing.assert_close(ours[0], want[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours[1], want[1], rtol=1e-5, atol=1e-6)
    # Gradients must stay in bounds, which the memory checker sees.
    run_kernels(bad, inputs, 0.2)


def test_lags_beyond_32_bits_mean_what_they_say():
    q, k, v, *_ = Case("lags", dense(40, 40)).inputs(dense(40, 40)())
    open_plan = dense(40, 40, causal=False)()

    def with_band(band):
        part = open_plan.parts[0]
        index = BlockIndex(
            part.index.kv_indices,
            part.index.row_offsets,
            torch.zeros_like(part.index.kv_num_full),
            part.index.block_q,
            part.index.block_kv,
        )
        return AttnPlan((AttnPart(part.q_perm, part.kv_perm, index, band),))

    want = sparse_attention_with_lse(q, k, v, open_plan, backend="triton")
    wide = sparse_attention_with_lse(
        q, k, v, with_band(TokenBand(-(2**40), 2**40)), backend="triton"
    )
    none = sparse_attention_with_lse(q, k, v, with_band(TokenBand(2**40)), backend="triton")
    assert torch.equal(wide[0], want[0])
    assert not bool(none[0].any())


def test_offsets_past_32_bits_are_computed_in_64():
    # 6 GiB that is never touched but for the rows in use: a 32-bit product of token and stride
    # would leave the tensor, and the memory checker would say so.
    tokens, stride = 24, 2**27
    with untouched_memory():
        virtual = torch.empty_strided((1, 1, tokens, 16), (0, 0, stride, 1), dtype=torch.bfloat16)
    assert virtual.stride(2) * (tokens - 1) > 2**31
    plan = dense(tokens, tokens)()
    case = Case("far", lambda: plan, heads=1, dim=16, dim_v=16, dtype=torch.bfloat16)
    q, k, v, dout, dlse = case.inputs(plan)
    virtual.copy_(k)
    results = run_kernels(plan, [q, virtual, v, dout, dlse], 0.2)
    plain, exact = expected(plan, [q, k, v, dout, dlse], 0.2)
    for name, value in results.items():
        assert_within(value, plain[name], exact[name], name)
