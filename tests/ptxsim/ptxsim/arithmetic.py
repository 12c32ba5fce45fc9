"""Arithmetic of integers and floats, packed ones included.

Subnormals are kept: a GPU with `.ftz` has zero where this has a number below 2^-126. The
approximations of a GPU (ex2.approx, div.full, ...) are exact here to a rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .formats import CODECS, ROUNDINGS, ROW_OF, f64_to_f32
from .parse import Instruction
from .registers import VIEWS, Registers, put
from .steps import Run, kind_of, opcode, unknown

INTEGERS = ("s16", "u16", "s32", "u32", "s64", "u64")
FLOATS = ("f32", "f64")
KNOWN = frozenset({*INTEGERS, *FLOATS, *CODECS})


def apply(function: Callable, view: str, into: int, sources: list[int]) -> Run:
    """A step that writes function(rows) with no conversion."""
    if len(sources) == 1:
        (only,) = sources

        def run_one(bank, mask):
            rows = bank.rows[view]
            put(rows[into], function(rows[only]), mask)

        return run_one
    if len(sources) == 2 and isinstance(function, np.ufunc):
        left, right = sources

        def run_two(bank, mask):
            rows = bank.rows[view]
            if mask is None:
                function(rows[left], rows[right], out=rows[into])
            else:
                function(rows[left], rows[right], out=rows[into], where=mask)

        return run_two

    def run(bank, mask):
        rows = bank.rows[view]
        put(rows[into], function(*[rows[s] for s in sources]), mask)

    return run


def apply_coded(function: Callable, kind: str, into: int, sources: list[int]) -> Run:
    """A step of a type that is computed in a wider one."""
    decode, encode = CODECS[kind]
    view = ROW_OF.get(kind, kind)

    def run(bank, mask):
        rows = bank.rows[view]
        put(rows[into], encode(function(*[decode(rows[s]) for s in sources])), mask)

    return run


def _rounding(instruction: Instruction) -> str:
    return next((p for p in instruction.parts if p in ROUNDINGS), "rn")


def _operation(
    instruction: Instruction, registers: Registers, by_integer: Callable, by_float: Callable
) -> Run:
    """Builds one operation for whatever type its opcode names."""
    kind = kind_of(instruction, KNOWN)
    view = ROW_OF.get(kind, kind)
    into = registers.write(instruction.operands[0], view)
    sources = [registers.read(x, view) for x in instruction.operands[1:]]
    function = by_integer if kind in INTEGERS or kind in ROW_OF else by_float
    function = _saturated(instruction, kind, _rounded(instruction, kind, function))
    if kind in CODECS:
        return apply_coded(function, kind, into, sources)
    return apply(function, view, into, sources)


def _rounded(instruction: Instruction, kind: str, function: Callable) -> Callable:
    rounding = _rounding(instruction)
    if rounding == "rn" or kind in INTEGERS:
        return function
    if kind not in ("f32", "f32x2"):
        raise unknown(instruction, f"rounding {rounding} of {kind}")
    return lambda *x: f64_to_f32(function(*[y.astype(np.float64) for y in x]), rounding)


def _saturated(instruction: Instruction, kind: str, function: Callable) -> Callable:
    if "sat" in instruction.parts:
        if kind == "s32":
            low, high = -(2**31), 2**31 - 1
            return lambda *x: np.clip(function(*[y.astype(np.int64) for y in x]), low, high).astype(
                np.int32
            )
        if kind in INTEGERS:
            raise unknown(instruction, f"saturation of {kind}")
        return lambda *x: np.clip(np.nan_to_num(function(*x), nan=0.0), 0, 1).astype(np.float32)
    if "relu" in instruction.parts:
        return lambda *x: np.maximum(function(*x), 0)
    return function


@opcode("add", "sub")
def _add(instruction: Instruction, registers: Registers) -> Run:
    if {"cc"} & set(instruction.parts):
        raise unknown(instruction, "carry")
    function = np.add if instruction.parts[0] == "add" else np.subtract
    return _operation(instruction, registers, function, function)


@opcode("min", "max")
def _extreme(instruction: Instruction, registers: Registers) -> Run:
    is_min = instruction.parts[0] == "min"
    if "xorsign" in instruction.parts:
        raise unknown(instruction, "xorsign")
    if "NaN" in instruction.parts:
        two = np.minimum if is_min else np.maximum
    else:
        two = np.fmin if is_min else np.fmax
    by_integer = np.minimum if is_min else np.maximum
    if len(instruction.operands) == 4:
        return _operation(
            instruction,
            registers,
            lambda x, y, z: by_integer(by_integer(x, y), z),
            lambda x, y, z: two(two(x, y), z),
        )
    return _operation(instruction, registers, by_integer, two)


@opcode("abs")
def _abs(instruction: Instruction, registers: Registers) -> Run:
    return _operation(instruction, registers, np.abs, np.abs)


@opcode("neg")
def _neg(instruction: Instruction, registers: Registers) -> Run:
    return _operation(instruction, registers, np.negative, np.negative)


@opcode("mul")
def _mul(instruction: Instruction, registers: Registers) -> Run:
    kind = kind_of(instruction, KNOWN)
    if kind in INTEGERS and "lo" not in instruction.parts:
        return _wide_product(instruction, registers, kind)
    return _operation(instruction, registers, np.multiply, np.multiply)


@opcode("mad", "fma")
def _mad(instruction: Instruction, registers: Registers) -> Run:
    kind = kind_of(instruction, KNOWN)
    if kind in INTEGERS and "lo" not in instruction.parts:
        return _wide_product(instruction, registers, kind)

    def fused(x, y, z):
        # Products of float32 are exact in float64.
        exact = x.astype(np.float64) * y + z
        return exact if x.dtype == np.float64 else exact.astype(np.float32)

    return _operation(instruction, registers, lambda x, y, z: x * y + z, fused)


def _wide_product(instruction: Instruction, registers: Registers, kind: str) -> Run:
    """mul and mad with .wide (both halves) or .hi (the upper one)."""
    size = VIEWS[kind]().itemsize
    twice = kind[0] + str(16 * size)
    is_wide = "wide" in instruction.parts
    target = twice if is_wide else kind
    into = registers.write(instruction.operands[0], target)
    left, right = (registers.read(x, kind) for x in instruction.operands[1:3])
    rest = instruction.operands[3:]
    added = registers.read(rest[0], target) if rest else -1
    if size == 8:
        return _high_of_64(instruction, kind, into, left, right, added)
    wide, narrow = VIEWS[twice], VIEWS[kind]

    def run(bank, mask):
        rows = bank.rows[kind]
        value = rows[left].astype(wide) * rows[right].astype(wide)
        if not is_wide:
            value = (value >> wide(8 * size)).astype(narrow)
        if added >= 0:
            value = value + bank.rows[target][added]
        put(bank.rows[target][into], value, mask)

    return run


def _high_of_64(instruction: Instruction, kind: str, into: int, left: int, right: int, added: int):
    if "hi" not in instruction.parts:
        raise unknown(instruction, "a product of 128 bits")

    def run(bank, mask):
        rows = bank.rows[kind]
        value = (rows[left].astype(object) * rows[right].astype(object)) >> 64
        value = value.astype(VIEWS[kind])
        put(rows[into], value + rows[added] if added >= 0 else value, mask)

    return run


@opcode("mul24", "mad24")
def _mul24(instruction: Instruction, registers: Registers) -> Run:
    raise unknown(instruction, "24-bit products")


@opcode("div", "rem")
def _div(instruction: Instruction, registers: Registers) -> Run:
    is_div = instruction.parts[0] == "div"

    def by_integer(x, y):
        safe = np.where(y == 0, 1, y).astype(y.dtype)
        quotient = x // safe
        # numpy rounds down, PTX cuts towards zero.
        cut = (x - quotient * safe != 0) & ((x < 0) != (safe < 0))
        quotient = quotient + cut.astype(x.dtype)
        return quotient if is_div else x - quotient * safe

    return _operation(instruction, registers, by_integer, np.divide)


def _reciprocal_root(x: np.ndarray) -> np.ndarray:
    return x.dtype.type(1) / np.sqrt(x)


_UNARY = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "rsqrt": _reciprocal_root,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@opcode(*_UNARY)
def _unary(instruction: Instruction, registers: Registers) -> Run:
    function = _UNARY[instruction.parts[0]]
    return _operation(instruction, registers, function, function)


@opcode("copysign")
def _copysign(instruction: Instruction, registers: Registers) -> Run:
    # PTX names the sign first.
    return _operation(instruction, registers, np.copysign, lambda x, y: np.copysign(y, x))


@opcode("sad")
def _sad(instruction: Instruction, registers: Registers) -> Run:
    def by_integer(x, y, z):
        return np.where(x > y, x - y, y - x) + z

    return _operation(instruction, registers, by_integer, by_integer)


@opcode("dp4a")
def _dp4a(instruction: Instruction, registers: Registers) -> Run:
    """Four products of bytes, added up."""
    kinds = [p for p in instruction.parts[1:] if p in ("u32", "s32")]
    target = "u32" if kinds == ["u32", "u32"] else "s32"
    into = registers.write(instruction.operands[0], target)
    left, right, added = (registers.read(x, "b32") for x in instruction.operands[1:4])
    types = [np.int8 if k == "s32" else np.uint8 for k in kinds]

    def run(bank, mask):
        rows = bank.rows["b32"]
        x, y = (
            np.ascontiguousarray(rows[r]).view(t).reshape(-1, 4).astype(np.int64)
            for r, t in zip((left, right), types, strict=True)
        )
        value = (x * y).sum(1).astype(VIEWS[target]) + bank.rows[target][added]
        put(bank.rows[target][into], value, mask)

    return run
