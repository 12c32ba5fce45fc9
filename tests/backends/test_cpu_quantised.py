"""Native quantised attention: every instruction set against the reference on the same integers."""

import functools
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from permattn import TokenBand, sparse_attention, testing
from permattn.backends import cpu, reference
from permattn.core import AttnPart, AttnPlan, BlockIndex, Permutation, QuantSpec
from permattn.core.problem import FwdArgs, Problem
from permattn.core.prologue import Prologue, RowTransform
from permattn.core.quant import FORMATS
from permattn.patterns.dense import plan_dense

pytestmark = [
    pytest.mark.skipif(not cpu.available_isas(), reason=f"{cpu.load()}"),
    pytest.mark.filterwarnings("ignore:.*on this CPU.*:UserWarning"),
]

ISAS = cpu.available_isas()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SPECS = [f"{qk}-{pv}" for qk in ("int8", "int4") for pv in ("none", "fp8", "int8", "int4")]
dtype_id = {"ids": lambda x: str(x).removeprefix("torch.")}

PLANS = {
    "dense": lambda: plan_dense(130, 200, causal=False, block_q=64, block_kv=64),
    "causal": lambda: plan_dense(160, 160, causal=True, block_q=64, block_kv=64),
    "three-parts-in-three-orders": lambda: testing.split_plan(150, 170, heads=4, batch=2),
    "permuted-with-holes": lambda: testing.random_plan(
        150, 190, heads=4, permuted=True, holes=9, block_kv=32, band=TokenBand(-5, 70)
    ),
    "two-groups": lambda: testing.crossed_plan(150, 170, heads=4, batch=2),
}
PLANS = {name: functools.cache(make) for name, make in PLANS.items()}


def with_quant(plan, formats="int8-int8", q_rows=16, kv_rows=16, **smoothing):
    qk, pv = formats.split("-")
    return AttnPlan(plan.parts, QuantSpec(qk, pv, q_rows, kv_rows, **smoothing), validate=False)


