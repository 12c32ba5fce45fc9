"""Moves of bits: logic, shifts, fields, permutes, counts; mov and address conversions."""

from __future__ import annotations

import numpy as np

from .arithmetic import apply
from .errors import SimulationError
from .parse import Instruction
from .registers import (
    LOCAL_WINDOW,
    PARAM_WINDOW,
    SHARED_WINDOW,
    UNSIGNED,
    VIEWS,
    Registers,
    put,
)
from .steps import Run, kind_of, opcode, unknown, vector

_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}
_BITS = ("pred", "b16", "b32", "b64")


@opcode("and", "or", "xor", "not")
def _logic(instruction: Instruction, registers: Registers) -> Run:
    kind = kind_of(instruction, _BITS)
    into = registers.write(instruction.operands[0], kind)
    sources = [registers.read(x, kind) for x in instruction.operands[1:]]
    return apply(_LOGIC[instruction.parts[0]], kind, into, sources)


@opcode("cnot")
def _cnot(instruction: Instruction, registers: Registers) -> Run:
    kind = kind_of(instruction, _BITS)
    into = registers.write(instruction.operands[0], kind)
    source = registers.read(instruction.operands[1], kind)
    return apply(lambda x: (x == 0).astype(x.dtype), kind, into, [source])


@opcode("shl", "shr")
def _shift(instruction: Instruction, registers: Registers) -> Run:
    """Counts at or past the width give zero, or the sign."""
    kind = kind_of(instruction, VIEWS)
    into = registers.write(instruction.operands[0], kind)
    source = registers.read(instruction.operands[1], kind)
    count = registers.read(instruction.operands[2], "u32")
    dtype = VIEWS[kind]
    width = 8 * dtype().itemsize
    is_left = instruction.parts[0] == "shl"
    shift = np.left_shift if is_left else np.right_shift

    def run(bank, mask):
        value, by = bank.rows[kind][source], bank.rows["u32"][count]
        result = shift(value, np.minimum(by, width - 1).astype(dtype))
        past = by >= width
        if (is_left or kind[0] != "s") and past.any():
            result = np.where(past, dtype(0), result)
        put(bank.rows[kind][into], result, mask)

    return run


@opcode("shf")
def _funnel(instruction: Instruction, registers: Registers) -> Run:
    into = registers.write(instruction.operands[0], "b32")
    low, high, count = (registers.read(x, "u32") for x in instruction.operands[1:4])
    is_left, wraps = "l" in instruction.parts, "wrap" in instruction.parts

    def run(bank, mask):
        rows = bank.rows["u32"]
        by = (rows[count] & np.uint32(31)) if wraps else np.minimum(rows[count], 32)
        both = rows[low].astype(np.uint64) | (rows[high].astype(np.uint64) << np.uint64(32))
        by = by.astype(np.uint64)
        value = (both << by) >> np.uint64(32) if is_left else both >> by
        put(rows[into], value.astype(np.uint32), mask)

    return run


@opcode("bfe")
def _extract(instruction: Instruction, registers: Registers) -> Run:
    kind = kind_of(instruction, ("s32", "u32", "s64", "u64"))
    bits = int(kind[1:])
    into = registers.write(instruction.operands[0], kind)
    source = registers.read(instruction.operands[1], kind)
    first, length = (registers.read(x, "u32") for x in instruction.operands[2:4])

    def run(bank, mask):
        start = (bank.rows["u32"][first] & np.uint32(255)).astype(np.int64)
        size = (bank.rows["u32"][length] & np.uint32(255)).astype(np.int64)
        value = bank.rows[kind][source]
        # To the top, then down again: the arithmetic shift of signed types extends the sign.
        past = (start >= bits) & (size > 0)
        size = np.where(start + size > bits, np.maximum(bits - start, 0), size)
        up = np.clip(bits - start - size, 0, bits - 1).astype(value.dtype)
        down = np.clip(bits - size, 0, bits - 1).astype(value.dtype)
        result = np.where(size == 0, value.dtype.type(0), (value << up) >> down)
        if kind[0] == "s":
            result = np.where(past, value >> value.dtype.type(bits - 1), result)
        put(bank.rows[kind][into], result, mask)

    return run


