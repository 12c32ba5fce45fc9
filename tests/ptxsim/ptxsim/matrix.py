"""Products of one warp: mma.sync, and the loads and stores of 8 x 8 matrices."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from .errors import SimulationError
from .formats import bf16_to_f32, float8_to_f32
from .memory import Address
from .parse import Instruction
from .registers import VIEWS, Registers, put
from .steps import Run, opcode, unknown, vector
from .warp_ops import whole_warps

# Elements of a 32-bit register.
PER_REGISTER = {"bf16": 2, "f16": 2, "tf32": 1, "s8": 4, "u8": 4, "s4": 8, "u4": 8}
PER_REGISTER |= {"e4m3": 4, "e5m2": 4}
ELEMENT_BYTES = {kind: 4 / n for kind, n in PER_REGISTER.items()}
_SHAPE = re.compile(r"m(\d+)n(\d+)k(\d+)$")
# Where a thread of a warp stands in a fragment: its group of four and its place in it.
_GROUP, _PLACE = np.arange(32) // 4, np.arange(32) % 4


def shape_of(instruction: Instruction) -> tuple[int, int, int]:
    for part in instruction.parts:
        if match := _SHAPE.match(part):
            return int(match[1]), int(match[2]), int(match[3])
    raise SimulationError("no shape")


def elements(words: np.ndarray, kind: str) -> np.ndarray:
    """32-bit words [...] as float32 [..., elements]: exact for every type but f32 itself."""
    words = np.ascontiguousarray(words)
    shape = (*words.shape, PER_REGISTER[kind])
    if kind == "bf16":
        return bf16_to_f32(words.view(np.uint16).reshape(shape))
    if kind == "f16":
        return words.view(np.float16).reshape(shape).astype(np.float32)
    if kind in ("s8", "u8"):
        return words.view(VIEWS[kind]).reshape(shape).astype(np.float32)
    if kind in ("e4m3", "e5m2"):
        return float8_to_f32(words.view(np.uint8).reshape(shape), kind)
    if kind == "tf32":
        return (words & np.uint32(0xFFFFE000)).view(np.float32).reshape(shape)
    if kind in ("s4", "u4"):
        places = np.arange(8, dtype=np.uint32) * np.uint32(4)
        nibbles = ((words[..., None] >> places) & np.uint32(15)).astype(np.int32)
        return (nibbles - 16 * (nibbles > 7) if kind == "s4" else nibbles).astype(np.float32)
    raise SimulationError(f"elements of type {kind}")


def fragment_a(words: Sequence[np.ndarray], kind: str) -> np.ndarray:
    """[warps, 16, K] of A, whose registers alternate between rows g and g + 8."""
    parts = [elements(w, kind).reshape(-1, 8, 4 * PER_REGISTER[kind]) for w in words]
    halves = [np.concatenate(parts[k : k + 2], 1) for k in range(0, len(parts), 2)]
    return np.concatenate(halves, 2)


def fragment_b(words: Sequence[np.ndarray], kind: str) -> np.ndarray:
    """[warps, 8, K] of B, transposed."""
    parts = [elements(w, kind).reshape(-1, 8, 4 * PER_REGISTER[kind]) for w in words]
    return np.concatenate(parts, 2)


def accumulate(old: np.ndarray, product: np.ndarray, kind: str, saturates: bool) -> np.ndarray:
    if kind == "f32":
        return old + product
    # Sums of products of bytes are whole numbers that float32 holds exactly.
    exact = old.astype(np.int64) + product.astype(np.int64)
    if saturates:
        exact = np.clip(exact, -(2**31), 2**31 - 1)
    return exact.astype(np.int32)


@opcode("mma.sync")
def _mma(instruction: Instruction, registers: Registers) -> Run:
    m, n, k = shape_of(instruction)
    known = {*PER_REGISTER, "f32", "s32"}
    types = [p for p in instruction.parts if p in known]
    if (m, n) != (16, 8) or len(types) != 4 or types[3] not in ("f32", "s32"):
        raise unknown(instruction, f"shape or types {types}")
    out, type_a, type_b, _ = types
    targets, a, b, c = (vector(x) for x in instruction.operands[:4])
    if len(a) * PER_REGISTER[type_a] * 32 != m * k or len(b) * PER_REGISTER[type_b] * 32 != n * k:
        raise unknown(instruction, "this number of registers")
    into = [registers.write(x, out) for x in targets]
    rows_a, rows_b = ([registers.read(x, "b32") for x in y] for y in (a, b))
    rows_c = [registers.read(x, out) for x in c]
    saturates = "satfinite" in instruction.parts

    def run(bank: Any, mask: np.ndarray | None) -> None:
        whole_warps(instruction, bank, mask)
        words, numbers = bank.rows["b32"], bank.rows[out]
        left = fragment_a([words[r] for r in rows_a], type_a)
        right = fragment_b([words[r] for r in rows_b], type_b)
        product = np.matmul(left, right.swapaxes(1, 2))
        results = []
        for i, row in enumerate(rows_c):
            part = product[:, _GROUP + 8 * (i >> 1), 2 * _PLACE + (i & 1)].ravel()
            results.append(accumulate(numbers[row], part, out, saturates))
        for row, value in zip(into, results, strict=True):
            put(numbers[row], value, mask)

    return run


def _check_matrix(instruction: Instruction) -> tuple[int, bool]:
    """Number of matrices, and whether they are transposed."""
    parts = instruction.parts
    if "m8n8" not in parts or parts[-1] != "b16":
        raise unknown(instruction, "this shape")
    return next(int(p[1:]) for p in parts if p in ("x1", "x2", "x4")), "trans" in parts


def _row_lanes(whole: np.ndarray, count: int) -> np.ndarray:
    """The threads whose addresses count: the first 8 per matrix of every warp that is here."""
    return (np.flatnonzero(whole)[:, None] * 32 + np.arange(8 * count)).ravel()


def _count_conflicts(bank: Any, address: np.ndarray) -> None:
    """Rows of one matrix that lie in the same 16 bytes of the 32 banks, beyond the first."""
    rows = np.sort(address.reshape(-1, 8), 1)
    distinct = np.concatenate([np.ones((len(rows), 1), bool), rows[:, 1:] != rows[:, :-1]], 1)
    banks = np.where(distinct, (rows >> 4) & 7, -1)
    counts = (banks[:, :, None] == np.arange(8)).sum(1)
    bank.wave.count("matrices loaded", len(rows))
    bank.wave.count("ldmatrix bank conflicts", int(np.maximum(counts - 1, 0).sum()))


@opcode("ldmatrix")
def _ldmatrix(instruction: Instruction, registers: Registers) -> Run:
    count, transposed = _check_matrix(instruction)
    into = [registers.write(x, "b32") for x in vector(instruction.operands[0])]
    address = Address.parse(instruction.operands[1], registers)
    if len(into) != count:
        raise unknown(instruction, "this number of registers")

    def run(bank: Any, mask: np.ndarray | None) -> None:
        whole = whole_warps(instruction, bank, mask)
        lanes = _row_lanes(whole, count)
        where = address.of(bank, lanes)
        halves = bank.wave.shared.load(instruction, bank, lanes, where, 2, 8)
        _count_conflicts(bank, where)
        matrices = halves.reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        words = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, count, 32)
        for k, row in enumerate(into):
            target = bank.rows["u32"][row].reshape(-1, 32)
            target[whole] = words[:, k]

    return run


@opcode("stmatrix")
def _stmatrix(instruction: Instruction, registers: Registers) -> Run:
    count, transposed = _check_matrix(instruction)
    address = Address.parse(instruction.operands[0], registers)
    sources = [registers.read(x, "b32") for x in vector(instruction.operands[1])]

    def run(bank: Any, mask: np.ndarray | None) -> None:
        whole = whole_warps(instruction, bank, mask)
        lanes = _row_lanes(whole, count)
        words = np.stack([bank.rows["u32"][r].reshape(-1, 32)[whole] for r in sources], 1)
        matrices = words.view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        values = np.ascontiguousarray(matrices).reshape(-1, 8)
        where = address.of(bank, lanes)
        bank.wave.shared.store(instruction, bank, lanes, where, values)

    return run
