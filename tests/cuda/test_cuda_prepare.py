"""Rows made ready by the CUDA kernels: numbers to the last bit, sums to a rounding."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.utils.deterministic
from launches import BYTE_ORDER, NIBBLE_ORDER
from permattn import testing
from permattn.backends import reference
from permattn.core.prepare import PrepareArgs
from permattn.core.prologue import Prologue, RowTransform, pack_prologue
from permattn.core.quant import FORMATS
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "backends"))
from cuda_on_cpu import on_cpu, one_thread, shim_path  # noqa: F401
from row_cases import rows_of_every_size, transform

pytestmark = pytest.mark.usefixtures("on_cpu", "one_thread")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NAMES = ("none", "int8", "int4", "fp8")
# csrc/common/quant.h: Layout.
ROWS, NIBBLES, FRAGMENTS = 0, 5, 6
dtype_id = {"ids": lambda x: str(x).removeprefix("torch.")}


def packed(transform: RowTransform | None):
    if transform is None:
        return [], [], []
    tensors, ints, floats = pack_prologue(Prologue(transform))
    return [x.float() for x in tensors], ints, floats


def prepare(args: PrepareArgs, layout=ROWS, against=None, dots=None) -> tuple[Tensor, Tensor]:
    """Rows as bytes (the caller's dtype for "none"), and scales; what is not written stands out."""
    x, n, size = args.x, args.num_slots, args.rows_per_scale
    batch, dim, groups = x.shape[0], x.shape[3], -(-n // size)
    shape: tuple[int, ...] = (batch, args.num_heads, n, dim)
    if layout == NIBBLES:
        shape = (*shape[:3], dim // 2)
    if layout == FRAGMENTS:
        shape = (*shape[:2], groups, dim, size // 2 if args.fmt == "int4" else size)
    rows = torch.full(shape, 0x55, dtype=torch.int8)
    if args.format is None:
        rows = torch.full(shape, 777.0, dtype=x.dtype)
    scales = torch.full((*shape[:2], groups, *([dim] if args.per_column else [])), -1.0)
    typed = rows.view(torch.float8_e4m3fn) if args.fmt == "fp8" else rows
    torch.ops.permattn_native.cuda_prepare(
        *(x, args.token_of_slot, *packed(args.transform), args.mean, args.factor, against, dots),
        *(NAMES.index(args.fmt), size, args.per_column, layout, typed),
        None if args.format is None else scales,
    )
    return rows, scales


def laid_out(rows: Tensor, args: PrepareArgs, layout: int) -> Tensor:
    """The oracle's rows as bytes of a layout."""
    rows = rows if args.format is None else rows.view(torch.int8)
    if layout == FRAGMENTS:
        size = args.rows_per_scale
        order = NIBBLE_ORDER if args.fmt == "int4" else BYTE_ORDER
        place = torch.arange(size).unflatten(0, (-1, len(order)))[:, list(order)].flatten()
        rows = torch.nn.functional.pad(rows, (0, 0, 0, -rows.shape[2] % size))
        rows = rows.unflatten(2, (-1, size))[:, :, :, place].transpose(-1, -2)
    if layout == NIBBLES or (layout == FRAGMENTS and args.fmt == "int4"):
        rows = (rows[..., ::2] & 15) | (rows[..., 1::2] << 4)
    return rows


def assert_exact(args: PrepareArgs, *layouts: int) -> None:
    wanted, wanted_scales = reference.prepare(args)
    for layout in layouts or (ROWS,):
        rows, scales = prepare(args, layout)
        want = laid_out(wanted, args, layout)
        assert rows.shape == want.shape and rows.dtype == want.dtype
        assert torch.equal(rows, want), f"layout {layout}"
        if args.format is not None:
            assert torch.equal(scales, wanted_scales), f"scales of layout {layout}"


def layouts_of(fmt: str, dim: int, size: int) -> list[int]:
    found = [ROWS]
    if fmt == "int4" and dim % 2 == 0:
        found.append(NIBBLES)
    if fmt != "none" and size % (32 if fmt == "int4" else 16) == 0:
        found.append(FRAGMENTS)
    return found


CASES = [
    (64, "identity", 64),
    (64, "own", 6),
    (128, "more", 64),
    (40, "shared", 1),
    (8, "own", 100),
    (7, "own", 48),
    (256, "own", 128),
    (200, "more", 32),
    (96, "shared", 16),
]


def order_of(name: str, tokens=150):
    g = torch.Generator().manual_seed(1)
    perms = {
        "own": testing.random_permutation(tokens, batch=2, heads=2, holes=9, generator=g),
        "more": testing.random_permutation(tokens, heads=6, holes=3, keep=0.5, generator=g),
        "shared": testing.random_permutation(tokens, generator=g),
    }
    return None if name == "identity" else perms[name].token_of_slot


@pytest.mark.parametrize("fmt", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, **dtype_id)
def test_numbers_are_the_oracles(dtype, fmt):
    for dim, order, size in CASES:
        x = rows_of_every_size(dtype, dim)
        for per_column in (False, True):
            args = PrepareArgs(x, order_of(order), None, None, None, fmt, size, per_column)
            assert_exact(args, *layouts_of(fmt, dim, size))


@pytest.mark.parametrize("fmt", FORMATS)
def test_ties_go_to_even_and_every_size_has_its_place(fmt):
    high = FORMATS[fmt].high
    tied = torch.arange(-2 * high, 2 * high + 1) / 2
    if fmt == "fp8":
        # Half way between numbers: sixteenths of every power of two, down to below the smallest.
        sizes = torch.arange(16, 32)[:, None] / 16 * 2.0 ** torch.arange(-13, 9)
        tied = torch.cat((sizes.flatten(), -sizes.flatten())).clamp(-448, 448)
    rows = tied[torch.arange(-(-len(tied) // 255) * 255) % len(tied)].view(1, 1, -1, 255)
    x = torch.nn.functional.pad(rows, (0, 1), value=high)
    assert_exact(PrepareArgs(x, fmt=fmt, rows_per_scale=1), *layouts_of(fmt, 256, 1))
    turned = torch.nn.functional.pad(rows.mT, (0, 8 - rows.shape[2] % 8, 0, 1), value=high)
    assert_exact(PrepareArgs(turned, fmt=fmt, rows_per_scale=128), *layouts_of(fmt, 8, 128))


@pytest.mark.parametrize("fmt", NAMES)
def test_mean_and_factor_come_before_quantising(fmt):
    g = torch.Generator().manual_seed(2)
    token = testing.random_permutation(90, heads=4, holes=5, generator=g).token_of_slot
    for dim, dtype in ((33, torch.float32), (64, torch.bfloat16)):
        x = torch.randn(2, 2, 90, dim, generator=g).to(dtype)
        mean = torch.randn(2, 2, dim, generator=g)
        factor = torch.rand(2, 2, dim, generator=g) + 0.5
        for m, f in ((mean, factor), (mean, None), (None, factor)):
            assert_exact(PrepareArgs(x, token, None, m, f, fmt, 16), *layouts_of(fmt, dim, 16))


@pytest.mark.parametrize("dtype", DTYPES, **dtype_id)
def test_strided_and_expanded_views(dtype):
    g = torch.Generator().manual_seed(3)
    transposed = torch.randn(2, 100, 4, 41, generator=g).to(dtype).transpose(1, 2)
    odd, expanded = transposed[..., 1:], transposed[:1, :1, :, 3:35].expand(2, 4, 100, 32)
    tokens_first = torch.randn(2, 100, 4, 48, generator=g).to(dtype).transpose(1, 2)
    token = testing.random_permutation(100, heads=4, holes=5, generator=g).token_of_slot
    for x in (odd, expanded, tokens_first):
        for fmt in NAMES:
            assert_exact(PrepareArgs(x, token.flip(-1), fmt=fmt, rows_per_scale=16))
            layouts = layouts_of(fmt, x.shape[3], 32)
            wide = PrepareArgs(x, token.expand(2, -1, -1), fmt=fmt, rows_per_scale=32)
            assert_exact(wide, *layouts)


def test_rows_that_are_no_whole_stores():
    """Rows and heads of 20 or 12 columns begin where no wide store may."""
    x = torch.randn(2, 3, 3, 20, generator=torch.Generator().manual_seed(4))
    for fmt in NAMES:
        for dtype in DTYPES:
            assert_exact(PrepareArgs(x.to(dtype), fmt=fmt, rows_per_scale=2))
            assert_exact(PrepareArgs(x[..., :12].to(dtype), fmt=fmt, rows_per_scale=2))


@pytest.mark.parametrize("fmt", NAMES)
def test_rows_in_no_slot_are_never_read(fmt):
    g = torch.Generator().manual_seed(4)
    x = torch.randn(1, 2, 120, 24, generator=g)
    perm = testing.random_permutation(120, heads=2, holes=7, keep=0.6, generator=g)
    dirty = x.masked_fill((perm.slot_of_token < 0)[..., None], float("nan"))
    t = RowTransform("layer", torch.rand(24), torch.rand(24) + 1)
    for made in (None, t):
        clean, found = (
            prepare(PrepareArgs(y, perm.token_of_slot, made, fmt=fmt, rows_per_scale=16))
            for y in (x, dirty)
        )
        assert torch.equal(clean[0], found[0]) and torch.equal(clean[1], found[1])
        holes = (perm.token_of_slot < 0)[..., None]
        assert not found[0].masked_select(holes).any()


def test_holes_are_zero_whatever_token_0_is():
    x = rows_of_every_size(torch.bfloat16, 24)
    token = order_of("shared").clone()
    token[token == 0] = -1
    token[..., 5] = 150  # past the last token: a hole, too
    x[:, :, 0] = float("nan")
    rows, _ = prepare(PrepareArgs(x, token, None, torch.ones(2, 2, 24), None, "int8", 32))
    assert not rows[:, :, (token[0, 0] < 0) | (token[0, 0] == 150)].any()
    inside = token.clone()
    inside[..., 5] = -1
    wanted = reference.prepare(PrepareArgs(x, inside, None, torch.ones(2, 2, 24), None, "int8", 32))
    assert torch.equal(rows, wanted[0])


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("fmt", FORMATS)
def test_what_is_no_number_spoils_its_group_alone(fmt, value):
    x = torch.randn(1, 2, 64, 32, generator=torch.Generator().manual_seed(5))
    x[0, 0, 20, 5] = value
    for per_column in (False, True):
        args = PrepareArgs(x, fmt=fmt, rows_per_scale=16, per_column=per_column)
        (rows, scales), (want, want_scales) = prepare(args), reference.prepare(args)
        spoiled = want_scales.isnan() | want_scales.isinf()
        assert int(spoiled.sum()) == 1
        assert torch.equal(scales.nan_to_num(7.0), want_scales.nan_to_num(7.0))
        fine = ~spoiled.repeat_interleave(16, 2)
        fine = fine if per_column else fine[..., None].expand_as(x)
        assert torch.equal(rows[fine], want.view(torch.int8)[fine])


@pytest.mark.parametrize("across", [False, True], ids=["per-head", "across-heads"])
@pytest.mark.parametrize("rope", ["none", "whole", "part"])
@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
def test_transformed_rows_are_within_a_step(norm, rope, across):
    g = torch.Generator().manual_seed(7)
    # A width of whole chunks, and two in which halves begin inside of one.
    for dim, dtype in ((64, torch.bfloat16), (40, torch.float16), (44, torch.float32)):
        make = transform(norm, rope, across, dim=dim)
        x = (3 * torch.randn(2, 4, 100, dim, generator=g) + 0.5).to(dtype)
        token = testing.random_permutation(100, heads=4, holes=5, generator=g).token_of_slot
        for interleaved in (False, True):
            plain = PrepareArgs(x, token, make(interleaved))
            torch.testing.assert_close(prepare(plain)[0], reference.prepare(plain)[0])
            args = PrepareArgs(x, token, make(interleaved), fmt="int8", rows_per_scale=32)
            if norm == "none":
                assert_exact(plain)
                assert_exact(args, ROWS, FRAGMENTS)
                continue
            (rows, scales), wanted = prepare(args), reference.prepare(args)
            assert (rows.int() - wanted[0].int()).abs().max() <= 1
            torch.testing.assert_close(scales, wanted[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("norm", ["none", "rms"])
def test_dots_are_those_of_the_transformed_rows(norm):
    g = torch.Generator().manual_seed(8)
    x = torch.randn(2, 4, 100, 40, generator=g)
    perm = testing.random_permutation(100, heads=4, holes=5, keep=0.8, generator=g)
    against = torch.randn(2, 2, 40, generator=g)
    factor = torch.rand(2, 4, 40, generator=g)
    t = transform(norm, "whole", False)(True)
    dots = torch.full((2, 4, 100), float("nan"))
    args = PrepareArgs(x, perm.token_of_slot, t, None, factor, "int8", 16)
    rows, _ = prepare(args, against=against, dots=dots)
    want = (t(x) * against.repeat_interleave(2, 1)[:, :, None]).sum(-1)
    seen = (perm.slot_of_token >= 0).expand(2, 4, 100)
    assert torch.equal(dots.isnan(), ~seen)
    torch.testing.assert_close(dots[seen], want[seen], rtol=1e-5, atol=1e-5)
    assert torch.equal(rows, prepare(args)[0])


@pytest.mark.parametrize("across", [False, True], ids=["per-head", "across-heads"])
@pytest.mark.parametrize("tokens", [100, 1301])
def test_sums_and_extremes_of_columns(tokens, across):
    """1301 tokens: more than a run, and not a multiple of anything."""
    g = torch.Generator().manual_seed(9)
    for norm, rope, dtype in (("none", "none", torch.bfloat16), ("layer", "part", torch.float32)):
        t = transform(norm, rope, across, tokens=tokens)(False)
        x = (torch.randn(2, 4, tokens, 40, generator=g) + 3).to(dtype)
        seen = torch.rand(1, 4, tokens, generator=g) < 0.7
        seen[:, 1] = False
        found = [torch.full((2, 4, 40), float("nan")) for _ in range(3)]
        y = t(x)
        if not across:  # a norm across heads reads all heads of a token
            x = x.masked_fill(~seen[..., None], float("nan"))
        op = torch.ops.permattn_native.cuda_column_statistics
        op(x, *packed(t), seen, *found)
        there = seen[..., None]
        wanted = (
            y.masked_fill(~there, 0.0).double().sum(2).float(),
            y.masked_fill(~there, float("inf")).amin(2),
            y.masked_fill(~there, -float("inf")).amax(2),
        )
        for ours, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-4)
        again = [torch.empty(2, 4, 40) for _ in range(3)]
        op(x, *packed(t), seen, *again)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_offsets_past_32_bits_are_computed_in_64(monkeypatch):
    # Six gigabytes of which 24 pages are touched.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    far = torch.empty_strided((1, 1, 24, 16), (0, 0, 2**27, 1), dtype=torch.bfloat16)
    near = torch.randn(1, 1, 24, 16, generator=torch.Generator().manual_seed(10)).bfloat16()
    far.copy_(near)
    ours, want = (prepare(PrepareArgs(x, fmt="int8")) for x in (far, near))
    assert torch.equal(ours[0], want[0]) and torch.equal(ours[1], want[1])


@pytest.mark.parametrize("shape", [(0, 2, 8, 8), (1, 2, 0, 8)], ids=["no-batch", "no-tokens"])
def test_nothing_to_prepare(shape):
    rows, scales = prepare(PrepareArgs(torch.zeros(shape), fmt="int8"))
    assert rows.shape == shape and scales.numel() == 0


@pytest.mark.parametrize(
    ("fmt", "layout", "size", "says"),
    [
        ("int8", ROWS, 129, "rows_per_scale"),
        ("int8", FRAGMENTS, 24, "16 slots"),
        ("int4", FRAGMENTS, 48, "32 for INT4"),
        ("int8", NIBBLES, 16, "nibbles"),
        ("none", FRAGMENTS, 16, "format"),
        ("int8", 3, 16, "layout"),
    ],
)
def test_what_there_is_no_kernel_for_is_an_error(fmt, layout, size, says):
    args = PrepareArgs(torch.zeros(1, 1, 64, 16), fmt=fmt, rows_per_scale=size)
    with pytest.raises(RuntimeError, match=says):
        prepare(args, layout)
