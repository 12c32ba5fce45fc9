"""Rows made ready by a kernel: integers to the last bit, transforms within their roundings."""

import pytest
import torch
from interpreter.memory_checker import untouched_memory
from permattn.backends import reference, triton
from permattn.core.prepare import PrepareArgs
from permattn.core.prologue import RowTransform
from permattn.core.quant import FORMATS
from permattn.testing import random_permutation
from permattn.triton_kernels import launch
from quantised_cases import transform

BATCH, HEADS, TOKENS, DIM = 2, 2, 75, 40


def rows(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[B, H, S, D], heads innermost in memory."""
    g = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, TOKENS, HEADS, DIM, generator=g).to(dtype).transpose(1, 2)


def order(heads: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(2)
    perm = random_permutation(TOKENS, heads=heads, batch=BATCH, holes=9, generator=g)
    return perm.token_of_slot


def columns(seed: int) -> torch.Tensor:
    return torch.randn(BATCH, HEADS, DIM, generator=torch.Generator().manual_seed(seed))


def assert_equal(args: PrepareArgs) -> None:
    (ours, scale), (want, want_scale) = triton.prepare(args), reference.prepare(args)
    assert ours.dtype == want.dtype and ours.shape == want.shape
    assert torch.equal(ours.float(), want.float())
    assert scale.dtype == want_scale.dtype and torch.equal(scale, want_scale)


@pytest.mark.parametrize("capability", [80, 89], ids=["bytes", "float8"])
@pytest.mark.parametrize("per_column", [False, True], ids=["group", "column"])
@pytest.mark.parametrize("size", [1, 16, 48, 64])
@pytest.mark.parametrize("fmt", FORMATS)
def test_numbers_equal_the_oracle(fmt, size, per_column, capability, monkeypatch):
    if capability == 89 and fmt != "fp8":
        size = 128
    monkeypatch.setattr(launch, "capability_of", lambda device: capability)
    x = rows(torch.bfloat16 if size == 16 else torch.float32)
    heads = {1: 1, 16: HEADS, 48: 2 * HEADS, 64: HEADS, 128: 1}[size]
    assert_equal(PrepareArgs(x, order(heads), None, columns(3), columns(4), fmt, size, per_column))


def test_token_order_needs_no_map():
    assert_equal(PrepareArgs(rows(), fmt="int8", rows_per_scale=32))
    assert_equal(PrepareArgs(rows(torch.float16), order(4)))


@pytest.mark.parametrize("fmt", FORMATS)
def test_ties_go_to_even_and_every_size_has_its_place(fmt):
    form = FORMATS[fmt]
    halves = torch.arange(-2 * form.high, 2 * form.high + 1) / 2
    x = torch.zeros(1, 1, 2, 1024)
    # Half way between e4m3 numbers: sixteenths of every power of two, down to below the smallest.
    sizes = torch.arange(16, 32)[:, None] / 16 * 2.0 ** torch.arange(-13, 9)
    tied = torch.cat((sizes.flatten().clamp_max(448), -sizes.flatten().clamp_max(448)))
    tied = halves if fmt != "fp8" else tied
    x[0, 0, 0, : len(tied)] = tied
    x[0, 0, 0, -1] = form.high
    assert_equal(PrepareArgs(x, fmt=fmt, rows_per_scale=1))
    assert_equal(PrepareArgs(x.transpose(2, 3).contiguous(), fmt=fmt, rows_per_scale=128))


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_a_group_of_nothing_is_zero_and_nan_is_not_hidden():
    x = rows().contiguous()
    x[:, :, :32] = 1e-31
    x[0, 0, 40, 5] = float("nan")
    for per_column in (False, True):
        args = PrepareArgs(x, fmt="int8", rows_per_scale=32, per_column=per_column)
        (ours, scale), (_, want) = triton.prepare(args), reference.prepare(args)
        assert not bool(ours[:, :, :32].any()) and not bool(scale[:, :, 0].any())
        assert bool(want.isnan().any()) and torch.equal(scale.isnan(), want.isnan())


TRANSFORMS = {
    "rms-interleaved": transform(HEADS, DIM, TOKENS, across=False),
    "layer-across-halves": transform(HEADS, DIM, TOKENS, across=True),
    "rotation": RowTransform(cos=torch.rand(TOKENS, 20), sin=torch.rand(TOKENS, 20)),
    "layer": RowTransform("layer", torch.rand(DIM), torch.rand(DIM), 1e-3),
    "rms-across": RowTransform("rms", torch.rand(HEADS * DIM).bfloat16(), across_heads=True),
}


@pytest.mark.parametrize("fmt", ["none", "int8", "fp8"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_within_their_roundings(name, fmt):
    args = PrepareArgs(rows(), order(4), TRANSFORMS[name], columns(3), columns(4), fmt, 16)
    (ours, scale), (want, want_scale) = triton.prepare(args), reference.prepare(args)
    if fmt == "none":
        torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-5)
        return
    torch.testing.assert_close(scale, want_scale, rtol=1e-5, atol=0)
    off = (ours.float() - want.float()).abs()
    # A sum in another order moves a number next to a tie, by one step.
    step = 1.0 if fmt == "int8" else 32.0
    assert float(off.max()) <= step and float((off > 0).float().mean()) < 1e-3


def test_rotation_alone_is_exact():
    assert_equal(PrepareArgs(rows(), order(2), TRANSFORMS["rotation"], fmt="int8"))


def test_holes_are_zero_whatever_token_0_is():
    x = rows().contiguous()
    token = order(1)
    token[token == 0] = -1
    x[:, :, 0] = float("nan")
    assert_equal(PrepareArgs(x, token, None, columns(3), None, "int8", 32, True))


def test_offsets_past_32_bits_are_computed_in_64():
    with untouched_memory():
        far = torch.empty_strided((1, 1, 24, 16), (0, 0, 2**27, 1), dtype=torch.bfloat16)
    near = torch.randn(1, 1, 24, 16).bfloat16()
    far.copy_(near)
    ours, want = (triton.prepare(PrepareArgs(x, fmt="int8")) for x in (far, near))
    assert torch.equal(ours[0], want[0]) and torch.equal(ours[1], want[1])