@opcode("bfi")
def _insert(instruction: Instruction, registers: Registers) -> Run:
    kind = kind_of(instruction, ("b32", "b64"))
    dtype = VIEWS[kind]
    bits = int(kind[1:])
    into = registers.write(instruction.operands[0], kind)
    source, base = (registers.read(x, kind) for x in instruction.operands[1:3])
    first, length = (registers.read(x, "u32") for x in instruction.operands[3:5])

    def run(bank, mask):
        start = np.minimum(bank.rows["u32"][first] & np.uint32(255), bits).astype(np.uint64)
        size = np.minimum(bank.rows["u32"][length] & np.uint32(255), bits).astype(np.uint64)
        ones = np.where(
            size >= 64,
            np.uint64(0xFFFFFFFFFFFFFFFF),
            (np.uint64(1) << np.minimum(size, 63).astype(np.uint64)) - np.uint64(1),
        )
        ones = np.where(start >= 64, np.uint64(0), ones << np.minimum(start, np.uint64(63)))
        field = bank.rows[kind][source].astype(np.uint64) << np.minimum(start, np.uint64(63))
        kept = bank.rows[kind][base].astype(np.uint64)
        put(bank.rows[kind][into], ((kept & ~ones) | (field & ones)).astype(dtype), mask)

    return run


@opcode("prmt")
def _permute(instruction: Instruction, registers: Registers) -> Run:
    """Picks four of eight bytes; bit 3 of a selector spreads the byte's sign."""
    if instruction.parts[1:] != ["b32"]:
        raise unknown(instruction, "modes of prmt")
    into = registers.write(instruction.operands[0], "b32")
    low, high, selector = (registers.read(x, "u32") for x in instruction.operands[1:4])
    places = np.arange(4, dtype=np.uint32) * np.uint32(4)

    def run(bank, mask):
        rows = bank.rows["u32"]
        pair = np.stack([rows[low], rows[high]], 1).view(np.uint8)
        picks = (rows[selector][:, None] >> places) & np.uint32(15)
        chosen = np.take_along_axis(pair, (picks & np.uint32(7)).astype(np.intp), 1)
        signs = np.where(chosen & np.uint8(128), np.uint8(255), np.uint8(0))
        chosen = np.where(picks & np.uint32(8), signs, chosen)
        put(rows[into], np.ascontiguousarray(chosen).view(np.uint32)[:, 0], mask)

    return run


@opcode("lop3")
def _lop3(instruction: Instruction, registers: Registers) -> Run:
    """Any logic of three inputs, by its table."""
    into = registers.write(instruction.operands[0], "b32")
    sources = [registers.read(x, "b32") for x in instruction.operands[1:4]]
    table = int(instruction.operands[4], 0)

    def function(x, y, z):
        result = np.zeros_like(x)
        for k in range(8):
            if table >> k & 1:
                term = (x if k & 4 else ~x) & (y if k & 2 else ~y) & (z if k & 1 else ~z)
                result |= term
        return result

    return apply(function, "b32", into, sources)


def _leading_zeros(x: np.ndarray) -> np.ndarray:
    count = np.full(x.shape, 8 * x.dtype.itemsize, np.uint32)
    value = x.copy()
    while (value != 0).any():
        count -= (value != 0).astype(np.uint32)
        value >>= x.dtype.type(1)
    return count


def _reversed(x: np.ndarray) -> np.ndarray:
    by_byte = np.ascontiguousarray(x).view(np.uint8).reshape(len(x), -1)
    bits = np.unpackbits(by_byte, axis=1)[:, ::-1]
    return np.packbits(bits, axis=1).view(x.dtype)[:, 0]