def inputs(plan, dtype, *, batch=2, heads=4, kv_heads=2, dim=64, dim_v=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    sq, skv = plan.num_q_tokens, plan.num_kv_tokens
    return [
        torch.randn(batch, h, s, w, generator=g).to(dtype)
        for h, s, w in ((heads, sq, dim), (kv_heads, skv, dim), (kv_heads, skv, dim_v))
    ]


def arguments(q, k, v, plan, scale=None, prologue=None):
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return FwdArgs(q, k, v, plan, scale, prologue)


def bounds(args):
    """(of out, of lse): two probabilities of a row rounded the other way, and a few roundings.

    The largest probability of a row is 1, so a step of one moves the sum, and with it the log, by
    that step at most, and the result by that step times twice the largest value. Where P is not
    quantised, bf16 products round every probability, ours and V's, by 2^-9 each. A score is rounded
    in float32, and moves its probability by as much.
    """
    pv, dtype = args.plan.quant.pv, args.q.dtype
    step = {"none": 0.0, "fp8": 1 / 8, "int8": 1 / 255, "int4": 1 / 15}[pv]
    if pv == "none" and dtype == torch.bfloat16:
        step = 2**-9
    q, k, v = (float(x.float().square().sum(-1).max().sqrt()) for x in (args.q, args.k, args.v))
    high = float(args.v.abs().max())
    eps = torch.finfo(torch.float32).eps
    score = 4 * eps * (8 + abs(args.scale) * q * k)
    return 4 * step * high + 2 * torch.finfo(dtype).eps * high + score * v, 2 * step + 4 * score


def check(args, isas=(None,)):
    """Against the reference, which has the same integers where nothing is smoothed."""
    wanted, bound = reference.forward(args), bounds(args)
    seen = wanted[1] > float("-inf")
    assert seen.any()
    for isa in isas:
        ours = cpu.forward(args, isa=isa)
        assert ours[0].dtype == args.q.dtype and ours[1].dtype == torch.float32
        assert torch.equal(ours[1] > float("-inf"), seen), isa
        assert not ours[0][~seen].any(), isa
        out, lse = (
            (a.double() - b.double())[seen].abs() for a, b in zip(ours, wanted, strict=True)
        )
        assert out.max() <= bound[0] and lse.max() <= bound[1], isa
        # Only probabilities at the very edge between two numbers may go the other way.
        if args.q.dtype == torch.float32 and args.plan.quant.pv != "none":
            moved = out.amax(-1) > 2e-5 * (1 + args.v.abs().max())
            assert moved.double().mean() <= 0.1, isa


@pytest.mark.parametrize("formats", SPECS)
def test_every_format_matches_the_reference(formats):
    plan = with_quant(PLANS["permuted-with-holes"](), formats)
    for dtype in DTYPES:
        check(arguments(*inputs(plan, dtype, batch=1), plan), ISAS)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("formats", ["int8-int8", "int4-int4", "int8-none", "int8-fp8"])
def test_every_plan_matches_the_reference(formats, plan):
    plan = with_quant(PLANS[plan](), formats)
    check(arguments(*inputs(plan, torch.float32), plan))
    check(arguments(*inputs(plan, torch.bfloat16, kv_heads=4), plan))


@pytest.mark.parametrize(
    ("dim", "dim_v"), [(1, 1), (40, 24), (80, 17), (128, 128), (3, 256), (256, 5)]
)
def test_any_head_dim(dim, dim_v):
    for formats in ("int8-int8", "int8-none"):
        plan = with_quant(PLANS["three-parts-in-three-orders"](), formats)
        check(arguments(*inputs(plan, torch.float32, dim=dim, dim_v=dim_v), plan), ISAS)


@pytest.mark.parametrize("formats", ["int8-int8", "int8-fp8", "int8-none"])
@pytest.mark.parametrize(
    ("block_kv", "kv_rows"),
    [(64, 64), (128, 32), (128, 128), (256, 256), (60, 20), (21, 7), (9, 3), (4, 1)],
)
def test_any_keys_per_scale(block_kv, kv_rows, formats):
    plan = testing.random_plan(
        70, 300, heads=2, permuted=True, holes=4, block_q=48, block_kv=block_kv
    )
    plan = with_quant(plan, formats, 24, kv_rows)
    check(arguments(*inputs(plan, torch.float32, heads=2, dim=32, dim_v=40), plan))


@pytest.mark.parametrize("q_rows", [1, 3, 48, 96])
def test_any_queries_per_scale(q_rows):
    plan = testing.random_plan(100, 90, heads=2, permuted=True, block_q=96, block_kv=16)
    plan = with_quant(plan, "int8-int8", q_rows, 16)
    check(arguments(*inputs(plan, torch.float32, heads=2), plan))


@pytest.mark.parametrize("tail", [0, 1, 30, 63])
def test_ragged_lengths(tail):
    plan = with_quant(plan_dense(128 + tail, 64 + tail, causal=True), "int8-int8", 64, 64)
    check(arguments(*inputs(plan, torch.bfloat16), plan), ISAS)


@pytest.mark.parametrize(("sq", "skv"), [(0, 0), (0, 5), (5, 0), (1, 1)])
def test_empty_sequences(sq, skv):
    plan = with_quant(plan_dense(sq, skv, causal=False), smooth_k=True, balance=True)
    out, lse = cpu.forward(arguments(*inputs(plan, torch.bfloat16), plan))
    assert out.shape == (2, 4, sq, 64) and torch.isfinite(out).all()
    if skv == 0:
        assert not out.any() and (lse == float("-inf")).all()


@pytest.mark.parametrize("isa", ISAS)
def test_rows_without_a_visible_key_are_zero(isa):
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    mask[..., 1, 1] = mask[..., 3, 0] = True
    perm = Permutation.identity(64)
    index = BlockIndex.from_block_mask(mask, 16, 16)
    for formats in ("int8-int8", "int8-none", "int8-fp8"):
        plan = AttnPlan((AttnPart(perm, perm, index, TokenBand(8, 40)),))
        plan = with_quant(plan, formats, smooth_k=True)
        args = arguments(*inputs(plan, torch.float32), plan)
        out, lse = cpu.forward(args, isa=isa)
        dead = lse == float("-inf")
        assert dead.any() and not dead.all() and not out[dead].any()
        assert torch.isfinite(out).all()


@pytest.mark.parametrize("formats", ["int8-int8", "int8-fp8", "int8-none"])
@pytest.mark.parametrize("isa", ISAS)
def test_tokens_in_no_slot_are_never_read(isa, formats):
    g = torch.Generator().manual_seed(0)
    gone = torch.rand(1, 1, 150, generator=g) < 0.3
    kv_perm = Permutation.identity(150).without_tokens(gone)
    perm = Permutation.identity(120)
    index = testing.random_index(
        perm, kv_perm, TokenBand(0), block_q=32, block_kv=32, density=0.7, heads=4, generator=g
    )
    plan = AttnPlan((AttnPart(perm, kv_perm, index, TokenBand(0)),))
    plan = with_quant(plan, formats, smooth_k=True, balance=True)
    q, k, v = inputs(plan, torch.bfloat16)
    dirty = [x.masked_fill(gone[..., None], float("nan")) for x in (k, v)]
    clean = cpu.forward(arguments(q, k, v, plan), isa=isa)
    for a, b in zip(clean, cpu.forward(arguments(q, *dirty, plan), isa=isa), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-30, 20.0])
