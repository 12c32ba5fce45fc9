"""The native CPU forward: every instruction set of this machine against float64."""

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from permattn import TokenBand, sparse_attention, testing
from permattn.backends import cpu, reference
from permattn.core import AttnPart, AttnPlan, BlockIndex, Permutation
from permattn.core.problem import FwdArgs, Problem
from permattn.patterns.dense import plan_dense

pytestmark = pytest.mark.skipif(not cpu.available_isas(), reason=f"{cpu.load()}")

ISAS = cpu.available_isas()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# An instruction set with bf16 products has kernels of its own for bf16 alone, and one with products
# of bytes for quantised attention alone.
KERNELS = [
    (i, d)
    for i in ISAS
    for d in DTYPES
    if "vnni" not in i and ("bf16" not in i or d == torch.bfloat16)
]
dtype_id = {"ids": lambda x: str(x).removeprefix("torch.")}

PLANS = {
    "causal": lambda: plan_dense(200, 200, causal=True),
    "three-parts-in-three-orders": lambda: testing.split_plan(150, 170, heads=4, batch=2),
    "two-orders-share-queries": lambda: testing.crossed_plan(150, 170, heads=4, batch=2),
    "permuted-with-holes": lambda: testing.random_plan(
        150, 190, heads=4, permuted=True, holes=9, block_kv=16, band=TokenBand(-5, 70)
    ),
    "two-heads": lambda: testing.random_plan(
        70, 90, heads=2, permuted=True, band=TokenBand(0), block_kv=16
    ),
    "small-odd-blocks": lambda: testing.random_plan(
        70, 100, heads=4, permuted=True, block_q=7, block_kv=3, band=TokenBand(None, 20)
    ),
}
PLANS = {name: functools.cache(make) for name, make in PLANS.items()}


@functools.cache
def visible(plan, batch, heads):
    """The oracle walks lists in Python: once for every list is enough (plans hash by identity)."""
    pairs = testing.visible_pairs(plan, *plan.leading_sizes()) > 0
    return pairs.expand(batch, heads, -1, -1)


def inputs(plan, dtype, *, batch=2, heads=4, kv_heads=2, dim=64, dim_v=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    sq, skv = plan.num_q_tokens, plan.num_kv_tokens
    return [
        torch.randn(batch, h, s, w, generator=g).to(dtype)
        for h, s, w in ((heads, sq, dim), (kv_heads, skv, dim), (kv_heads, skv, dim_v))
    ]


def forward(q, k, v, plan, scale=None, isa=None):
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return cpu.forward(FwdArgs(q, k, v, plan, scale), isa=isa)


def check(q, k, v, plan, scale=None, isa=None):
    scale = q.shape[3] ** -0.5 if scale is None else scale
    seen = visible(plan, *q.shape[:2])
    ours = forward(q, k, v, plan, scale, isa)
    exact = testing.masked_attention(q.double(), k.double(), v.double(), seen, scale)
    plain = testing.masked_attention(q, k, v, seen, scale)
    assert ours[0].dtype == q.dtype and ours[1].dtype == torch.float32
    for name, a, p, e in zip(("out", "lse"), ours, plain, exact, strict=True):
        testing.assert_within(a, p, e, name)


@pytest.mark.parametrize("plan", [x for x in PLANS if x != "two-heads"])
@pytest.mark.parametrize(("isa", "dtype"), KERNELS, **dtype_id)
def test_forward_matches_float64(isa, dtype, plan):
    plan = PLANS[plan]()
    check(*inputs(plan, dtype), plan, isa=isa)


@pytest.mark.parametrize(
    ("dim", "dim_v"),
    [(1, 1), (16, 16), (40, 40), (64, 80), (80, 17), (96, 96), (128, 128), (3, 256), (256, 5)],
)
@pytest.mark.parametrize(("isa", "dtype"), KERNELS, **dtype_id)
def test_any_head_dim(isa, dtype, dim, dim_v):
    plan = PLANS["two-heads"]()
    check(*inputs(plan, dtype, batch=1, heads=2, dim=dim, dim_v=dim_v), plan, isa=isa)


@pytest.mark.parametrize("block_q", [1, 16, 50, 128, 300])
@pytest.mark.parametrize("block_kv", [1, 16, 100, 1000])
def test_any_block_size(block_q, block_kv):
    plan = testing.random_plan(
        140, 70, heads=2, density=0.6, block_q=block_q, block_kv=block_kv, band=TokenBand(0)
    )
    check(*inputs(plan, torch.float32, batch=1, heads=2, dim=16, dim_v=16), plan)


@pytest.mark.parametrize(("sq", "skv"), [(1, 1), (1, 300), (300, 1), (129, 65), (17, 97)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:2], **dtype_id)
def test_short_and_ragged_lengths(sq, skv, causal, dtype):
    plan = plan_dense(sq, skv, causal=causal)
    check(*inputs(plan, dtype), plan)


@pytest.mark.parametrize(("sq", "skv"), [(0, 0), (0, 5), (5, 0)])
def test_empty_sequences(sq, skv):
    plan = plan_dense(sq, skv, causal=False)
    out, lse = forward(*inputs(plan, torch.bfloat16), plan)
    assert out.shape == (2, 4, sq, 64) and not out.any()
    assert (lse == float("-inf")).all()


@pytest.mark.parametrize(("isa", "dtype"), KERNELS, **dtype_id)
def test_rows_without_a_visible_key_are_zero(isa, dtype):
    # Even query blocks list nothing; odd ones list a block that the band hides from half of them.
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    mask[..., 1, 1] = mask[..., 3, 0] = True
    perm = Permutation.identity(64)
    index = BlockIndex.from_block_mask(mask, 16, 16)
    plan = AttnPlan((AttnPart(perm, perm, index, TokenBand(8, 40)),))
    q, k, v = inputs(plan, dtype, batch=1, heads=2)
    out, lse = forward(q, k, v, plan, isa=isa)
    dead = ~visible(plan, 1, 2).any(-1)
    assert dead.any() and not dead.all()
    assert (lse[dead] == float("-inf")).all() and torch.isfinite(lse[~dead]).all()
    assert not out[dead].any()
    check(q, k, v, plan, isa=isa)


def test_all_partial_blocks_give_the_same_bits_as_full_ones():
    full = testing.random_plan(200, 200, heads=2, density=0.5)
    part = full.parts[0]
    index = BlockIndex(
        part.index.kv_indices,
        part.index.row_offsets,
        torch.zeros_like(part.index.kv_num_full),
        *(part.index.block_q, part.index.block_kv),
    )
    partial = AttnPlan((AttnPart(part.q_perm, part.kv_perm, index, TokenBand()),))
    x = inputs(full, torch.bfloat16, heads=2)
    for a, b in zip(forward(*x, full), forward(*x, partial), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (2, 1), (1, 4), (2, 4)])
