"""Integer and bit instructions against numpy, over random numbers and extremes."""

from __future__ import annotations

import numpy as np
import ptxsim
import pytest
from snippets import evaluate, numbers

DTYPES = {"s16": np.int16, "u16": np.uint16, "s32": np.int32, "u32": np.uint32}
DTYPES |= {"s64": np.int64, "u64": np.uint64}


def exact(x: np.ndarray) -> list[int]:
    """Python integers, so that no reference can overflow."""
    return [int(v) for v in x]


def wrapped(values: list[int], dtype: type) -> np.ndarray:
    bits = 8 * np.dtype(dtype).itemsize
    unsigned = np.array([v & ((1 << bits) - 1) for v in values], np.dtype(f"u{bits // 8}"))
    return unsigned.view(dtype)


def towards_zero(x: int, y: int) -> int:
    quotient = abs(x) // abs(y)
    return quotient if (x < 0) == (y < 0) else -quotient


TWO = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul.lo": lambda x, y: x * y,
    "min": min,
    "max": max,
    "div": towards_zero,
    "rem": lambda x, y: x - y * towards_zero(x, y),
}


@pytest.mark.parametrize("name", TWO)
@pytest.mark.parametrize("kind", DTYPES)
def test_two_operands(name: str, kind: str):
    x, y = numbers(DTYPES[kind], seed=1), numbers(DTYPES[kind], seed=2)
    y = np.where(y == 0, np.array(5, y.dtype), y)
    found = evaluate(f"{name}.{kind} $o, $0, $1;", [x, y], DTYPES[kind])
    wanted = wrapped([TWO[name](a, b) for a, b in zip(exact(x), exact(y), strict=True)], x.dtype)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32"])
def test_products_of_twice_the_width(kind: str):
    x, y = numbers(DTYPES[kind], seed=3), numbers(DTYPES[kind], seed=4)
    bits = int(kind[1:])
    wide = DTYPES[f"{kind[0]}{2 * bits}"]
    z = numbers(wide, seed=5)
    triples = list(zip(exact(x), exact(y), exact(z), strict=True))
    found = evaluate(f"mul.wide.{kind} $o, $0, $1;", [x, y], wide)
    np.testing.assert_array_equal(found, wrapped([a * b for a, b, _ in triples], wide))
    found = evaluate(f"mad.wide.{kind} $o, $0, $1, $2;", [x, y, z], wide)
    np.testing.assert_array_equal(found, wrapped([a * b + c for a, b, c in triples], wide))


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
def test_high_halves(kind: str):
    x, y, z = (numbers(DTYPES[kind], seed=s) for s in (3, 4, 5))
    bits = int(kind[1:])
    triples = list(zip(exact(x), exact(y), exact(z), strict=True))
    found = evaluate(f"mul.hi.{kind} $o, $0, $1;", [x, y], x.dtype)
    np.testing.assert_array_equal(found, wrapped([a * b >> bits for a, b, _ in triples], x.dtype))
    found = evaluate(f"mad.lo.{kind} $o, $0, $1, $2;", [x, y, z], x.dtype)
    np.testing.assert_array_equal(found, wrapped([a * b + c for a, b, c in triples], x.dtype))


@pytest.mark.parametrize("kind", ["s16", "s32", "s64"])
def test_sign_changes(kind: str):
    x = numbers(DTYPES[kind])
    for name, function in (("neg", lambda v: -v), ("abs", abs)):
        found = evaluate(f"{name}.{kind} $o, $0;", [x], x.dtype)
        np.testing.assert_array_equal(found, wrapped([function(v) for v in exact(x)], x.dtype))