def test_any_finite_scale(scale):
    for formats in ("int8-int8", "int8-none"):
        plan = with_quant(PLANS["three-parts-in-three-orders"](), formats)
        check(arguments(*inputs(plan, torch.float32), plan, scale), ISAS)


def test_groups_of_zeros():
    """A group whose scale is 0 has scores 0, and hidden keys in it stay hidden."""
    for formats in ("int8-int8", "int8-fp8", "int8-none"):
        plan = with_quant(PLANS["permuted-with-holes"](), formats)
        q, k, v = inputs(plan, torch.float32)
        q[0] = 0.0
        k[1, 0] = 0.0
        v[1, 1] = 0.0
        check(arguments(q, k, v, plan), ISAS)


@pytest.mark.parametrize("smoothing", ["smooth_k", "balance", "both"])
@pytest.mark.parametrize("dtype", DTYPES[:2], **dtype_id)
def test_smoothing_changes_the_integers_and_not_the_meaning(dtype, smoothing):
    plan = with_quant(
        PLANS["three-parts-in-three-orders"](),
        smooth_k=smoothing != "balance",
        balance=smoothing != "smooth_k",
    )
    q, k, v = inputs(plan, dtype)
    k = k + 6 * torch.randn(1, 2, 1, 64, generator=torch.Generator().manual_seed(9)).to(dtype)
    seen = testing.visible_pairs(plan, 2, 4) > 0
    exact = testing.masked_attention(q.double(), k.double(), v.double(), seen, 0.125)
    args = arguments(q, k, v, plan)
    plain = cpu.forward(arguments(q, k, v, with_quant(plan)))
    ours, judge = cpu.forward(args), reference.forward(args)
    alive = seen.any(-1)

    def error(found, i):
        return (found[i].double() - exact[i])[alive].square().mean().sqrt()

    # The mean that was taken is back in the log-sum-exp: without it, it would be off by tens.
    assert error(ours, 1) <= 1.1 * error(judge, 1) + 1e-3
    assert error(ours, 0) <= 1.1 * error(judge, 0)
    if smoothing != "balance":
        assert error(ours, 0) < error(plain, 0)


@pytest.mark.parametrize("formats", SPECS)
def test_as_near_to_float64_as_the_reference(formats):
    plan = with_quant(PLANS["causal"](), formats, 64, 64)
    seen = testing.visible_pairs(plan, 2, 4) > 0
    for dtype in DTYPES[:2]:
        q, k, v = inputs(plan, dtype)
        exact, _ = testing.masked_attention(q.double(), k.double(), v.double(), seen, 0.125)
        args = arguments(q, k, v, plan)
        ours, judge = (
            (f(args)[0].double() - exact).square().mean().sqrt()
            for f in (cpu.forward, reference.forward)
        )
        assert ours <= 1.1 * judge


@pytest.mark.parametrize("formats", ["none-none", "int8-int8", "int8-none", "int4-fp8"])
@pytest.mark.parametrize("dtype", DTYPES, **dtype_id)
def test_a_prologue_is_what_it_is_in_the_reference(dtype, formats):
    g = torch.Generator().manual_seed(1)
    plan = with_quant(PLANS["three-parts-in-three-orders"](), formats)
    q, k, v = inputs(plan, dtype, dim=40)
    angle = torch.rand(150, 20, generator=g)
    weight = (1 + 0.1 * torch.randn(40, generator=g)).to(dtype)
    prologue = Prologue(
        RowTransform("rms", weight, cos=angle.cos(), sin=angle.sin()),
        RowTransform("layer", weight, weight - 1, cos=angle[:90].cos(), sin=angle[:90].sin()),
    )
    args = arguments(q, k, v, plan, prologue=prologue)
    wanted, ours = reference.forward(args), cpu.forward(args)
    seen = wanted[1] > float("-inf")
    assert torch.equal(seen, ours[1] > float("-inf"))
    # An integer of Q or K may be one off: the difference is a small part of what quantising costs.
    exact = reference.forward(
        arguments(*(x.double() for x in (q, k, v)), AttnPlan(plan.parts), 40**-0.5, prologue)
    )
    cost = (wanted[0].double() - exact[0]).abs().max() + (
        0 if formats != "none-none" else 4 * torch.finfo(dtype).eps * v.abs().max()
    )
    assert (ours[0].double() - wanted[0].double())[seen].abs().max() <= cost
    assert (ours[1] - wanted[1])[seen].abs().max() <= 0.1