@opcode("popc", "clz", "bfind")
def _count(instruction: Instruction, registers: Registers) -> Run:
    kind = kind_of(instruction, ("b32", "b64", "u32", "u64"))
    into = registers.write(instruction.operands[0], "u32")
    source = registers.read(instruction.operands[1], kind)
    name = instruction.parts[0]
    if "shiftamt" in instruction.parts:
        raise unknown(instruction, "shiftamt")

    def run(bank, mask):
        value = bank.rows[kind][source]
        if name == "popc":
            result = np.bitwise_count(value).astype(np.uint32)
        elif name == "clz":
            result = _leading_zeros(value)
        else:
            result = np.uint32(8 * value.dtype.itemsize - 1) - _leading_zeros(value)
        put(bank.rows["u32"][into], result, mask)

    return run


@opcode("brev")
def _brev(instruction: Instruction, registers: Registers) -> Run:
    kind = kind_of(instruction, ("b32", "b64"))
    into = registers.write(instruction.operands[0], kind)
    source = registers.read(instruction.operands[1], kind)
    return apply(_reversed, kind, into, [source])


@opcode("mov")
def _mov(instruction: Instruction, registers: Registers) -> Run:
    kind = kind_of(instruction, {**VIEWS, "pred": None})
    target, source = instruction.operands
    if target.startswith("{"):
        return _unpack(registers, vector(target), source, kind)
    if source.startswith("{"):
        return _pack(registers, target, vector(source), kind)
    into, row = registers.write(target, kind), registers.read(source, kind)

    def run(bank, mask):
        rows = bank.rows[kind]
        put(rows[into], rows[row], mask)

    return run


def _part_bits(kind: str, count: int) -> int:
    bits = 8 * VIEWS[kind]().itemsize // count
    if bits not in (16, 32):
        raise SimulationError(f"vectors of {bits} bits")
    return bits


def _unpack(registers: Registers, targets: list[str], source: str, kind: str) -> Run:
    bits = _part_bits(kind, len(targets))
    row = registers.read(source, kind)
    into = [registers.write(x, f"b{bits}") for x in targets]

    def run(bank, mask):
        parts = np.ascontiguousarray(bank.rows[kind][row]).view(UNSIGNED[bits // 8])
        for k, target in enumerate(into):
            put(bank.rows[f"b{bits}"][target], parts[k :: len(into)], mask)

    return run


def _pack(registers: Registers, target: str, sources: list[str], kind: str) -> Run:
    bits = _part_bits(kind, len(sources))
    into = registers.write(target, kind)
    rows_read = [registers.read(x, f"b{bits}") for x in sources]
    dtype = VIEWS[kind]

    def run(bank, mask):
        rows = bank.rows[f"b{bits}"]
        joined = np.stack([rows[r] for r in rows_read], 1).view(dtype)[:, 0]
        put(bank.rows[kind][into], joined, mask)

    return run


@opcode("cvta")
def _convert_address(instruction: Instruction, registers: Registers) -> Run:
    """Generic addresses are host addresses; other spaces are windows far above them."""
    windows = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}
    space = next(p.split("::")[0] for p in instruction.parts[1:] if p != "to")
    window = windows.get(space, 0)
    if space not in (*windows, "global", "const"):
        raise unknown(instruction, f"space {space}")
    into = registers.write(instruction.operands[0], "u64")
    row = registers.read(instruction.operands[1], "u64")
    if space == "param":
        window = 0  # parameter addresses carry their window from the start
    move = np.uint64(window)
    function = np.subtract if "to" in instruction.parts else np.add
    return apply(lambda x: function(x, move), "u64", into, [row])


@opcode("isspacep")
def _is_space(instruction: Instruction, registers: Registers) -> Run:
    space = instruction.parts[1].split("::")[0]
    bounds = {
        "global": (0, SHARED_WINDOW),
        "shared": (SHARED_WINDOW, PARAM_WINDOW),
        "param": (PARAM_WINDOW, LOCAL_WINDOW),
        "local": (LOCAL_WINDOW, 1 << 63),
    }
    low, high = bounds[space]
    into = registers.write(instruction.operands[0], "pred")
    row = registers.read(instruction.operands[1], "u64")

    def run(bank, mask):
        address = bank.rows["u64"][row]
        put(bank.rows["pred"][into], (address >= low) & (address < high), mask)

    return run