def test_plan_axes_broadcast(batch, heads):
    plan = testing.split_plan(90, 110, batch=batch, heads=heads)
    check(*inputs(plan, torch.float32, kv_heads=1), plan)


def test_index_and_permutation_axes_broadcast_apart():
    g = torch.Generator().manual_seed(3)
    q_perm = testing.random_permutation(80, batch=2, generator=g)
    kv_perm = testing.random_permutation(90, heads=4, holes=6, generator=g)
    mask = torch.rand(1, 1, 5, 6, generator=g) < 0.5
    index = BlockIndex.from_block_mask(mask, 16, 16)
    plan = AttnPlan((AttnPart(q_perm, kv_perm, index, TokenBand(-60, 60)),))
    check(*inputs(plan, torch.bfloat16), plan)


@pytest.mark.parametrize("dtype", DTYPES[:2], **dtype_id)
def test_strided_and_expanded_views(dtype):
    plan = testing.split_plan(100, 120, heads=4)
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 100, 4, 33, generator=g).to(dtype).transpose(1, 2)[..., 1:]
    k = torch.randn(1, 1, 120, 40, generator=g).to(dtype)[..., 3:35].expand(2, 2, 120, 32)
    v = torch.randn(240, 2, 2, 24, generator=g).to(dtype).permute(1, 2, 0, 3)[:, :, ::2]
    before = [x.clone() for x in (q, k, v)]
    check(q, k, v, plan)
    out, _ = forward(q, k, v, plan)
    assert out.stride(1) < out.stride(2), "heads stay innermost where q's are"
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))


def test_parts_in_any_order():
    plan = PLANS["three-parts-in-three-orders"]()
    q, k, v = inputs(plan, torch.float32)
    seen = visible(plan, 2, 4)
    exact = testing.masked_attention(q.double(), k.double(), v.double(), seen, 0.125)
    plain = testing.masked_attention(q, k, v, seen, 0.125)
    for parts in itertools.permutations(plan.parts):
        ours = forward(q, k, v, AttnPlan(parts, validate=False))
        for name, a, p, e in zip(("out", "lse"), ours, plain, exact, strict=True):
            testing.assert_within(a, p, e, name)