@pytest.mark.parametrize("formats", SPECS[:4])
def test_two_runs_are_bit_identical(formats):
    plan = with_quant(
        testing.split_plan(700, 700, heads=4, batch=2), formats, smooth_k=True, balance=True
    )
    args = arguments(*inputs(plan, torch.bfloat16), plan)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            found.append(cpu.forward(args))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)


def test_instruction_sets_have_the_same_integers():
    """Sums of integers are exact; what differs are roundings of the exponential."""
    plan = with_quant(PLANS["two-groups"](), "int8-int8")
    args = arguments(*inputs(plan, torch.float32), plan)
    found = [cpu.forward(args, isa=isa)[1] for isa in ISAS]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=2 / 255 + 1e-4, rtol=0)


@pytest.mark.parametrize("isa", ISAS)
def test_a_seen_nan_is_seen(isa):
    plan = with_quant(plan_dense(40, 50, causal=False, block_q=16, block_kv=16))
    for i in range(3):
        x = inputs(plan, torch.float32)
        x[i][0, 0, 20, 3] = float("nan")
        out, _ = cpu.forward(arguments(*x, plan), isa=isa)
        assert out[0, 0].isnan().any() and not out[1].isnan().any()


int32 = st.integers(-(2**31), 2**31 - 1)
near = st.integers(-3, 40)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.lists(near | int32, min_size=1, max_size=40),
    slots=st.lists(near | int32, min_size=24, max_size=24),
    entries=st.lists(near | int32, min_size=1, max_size=20),
    offsets=st.lists(near | int32, min_size=6, max_size=6),
    num_full=st.lists(near | int32, min_size=4, max_size=4),
    blocks=st.tuples(st.integers(1, 9), st.sampled_from([4, 8, 12, 1 << 20])),
    formats=st.sampled_from(["int8-int8", "int8-none", "int8-fp8"]),
)
def test_garbage_plans_stay_inside_memory(
    tokens, slots, entries, offsets, num_full, blocks, formats
):
    def row(x):
        return torch.tensor(x, dtype=torch.int64).to(torch.int32)[None, None]

    perm = Permutation(row(tokens), row(slots))
    num_rows = -(-perm.num_slots // blocks[0])
    offsets, num_full = (offsets * 8)[: num_rows + 1], (num_full * 14)[:num_rows]
    index = BlockIndex(row(entries), row(offsets), row(num_full), *blocks)
    plan = AttnPlan((AttnPart(perm, perm, index, TokenBand(-7, 20)),), validate=False)
    plan = with_quant(plan, formats, 1, 4, smooth_k=True)
    out, lse = cpu.forward(arguments(*inputs(plan, torch.bfloat16, dim=8, dim_v=8), plan))
    assert torch.isfinite(out).all() and not torch.isnan(lse).any()


def problem(quant, **changes):
    facts = {
        "device_type": "cpu",
        "dtype": torch.bfloat16,
        "num_q_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 64,
        "head_dim_v": 64,
        "blocks": ((64, 64),),
    }
    return Problem(**{**facts, **changes}, quant=quant)


def test_why_not_names_the_obstacle():
    assert cpu.why_not(problem(QuantSpec("int8", "int8"))) is None
    assert "only together" in cpu.why_not(problem(QuantSpec("none", "int8")))
    assert "no gradients" in cpu.why_not(problem(QuantSpec("int8"), needs_grad=True))
    spec = QuantSpec("int8", kv_rows_per_scale=512)
    assert "512" in cpu.why_not(problem(spec, blocks=((64, 512),)))


def test_auto_takes_it_and_the_rest_goes_to_the_reference():
    plan = with_quant(testing.split_plan(60, 60, heads=4, batch=2))
    q, k, v = inputs(plan, torch.float32)
    assert torch.equal(sparse_attention(q, k, v, plan), cpu.forward(arguments(q, k, v, plan))[0])
    only_pv = with_quant(plan, "none-int8")
    wanted, _ = reference.forward(arguments(q, k, v, only_pv))
    assert torch.equal(sparse_attention(q, k, v, only_pv), wanted)
    with pytest.raises(NotImplementedError, match="only together"):
        sparse_attention(q, k, v, only_pv, backend="cpu")


def test_emulated_formats_are_said_once(monkeypatch):
    monkeypatch.setattr("permattn.core.quant._said", set())
    plan = with_quant(testing.split_plan(60, 60, heads=4, batch=2), "int4-fp8")
    args = arguments(*inputs(plan, torch.float32), plan)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        cpu.forward(args)
        cpu.forward(args)
    messages = [str(x.message) for x in said]
    assert len(messages) == 2 and "int4" in messages[0] and "fp8" in messages[1]
    assert set(FORMATS) == {"int8", "int4", "fp8"}
