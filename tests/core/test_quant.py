"""The quantisers against exact rational arithmetic, and what a QuantSpec refuses."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from permattn.core import AttnPlan, QuantSpec
from permattn.core.quant import (
    FORMATS,
    LEAST_MAXIMUM,
    PRECISIONS,
    quantise,
    quantise_probabilities,
    say_once,
)
from permattn.patterns.dense import plan_dense


def oracle(group: torch.Tensor, high: int) -> tuple[torch.Tensor, float]:
    """One group by rationals: every float32 operation is one exact operation, rounded once."""

    def single(x: Fraction) -> Fraction:
        # A double rounding of a quotient of float32 numbers is innocuous: 53 >= 2 * 24 + 2.
        return Fraction(float(np.float32(float(x))))

    numbers = [[Fraction(x) for x in row] for row in group.tolist()]
    most = max(abs(x) for row in numbers for x in row)
    if most < Fraction(LEAST_MAXIMUM):
        return torch.zeros(group.shape, dtype=torch.int8), 0.0
    inverse, scale = single(single(1 / most) * high), single(most / high)
    values = []
    for row in numbers:
        scaled = (single(x * inverse) for x in row)
        # round() of a Fraction goes to the even neighbour.
        values.append([max(-high, min(high, round(x))) for x in scaled])
    return torch.tensor(values, dtype=torch.int8), float(scale)


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("size", [1e-6, 1.0, 3e4], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 16])
def test_integers_are_exact(name, size, rows):
    x = torch.randn(13, 6, generator=torch.Generator().manual_seed(rows)) * size
    fmt = FORMATS[name]
    values, scale = quantise(x, fmt, rows)
    assert values.dtype == torch.int8 and scale.shape == (-(-13 // rows),)
    for group, first in enumerate(range(0, 13, rows)):
        want, want_scale = oracle(x[first : first + rows], fmt.high)
        assert torch.equal(values[first : first + rows], want)
        assert scale[group].item() == want_scale


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_ties_go_to_even(name):
    high = FORMATS[name].high
    x = torch.tensor([[float(high), 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    assert quantise(x, FORMATS[name], 1)[0].tolist() == [[high, 0, 2, 2, 0, -2, -2]]


@pytest.mark.parametrize("name", list(FORMATS))
def test_columns_have_scales_of_their_own(name):
    x = torch.randn(2, 3, 70, 8) * torch.logspace(-3, 3, 8)
    values, scale = quantise(x, FORMATS[name], 32, per_column=True)
    assert values.shape == x.shape and scale.shape == (2, 3, 3, 8)
    for column in range(8):
        one, one_scale = quantise(x[..., column : column + 1], FORMATS[name], 32)
        assert torch.equal(values[..., column : column + 1].float(), one.float())
        assert torch.equal(scale[..., column], one_scale)


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("least", [0.0, 1e-38, LEAST_MAXIMUM / 2], ids=str)
def test_a_group_of_nothing_is_zeros(name, least):
    values, scale = quantise(torch.full((4, 4), least), FORMATS[name], 4)
    assert (values.float() == 0).all() and scale.tolist() == [0.0]


@pytest.mark.parametrize("name", list(FORMATS))
def test_the_largest_floats_survive(name):
    x = torch.tensor([[3.4e38, -3.4e38, 1e30]])
    values, scale = quantise(x, FORMATS[name], 1)
    assert torch.isfinite(values.float()).all() and torch.isfinite(scale).all()
    torch.testing.assert_close(values.float()[0, :2] * scale, x[0, :2])


@pytest.mark.parametrize("name", list(FORMATS))
def test_error_is_half_a_step(name):
    x = torch.randn(64, 16)
    values, scale = quantise(x, FORMATS[name], 64)
    error = (values.float() * scale - x).abs()
    # e4m3 has three bits of mantissa: half a step is 1/16 of the number, or of its least normal.
    step = scale if name != "fp8" else torch.maximum(x.abs() / 8, scale * 2**-9)
    assert (error <= step / 2 * (1 + 1e-5)).all()


def test_probabilities_use_all_bits_and_end_at_one():
    p = torch.tensor([0.0, 0.5 / 255, 1.5 / 255, 0.1, 1.0])
    assert quantise_probabilities(p, FORMATS["int8"]).tolist() == [0, 0, 2, 26, 255]
    assert quantise_probabilities(p, FORMATS["int4"])[-1] == 15
    assert quantise_probabilities(p, FORMATS["fp8"])[-1] == 448


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"qk": "int2"}, "QuantSpec.qk: wants 'none', 'int8' or 'int4', got 'int2'"),
        ({"pv": "fp16"}, "QuantSpec.pv"),
        ({"q_rows_per_scale": 0}, "q_rows_per_scale: wants an integer >= 1, got 0"),
        ({"kv_rows_per_scale": 2.5}, "kv_rows_per_scale: wants an integer >= 1, got 2.5"),
        ({"q_rows_per_scale": True}, "q_rows_per_scale"),
        ({"qk": "int8", "smooth_k": 1}, "smooth_k: wants True or False, got 1"),
        ({"smooth_k": True}, "want a quantised qk"),
        ({"pv": "int8", "balance": True}, "want a quantised qk"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_fields_are_named(fields, match):
    with pytest.raises(ValueError, match=match):
        QuantSpec(**fields)


@pytest.mark.parametrize(("name", "want"), PRECISIONS.items())
def test_names_are_formats_with_scales_that_suit_blocks_of_64(name, want):
    spec = QuantSpec.named(name)
    assert (spec.qk, spec.pv) == want and spec.smooth_k
    assert spec.balance == ("int4" in name)
    spec.check_blocks(64, 64)
    assert QuantSpec.named("none") == QuantSpec()


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"quant: wants 'none' or one of \['int8', .* got 'int2'"):
        QuantSpec.named("int2")


@pytest.mark.parametrize("name", ["q_rows_per_scale", "kv_rows_per_scale"])
def test_scales_must_divide_the_blocks_of_a_plan(name):
    parts = plan_dense(100, 100, causal=False, block_q=64, block_kv=64).parts
    with pytest.raises(ValueError, match=f"{name}: must divide the plan's blocks of 64, got 48"):
        AttnPlan(parts, QuantSpec(qk="int8", **{name: 48}))
    AttnPlan(parts, QuantSpec(**{name: 48}))  # without a format nothing is grouped


def test_emulation_is_said_once(recwarn):
    for _ in range(3):
        say_once("a format of this test is emulated")
    assert len(recwarn) == 1
