"""Native rows made ready: integers and scales to the last bit, the rest to a rounding."""

import pytest
import torch
from permattn import testing
from permattn.backends import cpu, reference
from permattn.core import AttnPlan, QuantSpec
from permattn.core.prepare import PrepareArgs, smoothing_of
from permattn.core.problem import FwdArgs
from permattn.core.prologue import Prologue
from permattn.patterns.dense import plan_dense
from row_cases import rows_of_every_size, transform

pytestmark = pytest.mark.skipif(not cpu.available_isas(), reason=f"{cpu.load()}")

# Rows are prepared in float32: an instruction set with integer or bf16 products has nothing new.
ISAS = tuple(x for x in cpu.available_isas() if x in ("portable", "avx2", "avx512"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = ("none", "int8", "int4", "fp8")
dtype_id = {"ids": lambda x: str(x).removeprefix("torch.")}


def assert_same_numbers(args, isa):
    wanted, ours = reference.prepare(args), cpu.prepare(args, isa=isa)
    assert ours[0].dtype == wanted[0].dtype and ours[0].shape == wanted[0].shape
    assert torch.equal(ours[0].float(), wanted[0].float())
    assert torch.equal(ours[1], wanted[1])


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, **dtype_id)
@pytest.mark.parametrize("isa", ISAS)
def test_numbers_are_the_oracles(isa, dtype, fmt):
    g = torch.Generator().manual_seed(1)
    own = testing.random_permutation(150, batch=2, heads=2, holes=9, generator=g)
    more = testing.random_permutation(150, heads=6, holes=3, keep=0.5, generator=g)
    shared = testing.random_permutation(150, generator=g)
    cases = [(64, None, 64), (64, own, 6), (64, more, 64), (40, shared, 1), (7, own, 1000)]
    for dim, perm, rows_per_scale in cases:
        x = rows_of_every_size(dtype, dim=dim)
        token = None if perm is None else perm.token_of_slot
        for columns in (False, True):
            assert_same_numbers(
                PrepareArgs(x, token, None, None, None, fmt, rows_per_scale, columns), isa
            )


@pytest.mark.parametrize("isa", ISAS)
def test_mean_and_factor_come_before_quantising(isa):
    g = torch.Generator().manual_seed(2)
    x = torch.randn(2, 2, 90, 33, generator=g)
    mean, factor = torch.randn(2, 2, 33, generator=g), torch.rand(2, 2, 33, generator=g) + 0.5
    token = testing.random_permutation(90, heads=4, generator=g).token_of_slot
    for fmt in FORMATS:
        assert_same_numbers(PrepareArgs(x, token, None, mean, factor, fmt, 16), isa)
        assert_same_numbers(PrepareArgs(x, token, None, mean, None, fmt, 16), isa)
        assert_same_numbers(PrepareArgs(x, token, None, None, factor, fmt, 16), isa)


@pytest.mark.parametrize("dtype", DTYPES, **dtype_id)
def test_strided_and_expanded_views(dtype):
    g = torch.Generator().manual_seed(3)
    transposed = torch.randn(2, 100, 4, 41, generator=g).to(dtype).transpose(1, 2)[..., 1:]
    expanded = torch.randn(1, 1, 100, 40, generator=g).to(dtype)[..., 3:35].expand(2, 4, 100, 32)
    token = testing.random_permutation(100, heads=4, holes=5, generator=g).token_of_slot
    for x in (transposed, expanded):
        for fmt in FORMATS:
            assert_same_numbers(PrepareArgs(x, token.flip(-1), fmt=fmt, rows_per_scale=16), None)
            assert_same_numbers(PrepareArgs(x, token.expand(2, -1, -1), fmt=fmt), None)


@pytest.mark.parametrize("fmt", FORMATS)
def test_rows_in_no_slot_are_never_read(fmt):
    g = torch.Generator().manual_seed(4)
    x = torch.randn(1, 2, 120, 24, generator=g)
    perm = testing.random_permutation(120, heads=2, holes=7, keep=0.6, generator=g)
    dirty = x.masked_fill((perm.slot_of_token < 0)[..., None], float("nan"))
    clean, found = (
        cpu.prepare(PrepareArgs(y, perm.token_of_slot, fmt=fmt, rows_per_scale=16))
        for y in (x, dirty)
    )
    assert torch.equal(clean[0].float(), found[0].float()) and torch.equal(clean[1], found[1])
    holes = (perm.token_of_slot < 0)[..., None]
    assert not found[0].float().masked_select(holes).any()


def test_a_nan_in_a_group_is_a_nan_of_its_scale():
    x = torch.randn(1, 1, 64, 32, generator=torch.Generator().manual_seed(0))
    x[0, 0, 20, 5] = float("nan")
    for per_column in (False, True):
        args = PrepareArgs(x, fmt="int8", rows_per_scale=16, per_column=per_column)
        wanted, ours = reference.prepare(args)[1], cpu.prepare(args)[1]
        assert torch.equal(wanted.isnan(), ours.isnan()) and ours.isnan().any()


@pytest.mark.parametrize("shape", [(0, 2, 8, 4), (1, 2, 0, 4)], ids=["no-batch", "no-tokens"])
def test_nothing_to_prepare(shape):
    rows, scales = cpu.prepare(PrepareArgs(torch.zeros(shape), fmt="int8"))
    assert rows.shape == shape and scales.numel() == 0


@pytest.mark.parametrize("across", [False, True], ids=["per-head", "across-heads"])
@pytest.mark.parametrize("rope", ["none", "whole", "part"])
@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
@pytest.mark.parametrize("isa", ISAS)
def test_transformed_rows_are_within_a_step(isa, norm, rope, across):
    g = torch.Generator().manual_seed(6)
    make = transform(norm, rope, across)
    for dtype in DTYPES:
        x = (3 * torch.randn(2, 4, 100, 40, generator=g) + 0.5).to(dtype)
        token = testing.random_permutation(100, heads=4, holes=5, generator=g).token_of_slot
        for interleaved in (False, True):
            t = make(interleaved)
            plain = PrepareArgs(x, token, t)
            torch.testing.assert_close(cpu.prepare(plain, isa=isa)[0], reference.prepare(plain)[0])
            args = PrepareArgs(x, token, t, fmt="int8", rows_per_scale=32)
            ours, wanted = cpu.prepare(args, isa=isa), reference.prepare(args)
            assert (ours[0].int() - wanted[0].int()).abs().max() <= 1
            torch.testing.assert_close(ours[1], wanted[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("unseen", [False, True], ids=["every-token", "nan-in-no-slot"])
@pytest.mark.parametrize("with_prologue", [False, True], ids=["as-is", "prologue"])
@pytest.mark.parametrize("dtype", DTYPES[:2], **dtype_id)
def test_smoothing_is_the_core_s(dtype, with_prologue, unseen):
    g = torch.Generator().manual_seed(7)
    plan = testing.random_plan(90, 1300, heads=4, permuted=True, holes=5, density=0.3)
    if unseen:
        part = plan.parts[0]
        gone = torch.rand(1, 4, 1300, generator=g) < 0.3
        gone[:, :, :20] = True
        kv_perm = part.kv_perm.without_tokens(gone)
        plan = AttnPlan((type(part)(part.q_perm, kv_perm, part.index, part.band),), validate=False)
    plan = AttnPlan(plan.parts, QuantSpec("int8", smooth_k=True, balance=True), validate=False)
    q, k, v = (torch.randn(2, h, s, 40, generator=g) for h, s in ((4, 90), (2, 1300), (2, 1300)))
    k = 2 * k + 5 * torch.randn(2, 2, 1, 40, generator=g)
    k[:, :, :, 4], q[:, :, :, 6] = 0.0, 0.0
    if unseen:
        k[:, :, :20] = float("nan")
    prologue = None
    if with_prologue:
        prologue = Prologue(
            transform("rms", "whole", False, tokens=90)(False),
            transform("layer", "part", unseen, heads=2, tokens=1300)(True),
        )
        if unseen:  # a norm across heads reads all heads of a token
            prologue = Prologue(prologue.q, transform("rms", "none", False)(True))
    args = FwdArgs(*(x.to(dtype) for x in (q, k, v)), plan, 0.15, prologue)
    for isa in ISAS:
        ours, wanted = cpu.smoothing_of(args, isa=isa), smoothing_of(args)
        for name in ("mean", "k_factor", "q_factor"):
            torch.testing.assert_close(
                getattr(ours, name), getattr(wanted, name), rtol=2e-5, atol=2e-5
            )


def test_smoothing_counts_every_token_of_an_identity():
    """1301 tokens: a number that neither bfloat16 nor a run of tokens holds evenly."""
    g = torch.Generator().manual_seed(8)
    plan = AttnPlan(plan_dense(1301, 1301, causal=False).parts, QuantSpec("int8", smooth_k=True))
    q, k, v = ((torch.randn(1, 2, 1301, 16, generator=g) + 3).bfloat16() for _ in range(3))
    args = FwdArgs(q, k, v, plan, 0.25)
    torch.testing.assert_close(cpu.smoothing_of(args).mean, smoothing_of(args).mean)


def test_two_preparations_are_bit_identical():
    x = torch.randn(2, 4, 700, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    args = PrepareArgs(x, transform=transform("rms", "whole", True, dim=64, tokens=700)(True))
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            found.append(cpu.prepare(args)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])
