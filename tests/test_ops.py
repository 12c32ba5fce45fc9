"""The torch.compile wall: opcheck, fullgraph with dynamic lengths, FLOPs, pytrees."""

import permattn as pa
import pytest
import torch
from permattn.core.packing import pack_plan, unpack_plan
from permattn.testing import random_plan, split_plan
from torch.utils.flop_counter import FlopCounterMode


def inputs(sq, skv, grad=True):
    return [torch.randn(1, h, s, 16, requires_grad=grad) for h, s in ((4, sq), (2, skv), (2, skv))]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    "plan", [lambda: pa.plan_dense(40, 40, causal=True), lambda: split_plan(40, 56, heads=4)],
    ids=["dense", "three-parts"],
)  # fmt: skip
def test_opcheck(plan, backend):
    plan = plan()
    q, k, v = inputs(plan.num_q_tokens, plan.num_kv_tokens)
    tensors, ints = pack_plan(plan)
    torch.library.opcheck(
        torch.ops.permattn.sparse_attention.default,
        (q, k, v, tensors, ints, [], [], [], 0.25, backend),
    )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_fullgraph_with_a_plan_as_input_and_dynamic_length(backend):
    graphs = 0

    def count(gm, _):
        nonlocal graphs
        graphs += 1
        return gm.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=count)
    def f(q, k, v, plan):
        return pa.sparse_attention(q * 2, k, v, plan, backend=backend) + 1

    for s in (100, 130, 200, 333):
        q, k, v = inputs(s, s, grad=False)
        plan = pa.plan_dense(s, s, causal=True, block_q=32, block_kv=32)
        want = pa.sparse_attention(q * 2, k, v, plan, backend=backend) + 1
        torch.testing.assert_close(f(q, k, v, plan), want, atol=1e-5, rtol=1e-5)
    # One graph for every length (the very first call may be specialised).
    assert graphs <= 2


def test_compiled_gradients():
    plan = split_plan(64, 64, heads=4)

    def f(q, k, v):
        out, lse = pa.sparse_attention_with_lse(q, k, v, plan)
        return out.sin().sum() + torch.where(lse > -1e30, lse, 0.0).sum()

    q, k, v = inputs(64, 64)
    want = torch.autograd.grad(f(q, k, v), (q, k, v))
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(q, k, v), (q, k, v))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_pack_and_unpack_are_inverse():
    plan = split_plan(40, 56, heads=4)
    back = unpack_plan(*pack_plan(plan))
    assert back.q_groups() == plan.q_groups()
    assert [p.band for p in back.parts] == [p.band for p in plan.parts]
    assert back.parts[0].kv_perm.is_identity


def test_flop_counter_counts_selected_blocks():
    plan = random_plan(128, 128, heads=4, block_q=32, block_kv=32, density=0.5)
    q, k, v = inputs(128, 128)
    with FlopCounterMode(display=False) as counter:
        out = pa.sparse_attention(q, k, v, plan)
    pairs = int(plan.num_block_pairs().sum())
    assert counter.get_total_flops() == 4 * pairs * 16
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 10 * pairs * 16


def test_two_runs_are_bit_identical():
    plan = split_plan(200, 200, heads=4)
    q, k, v = inputs(200, 200)
    runs = []
    for _ in range(2):
        out = pa.sparse_attention(q, k, v, plan)
        runs.append([out, *torch.autograd.grad(out.sin().sum(), (q, k, v))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_autocast_does_not_reach_inside(backend):
    plan = split_plan(40, 40, heads=4)
    leaves = inputs(40, 40)
    want = pa.sparse_attention(*leaves, plan, backend=backend)
    gradients = torch.autograd.grad(want.square().sum(), leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = pa.sparse_attention(*leaves, plan, backend=backend)
        again = torch.autograd.grad(out.square().sum(), leaves)
    assert torch.equal(out, want)
    assert all(torch.equal(x, y) for x, y in zip(gradients, again, strict=True))
