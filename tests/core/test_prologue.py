"""Norm and rotary embedding against what model libraries compute, and their flat form."""

from __future__ import annotations

import permattn as pa
import pytest
import torch
from permattn.core.prologue import Prologue, RowTransform, pack_prologue, unpack_prologue
from permattn.patterns.dense import plan_dense


def angles(rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.arange(rows)[:, None] * 0.3 ** torch.arange(width)[None]
    return angle.cos(), angle.sin()


def test_rms_norm_equals_torchs():
    x, weight = torch.randn(2, 3, 5, 8), torch.randn(8)
    got = RowTransform("rms", weight, eps=1e-5)(x)
    torch.testing.assert_close(got, torch.nn.functional.rms_norm(x, (8,), weight, 1e-5))


def test_layer_norm_equals_torchs():
    x, weight, bias = torch.randn(2, 3, 5, 8), torch.randn(8), torch.randn(8)
    got = RowTransform("layer", weight, bias, eps=1e-5)(x)
    torch.testing.assert_close(got, torch.nn.functional.layer_norm(x, (8,), weight, bias, 1e-5))


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_a_norm_across_heads_sees_the_whole_token(norm):
    rows, weight = torch.randn(2, 5, 24), torch.randn(24)
    x = rows.unflatten(-1, (3, 8)).transpose(1, 2)
    got = RowTransform(norm, weight, across_heads=True)(x).transpose(1, 2).flatten(2)
    one = RowTransform(norm, weight)(rows[:, None])[:, 0]
    torch.testing.assert_close(got, one)


@pytest.mark.parametrize("interleaved", [True, False], ids=["pairs", "halves"])
@pytest.mark.parametrize("width", [4, 3], ids=["all", "partial"])
def test_rotation_is_a_complex_product(interleaved, width):
    x, start = torch.randn(2, 3, 7, 8, dtype=torch.float64), 2
    cos, sin = angles(4, width)
    got = RowTransform(cos=cos, sin=sin, rope_start=start, interleaved=interleaved)(x)
    turn = torch.complex(cos, sin).to(torch.complex128)
    want = x.clone()
    for i in range(width):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + width)
        pair = torch.complex(x[:, :, start : start + 4, a], x[:, :, start : start + 4, b])
        pair = pair * turn[:, i]
        want[:, :, start : start + 4, a] = pair.real
        want[:, :, start : start + 4, b] = pair.imag
    torch.testing.assert_close(got, want, atol=1e-7, rtol=0)


def test_flat_form_keeps_every_field():
    cos, sin = angles(5, 2)
    q = RowTransform("layer", torch.ones(8), None, 1e-3, False, cos, sin, 1, False)
    k = RowTransform("rms", torch.ones(16), None, 1e-4, True)
    back = unpack_prologue(*pack_prologue(Prologue(q, k)))
    assert back is not None
    for mine, theirs in ((q, back.q), (k, back.k)):
        for name in RowTransform.__dataclass_fields__:
            assert getattr(mine, name) is getattr(theirs, name) or getattr(mine, name) == getattr(
                theirs, name
            )
    assert unpack_prologue(*pack_prologue(None)) is None


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_attention_with_a_prologue_equals_its_parts(backend):
    q, k, v = (torch.randn(1, 4, 40, 16) for _ in range(3))
    cos, sin = angles(30, 8)
    prologue = Prologue(
        RowTransform("rms", torch.randn(16), cos=cos, sin=sin, rope_start=10),
        RowTransform("layer", torch.randn(64), torch.randn(64), across_heads=True),
    )
    plan = plan_dense(40, 40, causal=False)
    assert prologue.q is not None and prologue.k is not None
    want = torch.nn.functional.scaled_dot_product_attention(prologue.q(q), prologue.k(k), v)
    got = pa.sparse_attention(q, k, v, plan, prologue=prologue, backend=backend)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)


def test_gradients_go_through_a_prologue():
    q, k, v = (torch.randn(1, 2, 12, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    plan = plan_dense(12, 12, causal=False)

    def attend(q, k, v, weight):
        return pa.sparse_attention(q, k, v, plan, prologue=Prologue(RowTransform("rms", weight)))

    assert torch.autograd.gradcheck(attend, (q, k, v, weight))


COS, SIN = angles(4, 2)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"norm": "group"}, "RowTransform.norm: wants one of"),
        ({"weight": torch.ones(4)}, "wants a norm beside it"),
        ({"cos": COS}, "want both or none"),
        ({"cos": COS.double(), "sin": SIN}, r"RowTransform.cos: wants float32 \[R, W\]"),
        ({"cos": COS, "sin": SIN[:3]}, "want one shape"),
        ({"rope_start": -1}, "rope_start: wants >= 0, got -1"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_bad_fields_are_named(fields, match):
    with pytest.raises(ValueError, match=match):
        RowTransform(**fields)


@pytest.mark.parametrize(
    ("transform", "match"),
    [
        (RowTransform("rms", torch.ones(7)), r"prologue.q.weight: wants shape \[8\], got \[7\]"),
        (RowTransform("rms", torch.ones(8), across_heads=True), r"wants shape \[16\], got \[8\]"),
        (RowTransform(cos=COS, sin=SIN, rope_start=3), "prologue.q.cos: 4 rows from token 3"),
        (RowTransform(cos=COS.repeat(1, 3), sin=SIN.repeat(1, 3)), "do not fit"),
    ],
    ids=["weight", "across-heads", "rows", "width"],
)
def test_a_transform_that_does_not_fit_is_refused(transform, match):
    x = torch.randn(1, 2, 6, 8)
    with pytest.raises(ValueError, match=match):
        pa.sparse_attention(x, x, x, plan_dense(6, 6, causal=False), prologue=Prologue(transform))


def test_a_prologue_must_be_one():
    x = torch.randn(1, 2, 6, 8)
    with pytest.raises(TypeError, match="prologue: wants a Prologue or None, got str"):
        pa.sparse_attention(x, x, x, plan_dense(6, 6, causal=False), prologue="rms")  # type: ignore[arg-type]
