"""wgmma: products of warpgroups, asynchronous until they are waited for.

The numbers are computed at once; what is checked is that nobody touches the registers or the shared
memory of a product before its group was waited for, and that `wgmma.fence` stands between ordinary
writes of registers and the product that takes them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import Diverged, SimulationError, fault
from .matrix import ELEMENT_BYTES, accumulate, elements, fragment_a, shape_of
from .parse import Instruction
from .registers import Registers
from .steps import Run, Step, opcode, unknown, vector
from .warp_ops import whole_warps

Rows = frozenset[tuple[int, int]]
# Width of a swizzle's rows, and which bits of the row number move the 16-byte chunk, by the
# descriptor's two highest bits.
_WIDTH = {0: 16, 1: 128, 2: 64, 3: 32}
_CHUNKS = {0: 0, 1: 7, 2: 3, 3: 1}


@dataclass
class Product:
    """One wgmma.mma_async in flight."""

    accumulators: Rows
    inputs: Rows
    tiles: list[np.ndarray]  # granules of shared memory


@dataclass
class Warpgroup:
    """What a warpgroup has in flight: products not committed, and committed groups."""

    open: list[Product] = field(default_factory=list)
    groups: list[list[Product]] = field(default_factory=list)
    accumulators: Rows = frozenset()
    inputs: Rows = frozenset()
    dirty: set[tuple[int, int]] = field(default_factory=set)
    is_fenced: bool = False

    def refresh(self) -> None:
        products = [p for group in [self.open, *self.groups] for p in group]
        self.accumulators = frozenset().union(*(p.accumulators for p in products))
        self.inputs = frozenset().union(*(p.inputs for p in products))


@dataclass(frozen=True)
class Descriptor:
    """A matrix in shared memory, as the 64 bits of a wgmma operand say it."""

    start: int
    leading: int
    stride: int
    swizzle: int

    @classmethod
    def decode(cls, bits: int) -> Descriptor:
        if bits >> 49 & 7:
            raise SimulationError("descriptors with a base offset")
        fields = (bits & 0x3FFF, bits >> 16 & 0x3FFF, bits >> 32 & 0x3FFF)
        return cls(*(f << 4 for f in fields), swizzle=bits >> 62 & 3)

    def addresses(self, rows: int, depth: int, size: int, transposed: bool) -> np.ndarray:
        """[rows, depth] byte addresses of elements of `size` bytes.

        `depth` runs along K. Not transposed: K is contiguous (K-major); else the rows are.
        """
        row, k = np.arange(rows)[:, None], np.arange(depth)[None, :]
        width = _WIDTH[self.swizzle]
        if not transposed:
            byte = k * size
            inside = (row // 8) * self.stride + (row % 8) * width
            if self.swizzle:
                inside = inside + byte
            else:
                inside = inside + (byte // 16) * self.leading + byte % 16
        else:
            byte = row * size
            if self.swizzle:
                inside = (byte // width) * self.leading + byte % width
                inside = inside + (k // 8) * self.stride + (k % 8) * width
            else:
                inside = (byte // 16) * self.stride + byte % 16
                inside = inside + (k // 8) * self.leading + (k % 8) * 16
        address = self.start + inside
        return address ^ ((_CHUNKS[self.swizzle] & (address >> 7)) << 4)


def _tile(instruction, wave, base, group, bits, rows, depth, kind, transposed):
    """([rows, depth] float32, granules) of the matrix behind a descriptor."""
    size = int(ELEMENT_BYTES[kind])
    key = (bits, rows, depth, size, transposed)
    if key not in wave.tiles:
        descriptor = Descriptor.decode(bits)
        wave.tiles[key] = descriptor.addresses(rows, depth, size, transposed)
    address = wave.tiles[key]
    shared = wave.shared
    flat = shared.flat(instruction, address.ravel(), base, size)
    granules = np.zeros(0, np.int64)
    if shared.hazards:
        hazards = shared.hazards
        granules = np.unique(hazards.granules(flat, size)[0])
        agents = wave.agent[group * 128 : (group + 1) * 128 : 32]
        hazards.read(
            instruction,
            np.tile(granules * hazards.granule, len(agents)),
            hazards.granule,
            np.repeat(agents, len(granules)),
            by_async_proxy=True,
        )
    raw = shared.views[size][flat // size].reshape(rows, depth)
    if kind == "tf32":
        return elements(raw, kind)[..., 0], granules
    return elements(raw.view(np.uint32), kind).reshape(rows, depth), granules


def active_groups(instruction: Instruction, bank: Any, mask: np.ndarray | None) -> list[int]:
    """Numbers of the warpgroups of the batch that are here, each with all its warps."""
    whole = whole_warps(instruction, bank, mask)
    warps = np.flatnonzero(whole) + bank.first // 32
    groups, counts = np.unique(warps // 4, return_counts=True)
    if (counts != 4).any():
        raise Diverged(fault(instruction, "only a part of a warpgroup is here"))
    return groups.tolist()


@opcode("wgmma.mma_async")
def _mma_async(instruction: Instruction, registers: Registers) -> Run:
    parts, operands = instruction.parts, instruction.operands
    _, n, depth = shape_of(instruction)
    out, type_a, type_b = parts[5:8]
    if "sp" in parts or out not in ("f32", "s32"):
        raise unknown(instruction, "sparse products, or sums of float16")
    into = [registers.write(x, out) for x in vector(operands[0])]
    from_registers = operands[1].startswith("{")
    left = [registers.read(x, "b32") for x in vector(operands[1])] if from_registers else []
    descriptor_a = -1 if from_registers else registers.read(operands[1], "b64")
    descriptor_b = registers.read(operands[2], "b64")
    keeps = registers.read(operands[3], "pred")
    numbers = [int(x, 0) for x in operands[4:]]
    sign = numbers[0] * numbers[1] if len(numbers) >= 2 else 1
    major = numbers[2:]
    transposed_b = bool(major[-1]) if major else False
    transposed_a = bool(major[0]) if len(major) == 2 else False
    if len(into) != n // 2:
        raise unknown(instruction, "this number of registers")
    saturates = "satfinite" in parts
    accumulators = frozenset((32, row) for row in into)
    inputs = frozenset((32, row) for row in left)

    def run(bank: Any, mask: np.ndarray | None) -> None:
        wave = bank.wave
        for group in active_groups(instruction, bank, mask):
            state = wave.warpgroup(group)
            threads = slice(group * 128 - bank.first, (group + 1) * 128 - bank.first)
            keep = bank.rows["pred"][keeps][threads]
            _check_registers(instruction, state, accumulators, inputs, bool(keep.any()))
            base = int(wave.shared_base[group * 128])

            def bits_of(row: int, threads: slice = threads) -> int:
                values = bank.rows["u64"][row][threads]
                if (values != values[0]).any():
                    raise fault(instruction, "the descriptor differs within the warpgroup")
                return int(values[0])

            tile = (instruction, wave, base, group)
            tiles = []
            if from_registers:
                words = [bank.rows["b32"][row][threads] for row in left]
                a = fragment_a(words, type_a).reshape(64, depth)
            else:
                bits = bits_of(descriptor_a)
                a, used = _tile(*tile, bits, 64, depth, type_a, transposed_a)
                tiles.append(used)
            b, used = _tile(*tile, bits_of(descriptor_b), n, depth, type_b, transposed_b)
            tiles.append(used)
            product = np.matmul(a, b.T) * np.float32(sign)
            # [warp, half, g, column group, place, pair] to a row per register.
            order = product.reshape(4, 2, 8, n // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4)
            for row, value in zip(into, order.reshape(n // 2, 128), strict=True):
                target = bank.rows[out][row][threads]
                old = np.where(keep, target, target.dtype.type(0))
                target[...] = accumulate(old, value, out, saturates)
            if wave.shared.hazards:
                for used in tiles:
                    wave.shared.hazards.start_use(used)
            state.open.append(Product(accumulators, inputs, tiles))
            state.refresh()

    return run


def _check_registers(instruction, state, accumulators, inputs, keeps: bool) -> None:
    if not state.is_fenced:
        raise fault(instruction, "wgmma without wgmma.fence before it")
    unfenced = state.dirty & (inputs | (accumulators if keeps else frozenset()))
    if unfenced:
        raise fault(
            instruction,
            f"{len(unfenced)} registers of this wgmma were written without wgmma.fence after",
        )
    if inputs & state.accumulators:
        raise fault(instruction, "A is the result of a wgmma in flight")
    if accumulators & state.inputs:
        raise fault(instruction, "the result overwrites A of a wgmma in flight")
    partly = [
        p
        for group in [state.open, *state.groups]
        for p in group
        if p.accumulators & accumulators and p.accumulators != accumulators
    ]
    if partly:
        raise fault(instruction, "two wgmma in flight share a part of their results")


def note_registers(step: Step, bank: Any, mask: np.ndarray | None) -> None:
    """Called before any other step that names registers of a wgmma."""
    wave = bank.wave
    if not wave.warpgroups:
        return
    active = np.ones(bank.size // 32, bool) if mask is None else mask.reshape(-1, 32).any(1)
    for group in np.unique((np.flatnonzero(active) + bank.first // 32) // 4).tolist():
        state = wave.warpgroup(group)
        if not step.watched.isdisjoint(state.accumulators):
            raise fault(
                step.instruction,
                "use of the result of a wgmma in flight (no wgmma.wait_group since)",
            )
        if not step.overwritten.isdisjoint(state.inputs):
            raise fault(step.instruction, "write to a register that a wgmma in flight reads as A")
        # Compilers put copies of operands behind the fence, which become nothing in machine code.
        if step.instruction.parts[0] != "mov":
            state.dirty |= step.overwritten


@opcode("wgmma.fence")
def _fence(instruction: Instruction, registers: Registers) -> Run:
    def run(bank: Any, mask: np.ndarray | None) -> None:
        for group in active_groups(instruction, bank, mask):
            state = bank.wave.warpgroup(group)
            state.is_fenced = True
            state.dirty.clear()

    return run


@opcode("wgmma.commit_group")
def _commit(instruction: Instruction, registers: Registers) -> Run:
    def run(bank: Any, mask: np.ndarray | None) -> None:
        for group in active_groups(instruction, bank, mask):
            state = bank.wave.warpgroup(group)
            state.groups.append(state.open)
            state.open = []

    return run


@opcode("wgmma.wait_group")
def _wait(instruction: Instruction, registers: Registers) -> Run:
    allowed = int(instruction.operands[0], 0)

    def run(bank: Any, mask: np.ndarray | None) -> None:
        wave = bank.wave
        for group in active_groups(instruction, bank, mask):
            state = wave.warpgroup(group)
            agents = wave.agent[group * 128 : (group + 1) * 128 : 32]
            while len(state.groups) > allowed:
                for product in state.groups.pop(0):
                    for tile in product.tiles:
                        if wave.shared.hazards:
                            wave.shared.hazards.finish_use(tile, agents)
            state.refresh()

    return run