def test_queries_in_many_groups_get_one_softmax():
    """Every part has its own query order: all queries, some, and one part a key block."""
    g = torch.Generator().manual_seed(1)
    parts = []
    for block in range(70):
        q_perm = testing.random_permutation(40, keep=0.5 if block % 2 else 1.0, generator=g)
        kv_perm = Permutation.from_token_of_slot(torch.tensor([2 * block, 2 * block + 1]), 140)
        mask = torch.ones(1, 1, -(-q_perm.num_slots // 16), 1, dtype=torch.bool)
        index = BlockIndex.from_block_mask(mask, 16, 2)
        parts.append(AttnPart(q_perm, kv_perm, index, TokenBand()))
    plan = AttnPlan(tuple(parts))
    check(*inputs(plan, torch.float32, dim=16, dim_v=24), plan)


def test_disjoint_groups_cover_what_the_largest_leaves_out():
    rows = [torch.arange(0, 50), torch.arange(50, 80), torch.arange(80, 90)]  # 90..99: in no part
    whole = Permutation.identity(100)
    parts = []
    for row in rows:
        q_perm = Permutation.from_token_of_slot(row, 100)
        mask = torch.ones(1, 1, -(-len(row) // 16), 7, dtype=torch.bool)
        index = BlockIndex.from_block_mask(mask, 16, 16)
        parts.append(AttnPart(q_perm, whole, index, TokenBand(0)))
    plan = AttnPlan(tuple(parts))
    q, k, v = inputs(plan, torch.bfloat16)
    check(q, k, v, plan)
    out, lse = forward(q, k, v, plan)
    assert not out[:, :, 90:].any() and (lse[:, :, 90:] == float("-inf")).all()


@functools.cache
def plan_with_unseen_keys():
    """Keys go unseen in every way: dropped from the permutation, not listed, hidden by the band."""
    g = torch.Generator().manual_seed(0)
    keep = torch.rand(1, 1, 150, generator=g) < 0.7
    kv_perm = Permutation.identity(150).without_tokens(~keep)
    perm = Permutation.identity(120)
    band = TokenBand(0, 60)
    shape = {"block_q": 32, "block_kv": 32, "heads": 4, "density": 0.5, "generator": g}
    index = testing.random_index(perm, kv_perm, band, **shape)
    return AttnPlan((AttnPart(perm, kv_perm, index, band),))


@pytest.mark.parametrize(("isa", "dtype"), KERNELS, **dtype_id)
@pytest.mark.parametrize("plan", ["one-part", "three-parts-in-three-orders"])
def test_unseen_rows_are_never_read(isa, dtype, plan):
    plan = plan_with_unseen_keys() if plan == "one-part" else PLANS[plan]()
    q, k, v = inputs(plan, dtype, kv_heads=4)
    seen = visible(plan, 2, 4).any(2)
    assert not seen.all()
    clean = forward(q, k, v, plan, isa=isa)
    dirty = [testing.poison_unseen(x, seen) for x in (k, v)]
    for a, b in zip(clean, forward(q, *dirty, plan, isa=isa), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, **dtype_id)
@pytest.mark.parametrize("threads", [1, 2])
def test_two_runs_are_bit_identical(dtype, threads):
    plan = testing.split_plan(700, 700, heads=4, batch=2)
    x = inputs(plan, dtype)
    once = forward(*x, plan)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for _ in range(3):
            for a, b in zip(once, forward(*x, plan), strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("isa", "dtype"), KERNELS, **dtype_id)
def test_large_logits(isa, dtype):
    """Scores of +-1e4 (float16 itself ends at 6e4) neither overflow nor lose the largest one."""
    plan = PLANS["two-heads"]()
    q, k, v = inputs(plan, dtype, heads=2, dim=16)
    check(*(50 * x for x in (q, k)), v, plan, 1.0, isa)


@pytest.mark.parametrize(("isa", "dtype"), KERNELS, **dtype_id)
@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-30])
def test_any_finite_scale(isa, dtype, scale):
    plan = testing.split_plan(60, 80, heads=4, batch=2)
    check(*inputs(plan, dtype), plan, scale, isa)


@pytest.mark.parametrize(("isa", "dtype"), KERNELS, **dtype_id)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_seen_infinities_and_nans_do_as_in_dense_attention(isa, dtype, value):
    plan = plan_dense(100, 100, causal=False)
    q, k, v = inputs(plan, dtype, dim=8, dim_v=24)
    v[0, 0, 5, 3] = value
    k[1, 1, 7, 0] = value
    out, _ = forward(q, k, v, plan, isa=isa)
    seen = torch.ones(1, 1, 100, 100, dtype=torch.bool)
    exact, _ = testing.masked_attention(q.double(), k.double(), v.double(), seen, 8**-0.5)
    assert torch.equal(torch.isnan(out), torch.isnan(exact))
    assert torch.equal(torch.isinf(out), torch.isinf(exact))


@pytest.mark.parametrize(
    "band",
    [TokenBand(2**40), TokenBand(None, -(2**40)), TokenBand(-(2**40), 2**40), TokenBand(3, 4)],
    ids=["none-high", "none-low", "all", "one-diagonal"],
)
def test_bands_of_any_width(band):
    perm = Permutation.identity(50)
    index = BlockIndex.from_block_mask(torch.ones(1, 1, 4, 4, dtype=torch.bool), 16, 16)
    plan = AttnPlan((AttnPart(perm, perm, index, band),))
    check(*inputs(plan, torch.float32, dim=8), plan)


int32 = st.integers(-(2**31), 2**31 - 1)
near = st.integers(-3, 40)


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.lists(near | int32, min_size=1, max_size=40),
    slots=st.lists(near | int32, min_size=24, max_size=24),
    entries=st.lists(near | int32, min_size=1, max_size=20),
    offsets=st.lists(near | int32, min_size=6, max_size=6),
    num_full=st.lists(near | int32, min_size=4, max_size=4),
    blocks=st.tuples(st.integers(1, 9), st.integers(1, 2**62)),
    lags=st.tuples(st.none() | st.integers(), st.none() | st.integers()),
)
def test_garbage_plans_stay_inside_memory(tokens, slots, entries, offsets, num_full, blocks, lags):
    """Nothing of a plan was validated: no crash, and finite results for finite inputs."""

    def row(x):
        return torch.tensor(x, dtype=torch.int64).to(torch.int32)[None, None]

    limit = 2**62
    lags = [None if x is None else max(-limit, min(limit, x)) for x in lags]
    try:
        band = TokenBand(*lags)
    except ValueError:
        band = TokenBand()
    perm = Permutation(row(tokens), row(slots))
    num_rows = -(-perm.num_slots // blocks[0])
    offsets, num_full = (offsets * 8)[: num_rows + 1], (num_full * 14)[:num_rows]
    index = BlockIndex(row(entries), row(offsets), row(num_full), *blocks)
    plan = AttnPlan((AttnPart(perm, perm, index, band),), validate=False)
    q, k, v = inputs(plan, torch.bfloat16, batch=1, heads=2, dim=8, dim_v=8)
    out, lse = forward(q, k, v, plan)
    assert torch.isfinite(out).all() and not torch.isnan(lse).any()


def problem(**changes):
    facts = {
        "device_type": "cpu",
        "dtype": torch.bfloat16,
        "num_q_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 64,
        "head_dim_v": 64,
        "blocks": ((64, 64),),
    }
    return Problem(**{**facts, **changes})


def test_why_not_names_the_obstacle():
    assert cpu.why_not(problem()) is None
    assert cpu.why_not(problem(needs_grad=True)) is None
    assert "float64" in cpu.why_not(problem(dtype=torch.float64))
    assert "257" in cpu.why_not(problem(head_dim=257))
    assert "cuda" in cpu.why_not(problem(device_type="cuda"))


def test_auto_takes_it_and_float64_goes_to_the_reference():
    plan = testing.split_plan(60, 60, heads=4)
    q, k, v = inputs(plan, torch.float32)
    assert torch.equal(sparse_attention(q, k, v, plan), forward(q, k, v, plan)[0])
    q, k, v = (x.double() for x in (q, k, v))
    exact, _ = reference.forward(FwdArgs(q, k, v, plan, q.shape[3] ** -0.5))
    assert torch.equal(sparse_attention(q, k, v, plan), exact)
    with pytest.raises(NotImplementedError, match="float64"):
        sparse_attention(q, k, v, plan, backend="cpu")


def test_isas_are_named_slowest_first():
    assert ISAS[0] == "portable" and ISAS[-1] == cpu.isa()
    assert cpu.ISAS[: len(ISAS)] == ISAS


def test_an_instruction_set_that_is_not_here_is_refused():
    missing = [x for x in cpu.ISAS if x not in ISAS]
    if not missing:
        pytest.skip("this machine has every instruction set")
    plan = plan_dense(8, 8, causal=False)
    with pytest.raises(RuntimeError, match="isa"):
        forward(*inputs(plan, torch.bfloat16), plan, isa=missing[-1])
