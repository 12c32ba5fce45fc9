"""The judge against dense masked attention, in float64 and float32, forward and gradients."""

import pytest
import torch
from permattn import AttnPlan, TokenBand, sparse_attention, sparse_attention_with_lse
from permattn.testing import (
    assert_within,
    crossed_plan,
    masked_attention,
    random_plan,
    split_plan,
    visible_pairs,
)

CASES = {
    "S1": lambda: random_plan(1, 1, density=1.0),
    "tails": lambda: random_plan(130, 95, heads=4, block_q=64, block_kv=32),
    "all-partial-causal": lambda: random_plan(90, 90, heads=4, band=TokenBand(0), density=0.8),
    "band-both-sides": lambda: random_plan(90, 120, heads=4, band=TokenBand(-40, 25), density=0.9),
    "empty-rows": lambda: random_plan(128, 128, heads=4, block_q=16, block_kv=16, density=0.05),
    "permuted-holes": lambda: random_plan(
        100, 140, batch=2, heads=4, block_q=32, block_kv=16, permuted=True, holes=7
    ),
    "broadcast-heads": lambda: random_plan(70, 70, batch=2, heads=1),
    "broadcast-batch": lambda: random_plan(70, 70, batch=1, heads=4),
    "three-parts": lambda: split_plan(150, 150, batch=2, heads=4),
    "three-parts-longer-kv": lambda: split_plan(60, 150, heads=4),
    "two-orders-share-queries": lambda: crossed_plan(90, 110, batch=2, heads=4),
    "not-causal": lambda: split_plan(90, 60, heads=4, causal=False),
    "nothing-listed": lambda: random_plan(40, 40, density=0.0),
}


def qkv(plan: AttnPlan, dtype: torch.dtype, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    sizes = ((4, plan.num_q_tokens, 16), (2, plan.num_kv_tokens, 16), (2, plan.num_kv_tokens, 24))
    return [
        torch.randn(2, *size, dtype=torch.float64, generator=g).to(dtype).requires_grad_()
        for size in sizes
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("case", CASES)
def test_equals_masked_attention(case, dtype):
    torch.manual_seed(0)
    plan = CASES[case]()
    seen = visible_pairs(plan, 2, 4)
    assert seen.max() <= 1, "parts must be disjoint"
    q, k, v = qkv(plan, dtype)
    out, lse = sparse_attention_with_lse(q, k, v, plan, backend="reference")
    plain, plain_lse = masked_attention(q, k, v, seen > 0, 0.25)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact, exact_lse = masked_attention(*wide, seen > 0, 0.25)
    assert_within(out, plain, exact, "out")
    assert_within(lse, plain_lse, exact_lse, "lse")
    dead = ~(seen > 0).any(-1)
    assert (out[dead] == 0).all() and (lse[dead] == float("-inf")).all()

    dout, dlse = torch.randn_like(exact), torch.where(dead, 0.0, torch.randn_like(exact_lse))

    def grads(o, stat, inputs):
        # Dead rows are cut out: their lse is a constant.
        stat = torch.where(dead, 0.0, stat)
        loss = (o * dout.to(o.dtype)).sum() + (stat * dlse.to(stat.dtype)).sum()
        return torch.autograd.grad(loss, inputs)

    ours, torchs = grads(out, lse, (q, k, v)), grads(plain, plain_lse, (q, k, v))
    for name, a, b, c in zip("qkv", ours, torchs, grads(exact, exact_lse, wide), strict=True):
        assert torch.isfinite(a).all()
        assert_within(a, b, c, f"d{name}", cancelled=float((dout @ dout.mT).abs().max()))


def test_gradcheck():
    plan = split_plan(20, 24, heads=2, window=6)
    q, k, v = (torch.randn(1, h, s, 3, dtype=torch.float64, requires_grad=True)
               for h, s in ((2, 20), (1, 24), (1, 24)))  # fmt: skip
    seen = visible_pairs(plan, 1, 2) > 0
    alive = seen.any(-1)

    def f(q, k, v):
        out, lse = sparse_attention_with_lse(q, k, v, plan)
        return out, torch.where(alive, lse, 0.0)

    assert torch.autograd.gradcheck(f, (q, k, v))


def test_parts_in_any_order_give_one_answer():
    plan = split_plan(120, 120, heads=4)
    q, k, v = qkv(plan, torch.float64)
    want = sparse_attention(q, k, v, plan)
    for order in ((2, 1, 0), (1, 2, 0), (0, 2, 1)):
        other = AttnPlan(tuple(plan.parts[i] for i in order))
        torch.testing.assert_close(sparse_attention(q, k, v, other), want, rtol=0, atol=1e-14)


def test_unseen_rows_may_hold_anything():
    plan = random_plan(64, 96, heads=4, block_q=16, block_kv=16, density=0.15)
    seen = (visible_pairs(plan, 2, 4) > 0).any(2).unflatten(1, (2, 2)).any(2)
    assert not seen.all()
    q, k, v = (x.detach() for x in qkv(plan, torch.float32))
    want = sparse_attention(q, k, v, plan)
    for bad in (float("nan"), float("inf")):
        k2, v2 = (torch.where(seen[..., None], x, bad).requires_grad_() for x in (k, v))
        q2 = q.clone().requires_grad_()
        out = sparse_attention(q2, k2, v2, plan)
        assert torch.equal(out, want)
        for grad in torch.autograd.grad(out.sum(), (q2, k2, v2)):
            assert torch.isfinite(grad).all()


@pytest.mark.parametrize("scale", [1.0, 300.0], ids=["plain", "huge-logits"])
def test_strided_and_expanded_views(scale):
    plan = random_plan(50, 50, heads=4, block_q=16, block_kv=16)
    base = torch.randn(2, 50, 8, 16) * scale
    q = base[:, :, :4].transpose(1, 2)
    k = base[:, :, 4:6].transpose(1, 2)
    v = base[:1, :, 6:8].transpose(1, 2).expand(2, 2, 50, 16)
    before = base.clone()
    out = sparse_attention(q, k, v, plan)
    assert out.stride() == (50 * 4 * 16, 16, 4 * 16, 1)
    assert torch.equal(out, sparse_attention(q.contiguous(), k.contiguous(), v.contiguous(), plan))
    assert torch.equal(base, before) and torch.isfinite(out).all()
