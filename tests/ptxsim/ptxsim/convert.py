"""cvt: between all integer and float types, and into pairs of small floats."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .arithmetic import FLOATS, INTEGERS
from .formats import (
    CODECS,
    f32_to_bf16,
    f32_to_float8,
    f32_to_tf32,
    f64_to_f32,
    float8_to_f32,
)
from .parse import Instruction
from .registers import VIEWS, Registers, put
from .steps import Run, opcode, unknown

_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_SMALL_INTEGERS = ("s8", "u8")
_PAIRS = ("f16x2", "bf16x2", "e4m3x2", "e5m2x2")
_SCALARS = (*INTEGERS, *_SMALL_INTEGERS, *FLOATS, "f16", "bf16", "tf32")


@opcode("cvt")
def _cvt(instruction: Instruction, registers: Registers) -> Run:
    types = [p for p in instruction.parts[1:] if p in (*_SCALARS, *_PAIRS)]
    if len(types) != 2:
        raise unknown(instruction, "these types")
    target, source = types
    if "pack" in instruction.parts:
        raise unknown(instruction, "cvt.pack")
    if target in _PAIRS or source in _PAIRS:
        return _convert_pair(instruction, registers, target, source)
    if target == "tf32":
        return _convert_to_tf32(instruction, registers)
    return _convert_one(instruction, registers, target, source)


def _rounding(instruction: Instruction, default: str = "rn") -> str:
    known = ("rn", "rz", "rm", "rp", "rna")
    return next((p for p in instruction.parts if p in known), default)


def _float_of(kind: str) -> Callable[[np.ndarray], np.ndarray]:
    """A row of floats as an array of a width that numpy computes in."""
    return CODECS[kind][0] if kind in ("f16", "bf16") else lambda x: x


def _saturate(value: np.ndarray) -> np.ndarray:
    return np.clip(np.where(np.isnan(value), 0, value), 0, 1)


def _float_to_integer(value: np.ndarray, dtype: type, rounded: Callable) -> np.ndarray:
    """Out of range gives the nearest bound, NaN zero, as on the hardware."""
    limits = np.iinfo(dtype)
    whole = rounded(np.where(np.isnan(value), 0, value).astype(np.float64))
    inside = np.clip(whole, float(limits.min), float(limits.max))
    # float64 has no 2^63 - 1: what reaches it is past the bound.
    top = whole >= float(limits.max)
    return np.where(top, limits.max, np.where(top, 0, inside).astype(dtype)).astype(dtype)


def _converter(instruction: Instruction, target: str, source: str) -> Callable:
    parts = instruction.parts
    decode = _float_of(source)
    source_is_float = source in (*FLOATS, "f16", "bf16")
    if target in (*INTEGERS, *_SMALL_INTEGERS):
        dtype = VIEWS[target]
        if source_is_float:
            rounded = next((_TO_INTEGER[p] for p in parts if p in _TO_INTEGER), None)
            if rounded is None:
                raise unknown(instruction, "conversion to an integer without a rounding")
            return lambda x: _float_to_integer(decode(x), dtype, rounded)
        if "sat" in parts:
            limits = np.iinfo(dtype)
            own = np.iinfo(VIEWS[source])
            low, high = max(limits.min, own.min), min(limits.max, own.max)
            return lambda x: np.clip(x, low, high).astype(dtype)
        return lambda x: x.astype(dtype)
    rounding = _rounding(instruction)
    to_whole = next((_TO_INTEGER[p] for p in parts if p in _TO_INTEGER), None)

    def convert(x: np.ndarray) -> np.ndarray:
        value = decode(x)
        if to_whole:
            value = to_whole(value)
        if "sat" in parts:
            value = _saturate(value)
        if "relu" in parts:
            value = np.maximum(value, 0)
        if target == "f64":
            return value.astype(np.float64)
        if target == "f32":
            exact = value.astype(np.float64)
            return f64_to_f32(exact, rounding) if rounding != "rn" else value.astype(np.float32)
        single = value.astype(np.float32)
        if target == "bf16":
            return f32_to_bf16(single, rounding)
        if rounding == "rz":
            half = single.astype(np.float16)
            past = np.abs(half.astype(np.float32)) > np.abs(single)
            return np.where(past, np.nextafter(half, np.float16(0)), half)
        if rounding != "rn":
            raise ValueError(f"float16 with rounding {rounding}")
        return value.astype(np.float16)

    return convert


def _convert_one(instruction: Instruction, registers: Registers, target: str, source: str) -> Run:
    into_bits, into = registers.loose(instruction.operands[0], target, writes=True)
    from_bits, row = registers.loose(instruction.operands[1], source)
    convert = _converter(instruction, target, source)
    read_as, write_as = f"b{from_bits}", f"b{into_bits}"
    narrow, wide = VIEWS[source], VIEWS[target]
    # A result in a wider register is extended as its type says.
    register_type = VIEWS[("s" if target[0] == "s" else "u") + str(into_bits)]
    is_exact = from_bits == 8 * narrow().itemsize

    def run(bank, mask):
        raw = bank.rows[source][row] if is_exact else _low_part(bank.rows[read_as][row], narrow)
        value = convert(raw)
        if value.dtype.kind == "f":
            value = value.view(VIEWS[f"b{8 * wide().itemsize}"])
        value = value.astype(register_type)
        put(bank.rows[write_as][into], value.view(VIEWS[write_as]), mask)

    return run


def _low_part(row: np.ndarray, dtype: type) -> np.ndarray:
    size = dtype().itemsize
    return np.ascontiguousarray(row).view(dtype)[:: row.dtype.itemsize // size]


def _convert_to_tf32(instruction: Instruction, registers: Registers) -> Run:
    into = registers.write(instruction.operands[0], "b32")
    source = registers.read(instruction.operands[1], "f32")
    rounding = _rounding(instruction, "rna")

    def run(bank, mask):
        put(bank.rows["b32"][into], f32_to_tf32(bank.rows["f32"][source], rounding), mask)

    return run


def _convert_pair(instruction: Instruction, registers: Registers, target: str, source: str) -> Run:
    """Two numbers at once. The first of two sources becomes the upper half."""
    parts, operands = instruction.parts, instruction.operands
    relu = "relu" in parts
    rounding = _rounding(instruction)
    if target in ("e4m3x2", "e5m2x2") and "satfinite" not in parts:
        raise unknown(instruction, "float8 without satfinite")
    small = target.removesuffix("x2")
    if source == "f32":
        sources = [registers.read(x, "f32") for x in operands[1:3]]
        if len(operands) != 3:
            raise unknown(instruction, "more than two numbers, or bits of noise")

        def values(bank):
            high, low = (bank.rows["f32"][s] for s in sources)
            return np.stack([low, high], 1)
    elif source in ("f16x2", "bf16x2"):
        only = registers.read(operands[1], source)

        def values(bank):
            return CODECS[source][0](bank.rows[source][only])
    else:
        only = registers.read(operands[1], "b16")
        kind = source.removesuffix("x2")

        def values(bank):
            pair = np.ascontiguousarray(bank.rows["b16"][only]).view(np.uint8).reshape(-1, 2)
            return float8_to_f32(pair, kind)

    view = "b16" if small in ("e4m3", "e5m2") else "b32"
    into = registers.write(operands[0], view)

    def run(bank, mask):
        pair = values(bank)
        if relu:
            pair = np.maximum(pair, 0)
        if small in ("e4m3", "e5m2"):
            halves = f32_to_float8(pair, small)
        elif small == "bf16":
            halves = f32_to_bf16(pair, rounding)
        else:
            halves = pair.astype(np.float16)
        joined = np.ascontiguousarray(halves).view(VIEWS[view])[:, 0]
        put(bank.rows[view][into], joined, mask)

    return run