def test_saturating_add():
    x, y = numbers(np.int32, seed=1), numbers(np.int32, seed=2)
    found = evaluate("add.sat.s32 $o, $0, $1;", [x, y], np.int32)
    wanted = [max(-(2**31), min(2**31 - 1, a + b)) for a, b in zip(exact(x), exact(y), strict=True)]
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("kind", ["b16", "s16", "u16", "b32", "s32", "u32", "b64", "s64", "u64"])
def test_shifts(kind: str):
    bits = int(kind[1:])
    dtype = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{bits // 8}")
    x = numbers(dtype)
    by = np.resize(np.array([0, 1, 7, bits - 1, bits, bits + 5, 200], np.uint32), len(x))
    pairs = list(zip(exact(x), exact(by), strict=True))
    right = [(a >> b) if b < bits or kind[0] == "s" else 0 for a, b in pairs]
    found = evaluate(f"shr.{kind} $o, $0, $1;", [x, by], dtype)
    np.testing.assert_array_equal(found, wrapped(right, dtype))
    if kind[0] == "b":
        left = [a << b if b < bits else 0 for a, b in pairs]
        found = evaluate(f"shl.{kind} $o, $0, $1;", [x, by], dtype)
        np.testing.assert_array_equal(found, wrapped(left, dtype))


@pytest.mark.parametrize("kind", ["b16", "b32", "b64"])
def test_logic(kind: str):
    dtype = np.dtype(f"u{int(kind[1:]) // 8}")
    x, y = numbers(dtype, seed=1), numbers(dtype, seed=2)
    for name, function in (("and", x & y), ("or", x | y), ("xor", x ^ y)):
        np.testing.assert_array_equal(
            evaluate(f"{name}.{kind} $o, $0, $1;", [x, y], dtype), function
        )
    np.testing.assert_array_equal(evaluate(f"not.{kind} $o, $0;", [x], dtype), ~x)


@pytest.mark.parametrize("table", [0x00, 0xFF, 0x96, 0xE8, 0xCA, 0x1D, 0xFE])
def test_lop3(table: int):
    x, y, z = (numbers(np.uint32, seed=s) for s in (1, 2, 3))
    found = evaluate(f"lop3.b32 $o, $0, $1, $2, {table};", [x, y, z], np.uint32)
    wanted = np.zeros_like(x)
    for bit in range(32):
        index = (x >> bit & 1) * 4 + (y >> bit & 1) * 2 + (z >> bit & 1)
        wanted |= ((table >> index.astype(int)) & 1).astype(np.uint32) << np.uint32(bit)
    np.testing.assert_array_equal(found, wanted)


def test_prmt():
    x, y, s = (numbers(np.uint32, seed=s) for s in (1, 2, 3))
    found = evaluate("prmt.b32 $o, $0, $1, $2;", [x, y, s], np.uint32)
    wanted = []
    for a, b, sel in zip(exact(x), exact(y), exact(s), strict=True):
        pool = (a | b << 32).to_bytes(8, "little")
        picked = []
        for k in range(4):
            nibble = sel >> 4 * k & 15
            byte = pool[nibble & 7]
            picked.append((255 if byte > 127 else 0) if nibble & 8 else byte)
        wanted.append(int.from_bytes(bytes(picked), "little"))
    np.testing.assert_array_equal(found, np.array(wanted, np.uint32))


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
def test_fields(kind: str):
    dtype, bits = np.dtype(DTYPES[kind]), int(kind[1:])
    x = numbers(dtype, seed=1)
    rng = np.random.default_rng(0)
    start = rng.integers(0, bits + 4, len(x)).astype(np.uint32)
    length = rng.integers(0, bits + 4, len(x)).astype(np.uint32)
    found = evaluate(f"bfe.{kind} $o, $0, $1, $2;", [x, start, length], dtype)
    wanted = []
    for v, p, n in zip(exact(x), exact(start), exact(length), strict=True):
        # The manual's loop, bit by bit.
        pattern, msb = v & ((1 << bits) - 1), bits - 1
        sign = 0 if kind[0] == "u" or n == 0 else pattern >> min(p + n - 1, msb) & 1
        field = [pattern >> (p + i) & 1 if i < n and p + i <= msb else sign for i in range(bits)]
        wanted.append(sum(b << i for i, b in enumerate(field)))
    np.testing.assert_array_equal(found, wrapped(wanted, dtype))
    if kind[0] == "s":
        return
    y = numbers(dtype, seed=2)
    found = evaluate(f"bfi.b{bits} $o, $0, $1, $2, $3;", [x, y, start, length], dtype)
    wanted = []
    for a, b, p, n in zip(exact(x), exact(y), exact(start), exact(length), strict=True):
        for i in range(n):
            if p + i < bits:
                b = b & ~(1 << p + i) | (a >> i & 1) << p + i
        wanted.append(b)
    np.testing.assert_array_equal(found, wrapped(wanted, dtype))


def test_counts_and_reversals():
    x = numbers(np.uint32)
    text = [f"{v:032b}" for v in exact(x)]
    cases = {
        "popc.b32": [t.count("1") for t in text],
        "clz.b32": [len(t) - len(t.lstrip("0")) for t in text],
        "brev.b32": [int(t[::-1], 2) for t in text],
        "bfind.u32": [v.bit_length() - 1 & 0xFFFFFFFF for v in exact(x)],
    }
    for name, wanted in cases.items():
        np.testing.assert_array_equal(
            evaluate(f"{name} $o, $0;", [x], np.uint32), np.array(wanted, np.uint32), name
        )


@pytest.mark.parametrize("kinds", ["s32.s32", "u32.u32", "s32.u32", "u32.s32"])
def test_dp4a(kinds: str):
    x, y, z = (numbers(np.uint32, seed=s) for s in (1, 2, 3))
    left, right = ("<i1" if k == "s32" else "<u1" for k in kinds.split("."))
    sums = (x.view(left).astype(int) * y.view(right).astype(int)).reshape(-1, 4).sum(1)
    dtype = np.uint32 if kinds == "u32.u32" else np.int32
    found = evaluate(f"dp4a.{kinds} $o, $0, $1, $2;", [x, y, z], dtype)
    np.testing.assert_array_equal(
        found, wrapped([int(a) + int(b) for a, b in zip(sums, z, strict=True)], dtype)
    )


def test_funnel_shift():
    low, high = numbers(np.uint32, seed=1), numbers(np.uint32, seed=2)
    by = np.resize(np.array([0, 1, 31, 32, 40], np.uint32), len(low))
    both = [a | b << 32 for a, b in zip(exact(low), exact(high), strict=True)]
    wrap = [b & 31 for b in exact(by)]
    clamp = [min(b, 32) for b in exact(by)]
    cases = {
        "shf.l.wrap.b32": [(v << n >> 32) & 0xFFFFFFFF for v, n in zip(both, wrap, strict=True)],
        "shf.r.wrap.b32": [v >> n & 0xFFFFFFFF for v, n in zip(both, wrap, strict=True)],
        "shf.l.clamp.b32": [(v << n >> 32) & 0xFFFFFFFF for v, n in zip(both, clamp, strict=True)],
        "shf.r.clamp.b32": [v >> n & 0xFFFFFFFF for v, n in zip(both, clamp, strict=True)],
    }
    for name, wanted in cases.items():
        found = evaluate(f"{name} $o, $0, $1, $2;", [low, high, by], np.uint32)
        np.testing.assert_array_equal(found, np.array(wanted, np.uint32), name)


COMPARE = {"eq": "__eq__", "ne": "__ne__", "lt": "__lt__", "le": "__le__", "gt": "__gt__"}


@pytest.mark.parametrize("name", COMPARE)
@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32", "s64", "u64"])
def test_comparisons(name: str, kind: str):
    x, y = numbers(DTYPES[kind], seed=1), numbers(DTYPES[kind], seed=2)
    x[:20] = y[:20]
    lines = f"setp.{name}.{kind} %p1|%p2, $0, $1; selp.b32 %r1, 1, 0, %p1;"
    lines += "selp.b32 %r2, 2, 0, %p2; or.b32 $o, %r1, %r2;"
    found = evaluate(lines, [x, y], np.uint32)
    true = [getattr(a, COMPARE[name])(b) for a, b in zip(exact(x), exact(y), strict=True)]
    np.testing.assert_array_equal(found, np.where(true, 1, 2))


def test_vectors_of_registers():
    x = numbers(np.uint32)
    lines = "mov.b32 {%h1, %h2}, $0; mov.b32 $o, {%h2, %h1};"
    np.testing.assert_array_equal(evaluate(lines, [x], np.uint32), x >> 16 | x << 16)
    y = numbers(np.uint64)
    lines = "mov.b64 {%r1, %r2}, $0; mov.b64 $o, {%r2, %r1};"
    found = evaluate(lines, [y], np.uint64)
    np.testing.assert_array_equal(found, y >> np.uint64(32) | y << np.uint64(32))


@pytest.mark.parametrize("target", ["s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("source", ["s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"])
def test_integer_conversions(target: str, source: str):
    def dtype(kind: str) -> np.dtype:
        return np.dtype(f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 8}")

    # Bytes live in registers of 16 bits, whose upper half is not looked at.
    wide = dtype(source[0] + "16") if source[1:] == "8" else dtype(source)
    x = numbers(wide)
    meant = x.astype(dtype(source))
    register = dtype(target[0] + "16") if target[1:] == "8" else dtype(target)
    found = evaluate(f"cvt.{target}.{source} $o, $0;", [x], register)
    np.testing.assert_array_equal(found, meant.astype(dtype(target)).astype(register))
    info = np.iinfo(dtype(target))
    clipped = [max(info.min, min(info.max, v)) for v in exact(meant)]
    found = evaluate(f"cvt.sat.{target}.{source} $o, $0;", [x], register)
    np.testing.assert_array_equal(found, np.array(clipped, object).astype(register))


def test_an_unknown_opcode_raises_even_where_it_never_runs():
    x = numbers(np.uint32)
    with pytest.raises(ptxsim.UnknownOpcode, match=r"frobnicate.*ptx line|ptx line.*frobnicate"):
        evaluate("mov.b32 $o, $0; bra DONE; frobnicate.b32 $o, $0; DONE:", [x], np.uint32)


def test_an_operand_of_the_wrong_width_raises():
    with pytest.raises(ptxsim.SimulationError, match="16 bits"):
        evaluate("add.s32 $o, $0, $0;", [numbers(np.int16)], np.uint32)
