"""Float arithmetic and conversions against float64 and torch's own small types."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from snippets import evaluate, numbers

TORCH = {"f16": torch.float16, "bf16": torch.bfloat16}


def halves(kind: str, seed: int = 0, count: int = 96) -> np.ndarray:
    """Random numbers of a 16-bit type, as patterns."""
    x = torch.from_numpy(numbers(np.float32, count, seed)).to(TORCH[kind])
    return x.view(torch.uint16).numpy()


def as_f64(patterns: np.ndarray, kind: str) -> np.ndarray:
    return torch.from_numpy(patterns).view(TORCH[kind]).double().numpy()


def from_f64(values: np.ndarray, kind: str) -> np.ndarray:
    return torch.from_numpy(values).to(TORCH[kind]).view(torch.uint16).numpy()


def assert_same_floats(found: np.ndarray, wanted: np.ndarray, kind: str) -> None:
    """Equal patterns, or both NaN."""
    a, b = as_f64(found, kind), as_f64(wanted, kind)
    np.testing.assert_array_equal(a, b)
    numbers_ = ~np.isnan(a)
    np.testing.assert_array_equal(np.signbit(a[numbers_]), np.signbit(b[numbers_]))


TWO = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.fmin, "max": np.fmax}


@pytest.mark.parametrize("name", TWO)
def test_single_precision(name: str):
    x, y = numbers(np.float32, seed=1), numbers(np.float32, seed=2)
    rounding = "" if name in ("min", "max") else ".rn"
    with np.errstate(all="ignore"):
        wanted = TWO[name](x.astype(np.float64), y.astype(np.float64)).astype(np.float32)
    found = evaluate(f"{name}{rounding}.f32 $o, $0, $1;", [x, y], np.float32)
    np.testing.assert_array_equal(found, wanted)


def test_max_of_three_and_with_nan():
    x, y, z = (numbers(np.float32, seed=s) for s in (1, 2, 3))
    found = evaluate("max.f32 $o, $0, $1, $2;", [x, y, z], np.float32)
    np.testing.assert_array_equal(found, np.fmax(np.fmax(x, y), z))
    found = evaluate("max.NaN.f32 $o, $0, $1;", [x, y], np.float32)
    np.testing.assert_array_equal(found, np.maximum(x, y))


@pytest.mark.parametrize("rounding", ["rn", "rz", "rm", "rp"])
def test_directed_roundings(rounding: str):
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=64).astype(np.float32) for _ in "xy")
    found = evaluate(f"mul.{rounding}.f32 $o, $0, $1;", [x, y], np.float32)
    for a, b, c in zip(x, y, found, strict=True):
        exact, near = Fraction(float(a)) * Fraction(float(b)), Fraction(float(c))
        step = Fraction(float(np.spacing(np.abs(c))))
        ok = {
            "rn": abs(near - exact) <= step / 2,
            "rz": abs(near) <= abs(exact) < abs(near) + step,
            "rm": near <= exact < near + step,
            "rp": near - step < exact <= near,
        }
        assert ok[rounding], (a, b, c)


def test_fused_multiply_add_rounds_once():
    x, y, z = (np.random.default_rng(s).normal(size=64).astype(np.float32) for s in range(3))
    z = -(x * y) + z * np.float32(1e-7)  # what one rounding keeps, two would lose
    found = evaluate("fma.rn.f32 $o, $0, $1, $2;", [x, y, z], np.float32)
    exact = [
        Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        for a, b, c in zip(x, y, z, strict=True)
    ]
    np.testing.assert_array_equal(found, np.array([float(e) for e in exact], np.float32))


def test_special_functions():
    x = np.abs(np.random.default_rng(0).normal(size=64)).astype(np.float32) + np.float32(0.1)
    cases = {
        "ex2.approx.ftz.f32": np.exp2, "lg2.approx.f32": np.log2, "rcp.approx.f32": lambda v: 1 / v,
        "sqrt.rn.f32": np.sqrt, "rsqrt.approx.f32": lambda v: v**-0.5, "sin.approx.f32": np.sin,
        "cos.approx.f32": np.cos, "tanh.approx.f32": np.tanh,
    }  # fmt: skip
    for name, function in cases.items():
        found = evaluate(f"{name} $o, $0;", [x], np.float32)
        np.testing.assert_allclose(found, function(x.astype(np.float64)), 3e-7, 1e-7, err_msg=name)
    edges = np.array([-np.inf, np.inf, 0, -200], np.float32)
    found = evaluate("ex2.approx.f32 $o, $0;", [edges], np.float32)
    np.testing.assert_array_equal(found, np.array([0, np.inf, 1, 0], np.float32))


def test_saturation():
    x = numbers(np.float32)
    found = evaluate("add.sat.f32 $o, $0, 0f00000000;", [x], np.float32)
    np.testing.assert_array_equal(found, np.clip(np.where(np.isnan(x), 0, x), 0, 1))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("name", ["add", "mul", "max"])
def test_half_precision(kind: str, name: str):
    x, y = halves(kind, 1), halves(kind, 2)
    with np.errstate(all="ignore"):
        exact = TWO[name](as_f64(x, kind), as_f64(y, kind))
    found = evaluate(f"{name}.{kind} $o, $0, $1;", [x, y], np.uint16)
    assert_same_floats(found, from_f64(exact, kind), kind)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_packed_pairs(kind: str):
    x, y, z = (halves(kind, s, 192) for s in (1, 2, 3))
    packed = [v.view(np.uint32) for v in (x, y, z)]
    with np.errstate(all="ignore"):
        product = as_f64(x, kind) * as_f64(y, kind)
        fused = product + as_f64(z, kind)
    found = evaluate(f"mul.{kind}x2 $o, $0, $1;", packed[:2], np.uint32)
    assert_same_floats(found.view(np.uint16), from_f64(product, kind), kind)
    found = evaluate(f"fma.rn.{kind}x2 $o, $0, $1, $2;", packed, np.uint32)
    # float64 is not exact here, and rounding twice may move a result by one place.
    got, want = as_f64(found.view(np.uint16), kind), as_f64(from_f64(fused, kind), kind)
    np.testing.assert_allclose(got, want, 2e-3 if kind == "f16" else 1e-2)


def test_pairs_of_single_precision():
    x, y, z = (numbers(np.float32, 192, s) for s in (1, 2, 3))
    packed = [v.view(np.uint64) for v in (x, y, z)]
    with np.errstate(all="ignore"):
        wanted = (x.astype(np.float64) * y + z).astype(np.float32)
    found = evaluate("fma.rn.f32x2 $o, $0, $1, $2;", packed, np.uint64)
    np.testing.assert_array_equal(found.view(np.float32), wanted)


FLOAT_COMPARE = {"eq": (False, np.equal), "lt": (False, np.less), "ge": (False, np.greater_equal)}
FLOAT_COMPARE |= {"ne": (False, np.not_equal), "neu": (True, np.not_equal)}
FLOAT_COMPARE |= {"ltu": (True, np.less), "equ": (True, np.equal)}


@pytest.mark.parametrize("name", [*FLOAT_COMPARE, "num", "nan"])
def test_comparisons_with_nan(name: str):
    x, y = numbers(np.float32, seed=1), numbers(np.float32, seed=2)
    x[:30] = y[:30]
    unordered = np.isnan(x) | np.isnan(y)
    if name in ("num", "nan"):
        wanted = unordered if name == "nan" else ~unordered
    else:
        or_nan, function = FLOAT_COMPARE[name]
        wanted = np.where(unordered, or_nan, function(x, y))
    lines = f"setp.{name}.f32 %p1, $0, $1; selp.b32 $o, 1, 0, %p1;"
    np.testing.assert_array_equal(evaluate(lines, [x, y], np.uint32), wanted)


@pytest.mark.parametrize("target", ["s8", "u8", "s16", "s32", "u32", "s64"])
@pytest.mark.parametrize("rounding", ["rni", "rzi", "rmi", "rpi"])
def test_to_integers(target: str, rounding: str):
    x = numbers(np.float32)
    x[:8] = [0.5, 1.5, -0.5, -2.5, 3e9, -3e9, 1e20, 250.5]
    dtype = np.dtype(f"{'i' if target[0] == 's' else 'u'}{int(target[1:]) // 8}")
    register = np.dtype(f"{dtype.kind}{max(2, dtype.itemsize)}")
    function = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rounding]
    info, wanted = np.iinfo(dtype), []
    for v in function(x.astype(np.float64)):
        wanted.append(
            0 if np.isnan(v) else info.max if v > info.max else info.min if v < info.min else int(v)
        )
    found = evaluate(f"cvt.{rounding}.{target}.f32 $o, $0;", [x], register)
    np.testing.assert_array_equal(found, np.array(wanted, object).astype(register))


@pytest.mark.parametrize("source", ["s32", "u32", "s64"])
def test_from_integers(source: str):
    x = numbers({"s32": np.int32, "u32": np.uint32, "s64": np.int64}[source])
    found = evaluate(f"cvt.rn.f32.{source} $o, $0;", [x], np.float32)
    np.testing.assert_array_equal(found, x.astype(np.float32))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_between_floats(kind: str):
    x = numbers(np.float32)
    wanted = torch.from_numpy(x).to(TORCH[kind]).view(torch.uint16).numpy()
    found = evaluate(f"cvt.rn.{kind}.f32 $o, $0;", [x], np.uint16)
    assert_same_floats(found, wanted, kind)
    back = evaluate(f"cvt.f32.{kind} $o, $0;", [wanted], np.float32)
    np.testing.assert_array_equal(back, as_f64(wanted, kind))
    cut = as_f64(evaluate(f"cvt.rz.{kind}.f32 $o, $0;", [x], np.uint16), kind)
    inside = np.isfinite(x) & np.isfinite(cut) & (np.abs(x) > 1e-4)
    assert (np.abs(cut[inside]) <= np.abs(x[inside].astype(np.float64))).all()
    np.testing.assert_allclose(cut[inside], x[inside], 2**-7)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_pairs_from_single_precision(kind: str):
    x, y = numbers(np.float32, seed=1), numbers(np.float32, seed=2)
    found = evaluate(f"cvt.rn.{kind}x2.f32 $o, $0, $1;", [x, y], np.uint32).view(np.uint16)
    assert_same_floats(found[1::2].copy(), from_f64(x.astype(np.float64), kind), kind)
    assert_same_floats(found[0::2].copy(), from_f64(y.astype(np.float64), kind), kind)
    relu = evaluate(f"cvt.rn.relu.{kind}x2.f32 $o, $0, $1;", [x, y], np.uint32).view(np.uint16)
    assert (np.nan_to_num(as_f64(relu, kind)) >= 0).all()


@pytest.mark.parametrize(
    "kind, dtype", [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)]
)
def test_float8(kind: str, dtype: torch.dtype):
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    values = every.view(dtype).float().numpy()
    finite = values[np.isfinite(values)]
    rng = np.random.default_rng(0)
    # All numbers of the format, the ties between them, and past the largest.
    middle = (finite[:-1] + finite[1:]) / 2
    x = np.concatenate([finite, middle, rng.normal(size=200) * 100, [1e5, -1e5]])
    x = x.astype(np.float32)[: len(x) // 2 * 2]
    largest = float(finite.max())
    clamped = torch.from_numpy(np.clip(x, -largest, largest))
    wanted = clamped.to(dtype).view(torch.uint8).numpy()
    name = f"cvt.rn.satfinite.{kind}x2.f32"
    found = evaluate(f"{name} $o, $1, $0;", [x[0::2], x[1::2]], np.uint16).view(np.uint8)
    np.testing.assert_array_equal(found, wanted)
    back = evaluate(f"cvt.rn.f16x2.{kind}x2 $o, $0;", [every.numpy().view(np.uint16)], np.uint32)
    np.testing.assert_array_equal(back.view(np.float16).astype(np.float32), values)


def test_tf32_rounds_to_ten_bits():
    x = np.random.default_rng(0).normal(size=64).astype(np.float32)
    found = evaluate("cvt.rna.tf32.f32 $o, $0;", [x], np.uint32)
    assert (found & 0x1FFF == 0).all()
    np.testing.assert_allclose(found.view(np.float32), x, 2**-11)
