"""Gradients of the native CPU backend against float64."""

import functools

import pytest
import torch
from permattn import TokenBand, sparse_attention_with_lse, testing
from permattn.backends import cpu
from permattn.core.problem import BwdArgs, FwdArgs
from permattn.patterns.dense import plan_dense

pytestmark = pytest.mark.skipif(not cpu.available_isas(), reason=f"{cpu.load()}")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The backward multiplies in float32 on every instruction set: those with bf16 products add nothing.
KERNELS = [
    (i, d) for i in cpu.available_isas() if "bf16" not in i and "vnni" not in i for d in DTYPES
]
dtype_id = {"ids": lambda x: str(x).removeprefix("torch.")}

PLANS = {
    "causal": functools.cache(lambda: plan_dense(150, 130, causal=True)),
    "three-parts-in-three-orders": functools.cache(
        lambda: testing.split_plan(100, 120, heads=4, batch=2)
    ),
    "two-orders-share-queries": functools.cache(
        lambda: testing.crossed_plan(100, 120, heads=4, batch=2)
    ),
    "small-odd-blocks": functools.cache(
        lambda: testing.random_plan(
            70, 90, heads=4, permuted=True, holes=5, block_q=7, block_kv=3, band=TokenBand(-5, 30)
        )
    ),
}


@functools.cache
def visible(plan):
    return testing.visible_pairs(plan, *plan.leading_sizes()) > 0


def inputs(plan, dtype, *, batch=2, heads=4, kv_heads=2, dim=32, dim_v=40):
    g = torch.Generator().manual_seed(0)
    sq, skv = plan.num_q_tokens, plan.num_kv_tokens
    sizes = (
        *((heads, sq, dim), (kv_heads, skv, dim), (kv_heads, skv, dim_v)),
        *((heads, sq, dim_v), (heads, sq)),
    )
    *tensors, dlse = (torch.randn(batch, *size, generator=g) for size in sizes)
    return *(x.to(dtype) for x in tensors), dlse


def backward(q, k, v, dout, dlse, plan, scale, isa=None):
    out, lse = cpu.forward(FwdArgs(q, k, v, plan, scale), isa=isa)
    dlse = torch.where(lse == float("-inf"), 0.0, dlse)
    return cpu.backward(BwdArgs(q, k, v, out, lse, dout, dlse, plan, scale), isa=isa)


def dense_gradients(q, k, v, dout, dlse, seen, scale):
    x = [t.detach().requires_grad_() for t in (q, k, v)]
    out, lse = testing.masked_attention(*x, seen, scale)
    alive = torch.isfinite(lse)
    total = (out * dout.to(q.dtype)).sum() + (lse * dlse.to(q.dtype))[alive].sum()
    return torch.autograd.grad(total, x)


def check(plan, dtype, scale, isa=None, **sizes):
    q, k, v, dout, dlse = inputs(plan, dtype, **sizes)
    ours = backward(q, k, v, dout, dlse, plan, scale, isa)
    wide = [x.double() for x in (q, k, v, dout, dlse)]
    exact = dense_gradients(*wide, visible(plan), scale)
    plain = dense_gradients(q, k, v, dout, dlse, visible(plan), scale)
    for name, a, p, e in zip(("dq", "dk", "dv"), ours, plain, exact, strict=True):
        assert a.shape == e.shape and a.dtype == dtype
        testing.assert_within(a, p, e, name)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("isa", "dtype"), KERNELS, **dtype_id)
def test_gradients_match_float64(isa, dtype, plan):
    check(PLANS[plan](), dtype, 0.2, isa)


@pytest.mark.parametrize(("dim", "dim_v"), [(1, 1), (16, 80), (64, 64), (128, 17), (256, 256)])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_any_head_dim_and_group(dim, dim_v, kv_heads):
    plan = PLANS["three-parts-in-three-orders"]()
    check(plan, torch.float32, dim**-0.5, dim=dim, dim_v=dim_v, kv_heads=kv_heads)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_any_finite_scale(scale):
    check(PLANS["causal"](), torch.float32, scale)


@pytest.mark.parametrize(("sq", "skv"), [(0, 0), (0, 7), (7, 0), (1, 1)])
def test_shortest_sequences(sq, skv):
    plan = plan_dense(sq, skv, causal=False)
    q, k, v, dout, dlse = inputs(plan, torch.bfloat16)
    dq, dk, dv = backward(q, k, v, dout, dlse, plan, 0.2)
    assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, v.shape)
    assert all(torch.isfinite(x).all() for x in (dq, dk, dv))


@pytest.mark.parametrize("dtype", DTYPES, **dtype_id)
def test_two_runs_are_bit_identical(dtype):
    plan = testing.split_plan(400, 400, heads=4, batch=2)
    x = inputs(plan, dtype)
    once = backward(*x, plan, 0.2)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            for a, b in zip(once, backward(*x, plan, 0.2), strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, **dtype_id)
def test_unseen_rows_are_never_read_and_get_no_gradient(dtype):
    plan = PLANS["three-parts-in-three-orders"]()
    q, k, v, dout, dlse = inputs(plan, dtype, kv_heads=4)
    seen = visible(plan).expand(2, 4, -1, -1).any(2)
    assert not seen.all()
    clean = backward(q, k, v, dout, dlse, plan, 0.2)
    k, v = (testing.poison_unseen(x, seen) for x in (k, v))
    dirty = backward(q, k, v, dout, dlse, plan, 0.2)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
    for grad in dirty[1:]:
        assert not grad[~seen].any()


def test_autograd_reaches_it_through_strided_views():
    plan = PLANS["three-parts-in-three-orders"]()
    q, k, v, dout, dlse = inputs(plan, torch.float32)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    out, lse = sparse_attention_with_lse(*views, plan, scale=0.2, backend="cpu")
    alive = torch.isfinite(lse)
    total = (out * dout).sum() + (lse * dlse)[alive].sum()
    grads = torch.autograd.grad(total, views)
    for a, b in zip(grads, backward(q, k, v, dout, dlse, plan, 0.2), strict=True):
        assert torch.equal(a, b)
