"""Bulk copies: boxes of tensors (TMA) and plain rows of bytes, both ways."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import SimulationError, fault
from .memory import Address, lanes_of
from .parse import Instruction, split_operands
from .registers import Registers
from .steps import Run, opcode, unknown, vector

MAGIC = b"PMTENSOR"
_RECORD = struct.Struct("<8sii q 5q 4q 5i i 8x")
_ALIGN = {0: 128, 32: 256, 64: 512, 128: 1024}


@dataclass(frozen=True)
class TensorMap:
    """What the simulator reads instead of a CUtensorMap.

    It is a record of 128 bytes: magic, int32 rank, int32 element bytes, int64 address, int64
    dims[5], int64 strides_bytes[4] (of the dims from the second on), int32 box[5], int32 swizzle,
    8 bytes of nothing. The first dim is the contiguous one.
    """

    address: int
    element_bytes: int
    dims: tuple[int, ...]
    strides_bytes: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int = 0

    @classmethod
    def of(cls, array: np.ndarray, box: tuple[int, ...], swizzle: int = 0) -> TensorMap:
        """A whole array, its axes from the last to the first; `box` in the array's order."""
        strides = tuple(reversed(array.strides[:-1]))
        dims = tuple(reversed(array.shape))
        return cls(array.ctypes.data, array.itemsize, dims, strides, tuple(reversed(box)), swizzle)

    def to_bytes(self) -> bytes:
        rank = len(self.dims)
        dims = (*self.dims, *[1] * (5 - rank))
        strides = (*self.strides_bytes, *[0] * (5 - rank))
        box = (*self.box, *[1] * (5 - rank))
        head = (MAGIC, rank, self.element_bytes, self.address)
        return _RECORD.pack(*head, *dims, *strides, *box, self.swizzle)

    @classmethod
    def from_bytes(cls, data: bytes) -> TensorMap:
        magic, rank, size, address, *rest = _RECORD.unpack(data)
        if magic != MAGIC:
            raise SimulationError(f"no tensor map here: {data[:8]!r}")
        dims, strides, box = rest[:5], rest[5:9], rest[9:14]
        found = cls(
            address, size, tuple(dims[:rank]), tuple(strides[: rank - 1]), tuple(box[:rank]),
            rest[14],
        )  # fmt: skip
        why = found.why_not()
        if why:
            raise SimulationError(f"tensor map: {why}")
        return found

    def why_not(self) -> str | None:
        """What cuTensorMapEncodeTiled would refuse."""
        if self.swizzle not in _ALIGN:
            return f"swizzle {self.swizzle}"
        if self.address % 16:
            return "address not a multiple of 16"
        if any(s % 16 or s >= 1 << 40 for s in self.strides_bytes):
            return f"strides {self.strides_bytes}: multiples of 16"
        if any(not 1 <= b <= 256 for b in self.box):
            return f"box {self.box}: 1 to 256"
        if any(not 1 <= d <= 1 << 32 for d in self.dims):
            return f"dims {self.dims}"
        width = self.box[0] * self.element_bytes
        if width % 16:
            return f"box rows of {width} bytes: multiples of 16"
        if self.swizzle and width != self.swizzle:
            return f"box rows of {width} bytes under a swizzle of {self.swizzle}"
        return None

    @property
    def box_bytes(self) -> int:
        return int(np.prod(self.box)) * self.element_bytes

    def places(self) -> np.ndarray:
        """Offsets in shared memory of the box's elements, before the swizzle."""
        return np.arange(int(np.prod(self.box)), dtype=np.int64) * self.element_bytes

    def elements(self, corner: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """(global addresses, whether inside the tensor) of the box's elements at a corner."""
        address = np.array([self.address], np.int64)
        inside = np.array([True])
        strides = (self.element_bytes, *self.strides_bytes)
        for dim, stride, length, first in zip(self.dims, strides, self.box, corner, strict=True):
            at = first + np.arange(length, dtype=np.int64)
            address = (at[:, None] * stride + address).ravel()
            inside = (((at >= 0) & (at < dim))[:, None] & inside).ravel()
        return address, inside

    def swizzled(self, address: np.ndarray) -> np.ndarray:
        rows = {0: 0, 32: 1, 64: 3, 128: 7}[self.swizzle]
        return address ^ ((rows & (address >> 7)) << 4)


@dataclass
class BulkGroups:
    """Bulk stores of one thread: granules that are still read, by commit group."""

    open: list[np.ndarray] = field(default_factory=list)
    groups: list[list[np.ndarray]] = field(default_factory=list)


def _box(text: str, registers: Registers) -> tuple[Address, list[int]]:
    base, coordinates = split_operands(text.strip()[1:-1])
    rows = [registers.read(x, "s32") for x in vector(coordinates)]
    return Address.parse(f"[{base}]", registers), rows


def granules_of(wave: Any, flat: np.ndarray, size: int) -> np.ndarray:
    """Distinct granules of elements of `size` bytes."""
    hazards = wave.shared.hazards
    return np.unique(hazards.granules(flat, size)[0]) if hazards else np.zeros(0, np.int64)


def _land_later(instruction, wave, flat, values, granules, barrier, block, number) -> None:
    """Puts the bytes of a copy in place when somebody has to wait for it."""

    def land() -> None:
        wave.shared.views[values.itemsize][flat // values.itemsize] = values
        moment = 0
        if wave.shared.hazards:
            moment = wave.shared.hazards.finish_bulk_copy(granules, block)
        wave.mbarriers.complete(instruction, barrier, number, moment)

    if wave.eager:
        land()
    else:
        wave.events.append(land)


def _begin(instruction, wave, flat, size, agent) -> np.ndarray:
    granules = granules_of(wave, flat, size)
    hazards = wave.shared.hazards
    if hazards:
        agents = np.full(len(granules), agent)
        hazards.start_copy(instruction, granules * hazards.granule, hazards.granule, agents)
    return granules


def _barrier(instruction, wave, address: int, base: int) -> int:
    flat = int(wave.shared.flat(instruction, np.array([address]), base, 8)[0])
    if not wave.mbarriers.find(instruction, flat).fenced:
        raise fault(
            instruction,
            "the mbarrier was initialised without a fence (fence.mbarrier_init or "
            "fence.proxy.async) that bulk copies see",
        )
    return flat


def _read_from(instruction, wave, granules, agent) -> None:
    hazards = wave.shared.hazards
    if hazards:
        hazards.read(
            instruction,
            granules * hazards.granule,
            hazards.granule,
            np.full(len(granules), agent),
            by_async_proxy=True,
        )
        hazards.start_use(granules)


@opcode("cp.async.bulk.tensor")
def _tensor(instruction: Instruction, registers: Registers) -> Run:
    parts, operands = instruction.parts, instruction.operands
    rank = int(re.fullmatch(r"(\d)d", parts[4]).group(1))
    rest = set(parts[5:])
    refused = rest & {"im2col", "multicast::cluster", "tile::gather4", "tile::scatter4"}
    if refused or any(p.startswith(("cta_group", "im2col")) for p in rest):
        raise unknown(instruction, "anything but tiles of one block")
    is_load = parts[5].startswith("shared")
    box, corner = _box(operands[1] if is_load else operands[0], registers)
    if len(corner) != rank:
        raise unknown(instruction, f"{len(corner)} coordinates")
    where = Address.parse(operands[0] if is_load else operands[1], registers)
    barrier = Address.parse(operands[2], registers) if is_load else None

    def run(bank: Any, mask: np.ndarray | None) -> None:
        wave, lanes = bank.wave, lanes_of(mask)
        threads = np.arange(bank.size)[lanes]
        maps, places = box.of(bank, lanes), where.of(bank, lanes)
        barriers = barrier.of(bank, lanes) if barrier else places
        for t, at, place, bar in zip(threads, maps, places, barriers, strict=True):
            tensor = wave.tensor_map(instruction, int(at))
            if len(tensor.dims) != rank:
                raise fault(instruction, f"the tensor map has {len(tensor.dims)} dims")
            base, agent = int(bank.shared_base[t]), int(bank.agent[t])
            if place % _ALIGN[tensor.swizzle]:
                raise fault(
                    instruction,
                    f"shared address {place % 1024} (mod 1024) under a swizzle of "
                    f"{tensor.swizzle}: multiples of {_ALIGN[tensor.swizzle]}",
                )
            address, inside = tensor.elements([int(bank.rows["s32"][c][t]) for c in corner])
            inner = tensor.swizzled(place + tensor.places())
            size = tensor.element_bytes
            flat = wave.shared.flat(instruction, inner, base, size)
            if is_load:
                target = _barrier(instruction, wave, int(bar), base)
                granules = _begin(instruction, wave, flat, size, agent)
                values = np.zeros(len(flat), wave.shared.views[size].dtype)
                values[inside] = wave.memory.load(instruction, address[inside], size, 1)[:, 0]
                block = agent // wave.agents
                _land_later(
                    *(instruction, wave, flat, values, granules, target, block),
                    tensor.box_bytes,
                )
            else:
                granules = granules_of(wave, flat, size)
                _read_from(instruction, wave, granules, agent)
                values = wave.shared.views[size][flat // size]
                wave.memory.store(instruction, address[inside], values[inside][:, None])
                wave.bulk(bank.first + int(t)).open.append(granules)

    return run


@opcode("cp.async.bulk")
def _rows(instruction: Instruction, registers: Registers) -> Run:
    """A row of bytes, without a tensor map."""
    parts, operands = instruction.parts, instruction.operands
    if "multicast::cluster" in parts or "cp_mask" in parts:
        raise unknown(instruction, "multicast or masked bytes")
    is_load = parts[3].startswith("shared") and parts[4] == "global"
    if not is_load and parts[3:5] != ["global", "shared::cta"]:
        raise unknown(instruction, "this direction")
    target, source = (Address.parse(x, registers) for x in operands[:2])
    length = registers.read(operands[2], "u32")
    barrier = Address.parse(operands[3], registers) if is_load else None

    def run(bank: Any, mask: np.ndarray | None) -> None:
        wave, lanes = bank.wave, lanes_of(mask)
        threads = np.arange(bank.size)[lanes]
        to, origin = target.of(bank, lanes), source.of(bank, lanes)
        sizes = bank.rows["u32"][length][lanes].astype(np.int64)
        barriers = barrier.of(bank, lanes) if barrier else to
        for t, a, b, n, bar in zip(threads, to, origin, sizes, barriers, strict=True):
            if n % 16 or a % 16 or b % 16:
                raise fault(instruction, "bulk copies go by 16 bytes, aligned")
            base, agent = int(bank.shared_base[t]), int(bank.agent[t])
            step = np.arange(0, n, 8)
            flat = wave.shared.flat(instruction, (a if is_load else b) + step, base, 8)
            if is_load:
                place = _barrier(instruction, wave, int(bar), base)
                granules = _begin(instruction, wave, flat, 8, agent)
                values = wave.memory.load(instruction, b + step, 8, 1)[:, 0]
                block = agent // wave.agents
                _land_later(instruction, wave, flat, values, granules, place, block, int(n))
            else:
                granules = granules_of(wave, flat, 8)
                _read_from(instruction, wave, granules, agent)
                values = wave.shared.views[8][flat // 8]
                wave.memory.store(instruction, a + step, values[:, None])
                wave.bulk(bank.first + int(t)).open.append(granules)

    return run


@opcode("cp.async.bulk.prefetch")
def _prefetch(instruction: Instruction, registers: Registers) -> Run:
    return lambda bank, mask: None


@opcode("cp.async.bulk.commit_group")
def _commit(instruction: Instruction, registers: Registers) -> Run:
    def run(bank: Any, mask: np.ndarray | None) -> None:
        for t in np.arange(bank.first, bank.last)[lanes_of(mask)].tolist():
            state = bank.wave.bulk(t)
            state.groups.append(state.open)
            state.open = []

    return run


@opcode("cp.async.bulk.wait_group")
def _wait(instruction: Instruction, registers: Registers) -> Run:
    """With `.read` only the shared memory is free again; stores are in global memory at once."""
    allowed = int(instruction.operands[0], 0)

    def run(bank: Any, mask: np.ndarray | None) -> None:
        wave = bank.wave
        for t in np.arange(bank.first, bank.last)[lanes_of(mask)].tolist():
            state = wave.bulk(t)
            while len(state.groups) > allowed:
                for granules in state.groups.pop(0):
                    if wave.shared.hazards:
                        agent = wave.agent[t : t + 1]
                        wave.shared.hazards.finish_use(granules, agent)

    return run
