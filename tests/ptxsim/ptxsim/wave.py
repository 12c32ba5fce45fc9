"""State of the blocks that run together: registers, memories and what is under way."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .async_copy import AsyncCopies
from .errors import SimulationError, fault
from .hazards import Hazards
from .mbarrier import Barriers
from .memory import GlobalMemory
from .parse import FIRST_SHARED_BYTE, Instruction
from .registers import PARAM_WINDOW, UNSIGNED, Files, Registers
from .shared import SharedMemory, stride_of
from .steps import Step
from .tma import BulkGroups, TensorMap
from .wgmma import Warpgroup


class Bank:
    """A range of whole warps: the rows of their registers, and who they are."""

    def __init__(self, wave: Wave, first: int, last: int) -> None:
        self.wave, self.first, self.last, self.size = wave, first, last, last - first
        self.rows = wave.files.rows(first, last)
        self.agent = wave.agent[first:last]
        self.shared_base = wave.shared_base[first:last]


@dataclass(frozen=True)
class Options:
    """How a launch is simulated.

    Args:
        hazards: follow shared memory; without it only bounds and numbers are checked.
        eager: asynchronous copies land at once, not as late as they may.
        proxy_fence: see `Hazards`.
        blocks_at_once: blocks that run as one vector; 0: as many as pay.
        most_steps: group steps before a launch counts as endless.
    """

    hazards: bool = True
    eager: bool = False
    proxy_fence: bool = True
    blocks_at_once: int = 0
    most_steps: int = 50_000_000


class Wave:
    """State of the blocks that run together. One wave is used again for the next blocks."""

    def __init__(
        self, registers: Registers, steps: list[Step], block: tuple[int, int, int],
        shared_bytes: int, parameters: np.ndarray, memory: GlobalMemory, blocks: int,
        options: Options,
    ) -> None:  # fmt: skip
        program = registers.program
        self.steps, self.options, self.eager = steps, options, options.eager
        self.memory, self.block = memory, block
        self.block_threads = int(np.prod(block))
        self.warps = -(-self.block_threads // 32)
        padded = 32 * self.warps
        self.blocks, self.threads, self.agents = blocks, blocks * padded, self.warps + 1
        size = dynamic_start(program.shared_bytes) + shared_bytes
        thread = np.arange(self.threads)
        self.block_of = thread // padded
        self.agent = self.block_of * self.agents + thread % padded // 32
        self.shared_base = self.block_of.astype(np.int64) * stride_of(size)
        hazards = None
        if options.hazards:
            bytes_ = blocks * stride_of(size)
            granule = granule_of(steps)
            fence = options.proxy_fence
            hazards = Hazards(blocks, self.warps, bytes_, granule, proxy_fence=fence)
        self.shared = SharedMemory(blocks, size, hazards)
        self.files = Files(registers, self.threads)
        self._set_thread_numbers(shared_bytes, size)
        self._banks: dict[tuple[int, int], Bank] = {}
        self._parameters = {n: parameters.view(dtype) for n, dtype in UNSIGNED.items()}
        self.parameter_bytes = program.parameter_bytes
        self.local_stride = -(-program.local_bytes // 16) * 16
        local = np.zeros(self.threads * self.local_stride, np.uint8)
        self.local_views = {n: local.view(dtype) for n, dtype in UNSIGNED.items()}
        self.mbarriers = Barriers(self)
        self.copies = AsyncCopies(self, self.threads)
        self.events: deque[Callable[[], None]] = deque()
        self.warpgroups: dict[int, Warpgroup] = {}
        self.tiles: dict[Any, np.ndarray] = {}
        self._bulk: dict[int, BulkGroups] = {}
        self._maps: dict[int, TensorMap] = {}
        self.registers_of: dict[int, int] = {}  # by warp, where setmaxnreg said so
        self.exited = np.zeros(self.threads, bool)
        self.statistics: Counter[str] = Counter()

    def _set_thread_numbers(self, shared_bytes: int, size: int) -> None:
        files, padded = self.files, 32 * self.warps
        thread = np.arange(self.threads) % padded
        x, y, _ = self.block
        files.set_special("%tid.x", thread % x)
        files.set_special("%tid.y", thread // x % y)
        files.set_special("%tid.z", thread // (x * y))
        files.set_special("%laneid", thread % 32)
        files.set_special("%warpid", thread // 32)
        files.set_special("%nwarpid", self.warps)
        files.set_special("%dynamic_smem_size", shared_bytes)
        files.set_special("%total_smem_size", size - FIRST_SHARED_BYTE)
        lane = np.uint64(1) << (thread % 32).astype(np.uint64)
        for name, value in {
            "eq": lane, "lt": lane - np.uint64(1), "le": 2 * lane - 1,
            "gt": np.uint64(0xFFFFFFFF) - (2 * lane - 1), "ge": np.uint64(0x100000000) - lane,
        }.items():  # fmt: skip
            files.set_special(f"%lanemask_{name}", value.astype(np.uint32))
        for axis, n in zip("xyz", self.block, strict=True):
            files.set_special(f"%ntid.{axis}", n)
            files.set_special(f"%cluster_nctaid.{axis}", 1)
        files.set_special("%cluster_nctarank", 1)
        files.set_special("%nsmid", 1)

    # Called by instructions.

    def count(self, what: str, number: int) -> None:
        self.statistics[what] += number

    def load_parameters(
        self, instruction: Instruction, address: np.ndarray, element: int, count: int
    ) -> np.ndarray:
        offset = address - PARAM_WINDOW
        size = element * count
        if offset.size and (offset.min() < 0 or offset.max() + size > self.parameter_bytes):
            raise fault(instruction, f"load outside of {self.parameter_bytes} parameter bytes")
        if (offset % size).any():
            raise fault(instruction, f"misaligned parameter load of {size} bytes")
        return self._parameters[element][offset[:, None] // element + np.arange(count)]

    def local_index(self, instruction, bank, lanes, address, size) -> np.ndarray:
        if address.size and (address.min() < 0 or address.max() + size > self.local_stride):
            raise fault(instruction, "local access out of bounds")
        if (address % size).any():
            raise fault(instruction, f"misaligned local access of {size} bytes")
        return address + np.arange(bank.first, bank.last)[lanes] * self.local_stride

    def tensor_map(self, instruction: Instruction, address: int) -> TensorMap:
        """The record at a generic address."""
        if address not in self._maps:
            if address % 64:
                raise fault(instruction, "a tensor map is aligned to 64 bytes")
            where = np.array([address], np.int64) + np.arange(0, 128, 8)
            if address >= PARAM_WINDOW:
                words = self.load_parameters(instruction, where, 8, 1)
            else:
                words = self.memory.load(instruction, where, 8, 1)
            try:
                self._maps[address] = TensorMap.from_bytes(words.tobytes())
            except SimulationError as error:
                raise fault(instruction, str(error)) from error
        return self._maps[address]

    def warpgroup(self, number: int) -> Warpgroup:
        return self.warpgroups.setdefault(number, Warpgroup())

    def bulk(self, thread: int) -> BulkGroups:
        return self._bulk.setdefault(thread, BulkGroups())

    def set_registers(self, instruction, bank, mask, number: int) -> None:
        warps = np.unique(bank.agent if mask is None else bank.agent[mask])
        self.registers_of.update(dict.fromkeys(warps.tolist(), number))

    def only_exited_missing(self, bank: Bank, active: np.ndarray) -> np.ndarray:
        """[warps, 1]: whether all threads of a warp that are not here have left."""
        left = self.exited[bank.first : bank.last].reshape(-1, 32)
        return (active | left).all(1)[:, None]

    def describe_shared(self, flat: int) -> str:
        block, byte = divmod(flat, self.shared.stride)
        return f"shared byte {byte - FIRST_SHARED_BYTE} of block {block} of the batch"

    def bank(self, first: int, last: int) -> Bank:
        """The bank of a range of threads, made once."""
        if (first, last) not in self._banks:
            self._banks[first, last] = Bank(self, first, last)
        return self._banks[first, last]

    def reset(self, blocks: Sequence[tuple[int, int, int]], grid: tuple[int, int, int]) -> None:
        """Ready for these blocks; fewer than fit leave threads idle."""
        self.shared.reset()
        self.mbarriers.reset()
        self.copies.reset()
        self.events.clear()
        self.warpgroups.clear()
        self._bulk.clear()
        self.registers_of = {}
        thread = np.arange(self.threads) % (32 * self.warps)
        self.exited = (self.block_of >= len(blocks)) | (thread >= self.block_threads)
        for axis, column in zip("xyz", zip(*blocks, strict=True), strict=True):
            index = np.array([*column, *[0] * (self.blocks - len(blocks))])
            self.files.set_special(f"%ctaid.{axis}", index[self.block_of])
            self.files.set_special(f"%clusterid.{axis}", index[self.block_of])
        for axis, n in zip("xyz", grid, strict=True):
            self.files.set_special(f"%nctaid.{axis}", n)
            self.files.set_special(f"%nclusterid.{axis}", n)

    def in_flight(self) -> list[str]:
        """What a kernel must not leave behind at its end."""
        left = []
        if self.copies.pending:
            left.append("cp.async")
        if self.events:
            left.append("a bulk copy or an arrival")
        if any(b.open or any(b.groups) for b in self._bulk.values()):
            left.append("a bulk store")
        if any(w.open or any(w.groups) for w in self.warpgroups.values()):
            left.append("wgmma")
        return left


def granule_of(steps: list[Step]) -> int:
    """Bytes that are followed as one: the smallest width that a program stores to shared memory."""
    sizes = {"8": 1, "16": 2}
    found = [4]
    for step in steps:
        parts = step.instruction.parts
        if (
            parts[0] in ("st", "ld", "atom", "red")
            and "global" not in parts
            and "param" not in parts
        ):
            found.append(sizes.get(parts[-1].lstrip("busf"), 4))
    return min(found)


def dynamic_start(static_end: int) -> int:
    """Where dynamic shared memory begins."""
    return stride_of(static_end)
