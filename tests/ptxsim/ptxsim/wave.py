"""The blocks that run together, and the order in which their threads run.

All threads that stand at the same instruction are one group and run as vectors; the group that is
furthest behind runs first, until it meets another. Threads that wait (barriers, mbarriers) are
parked. Asynchronous copies land only when nobody can run, so that a missing wait is found.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .async_copy import AsyncCopies
from .barriers import NamedBarrier, Request
from .errors import Diverged, SimulationError, fault
from .hazards import Hazards
from .mbarrier import Barriers
from .memory import GlobalMemory
from .parse import FIRST_SHARED_BYTE, Instruction
from .registers import PARAM_WINDOW, UNSIGNED, Files, Registers
from .shared import SharedMemory, stride_of
from .steps import Kind, Step
from .tma import BulkGroups, TensorMap
from .wgmma import Warpgroup, note_registers

_FAR = 1 << 60


class Bank:
    """A range of whole warps: the rows of their registers, and who they are."""

    def __init__(self, wave: Wave, first: int, last: int) -> None:
        self.wave, self.first, self.last, self.size = wave, first, last, last - first
        self.rows = wave.files.rows(first, last)
        self.agent = wave.agent[first:last]
        self.shared_base = wave.shared_base[first:last]


@dataclass
class Group:
    """Threads at one instruction: those of a bank where the mask holds (None: all)."""

    pc: int
    bank: Bank
    mask: np.ndarray | None
    stalled: SimulationError | None = None

    def active(self) -> np.ndarray:
        return np.ones(self.bank.size, bool) if self.mask is None else self.mask

    def __str__(self) -> str:
        threads = np.flatnonzero(self.active()) + self.bank.first
        inside = threads % self.bank.wave.block_threads
        return f"{len(threads)} threads ({inside.min()} to {inside.max()})"


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

    # The scheduler.

    def run(self, blocks: Sequence[tuple[int, int, int]], grid: tuple[int, int, int]) -> None:
        """Runs some blocks to their end."""
        self._reset(blocks, grid)
        while self._groups or self._parked:
            if self.mbarriers.flips != self._flips_seen:
                self._flips_seen = self.mbarriers.flips
                self._groups += self._parked
                self._parked = []
            self._merge()
            ready = [g for g in self._groups if g.stalled is None]
            if not ready:
                if not self.events:
                    raise self._deadlock()
                self.events.popleft()()
                continue
            group = min(ready, key=lambda g: g.pc)
            self._groups = [g for g in self._groups if g is not group]
            later = [g.pc for g in self._groups if g.pc > group.pc]
            self._advance(group, min(later, default=_FAR))
        self._check_end()

    steps_run = 0

    def _reset(self, blocks: Sequence[tuple[int, int, int]], grid: tuple[int, int, int]) -> None:
        self.shared.reset()
        self.mbarriers.reset()
        self.copies.reset()
        self.events.clear()
        self.warpgroups.clear()
        self._bulk.clear()
        self.registers_of: dict[int, int] = {}
        self._barriers: dict[tuple[int, int], NamedBarrier] = {}
        self._flips_seen = self.mbarriers.flips
        thread = np.arange(self.threads) % (32 * self.warps)
        here = (self.block_of < len(blocks)) & (thread < self.block_threads)
        self.exited = ~here
        for axis, column in zip("xyz", zip(*blocks, strict=True), strict=True):
            index = np.array([*column, *[0] * (self.blocks - len(blocks))])
            self.files.set_special(f"%ctaid.{axis}", index[self.block_of])
            self.files.set_special(f"%clusterid.{axis}", index[self.block_of])
        for axis, n in zip("xyz", grid, strict=True):
            self.files.set_special(f"%nctaid.{axis}", n)
            self.files.set_special(f"%nclusterid.{axis}", n)
        self._parked: list[Group] = []
        self._groups = [self._group(0, here)]
        self._live = here.reshape(self.blocks, -1).sum(1)

    def _group(self, pc: int, active: np.ndarray) -> Group:
        """The smallest bank around the active ones of all threads."""
        warps = np.flatnonzero(active.reshape(-1, 32).any(1))
        first, last = 32 * int(warps[0]), 32 * int(warps[-1]) + 32
        mask = active[first:last]
        return Group(pc, self._bank(first, last), None if mask.all() else mask)

    def _bank(self, first: int, last: int) -> Bank:
        if (first, last) not in self._banks:
            self._banks[first, last] = Bank(self, first, last)
        return self._banks[first, last]

    def _spread(self, group: Group) -> np.ndarray:
        active = np.zeros(self.threads, bool)
        active[group.bank.first : group.bank.last] = group.active()
        return active

    def _part(self, pc: int, bank: Bank, mask: np.ndarray) -> Group:
        active = np.zeros(self.threads, bool)
        active[bank.first : bank.last] = mask
        return self._group(pc, active)

    def _merge(self) -> None:
        if len(self._groups) < 2:
            return
        by_pc: dict[int, list[Group]] = {}
        for group in self._groups:
            by_pc.setdefault(group.pc, []).append(group)
        if len(by_pc) == len(self._groups):
            return
        merged = []
        for pc, groups in by_pc.items():
            if len(groups) == 1:
                merged += groups
            else:
                active = np.logical_or.reduce([self._spread(g) for g in groups])
                merged.append(self._group(pc, active))
        self._groups = merged

    def _advance(self, group: Group, limit: int) -> None:
        """Runs a group until it ends, waits, splits or meets `limit`."""
        bank, mask, pc, steps = group.bank, group.mask, group.pc, self.steps
        predicates = bank.rows["pred"]
        alone = not self._groups
        while True:
            if pc >= len(steps):
                raise SimulationError("the kernel runs past its last instruction")
            step = steps[pc]
            active = mask
            if step.guard >= 0:
                active = predicates[step.guard]
                if step.negated:
                    active = ~active
                if mask is not None:
                    active = active & mask
                count = np.count_nonzero(active)
                if count == 0:
                    pc += 1
                    if pc >= limit:
                        break
                    continue
                active = None if count == bank.size else active
            self.steps_run += 1
            if step.watched and self.warpgroups and step.instruction.parts[0] != "wgmma":
                note_registers(step, bank, active)
            if step.kind == Kind.PLAIN:
                try:
                    step.run(bank, active)
                except Diverged as stop:
                    self._groups.append(Group(pc, bank, mask, stop.error))
                    return
                pc += 1
            elif step.kind == Kind.BRANCH:
                rest = self._rest(bank, mask, active)
                if rest is not None:
                    self._groups.append(self._part(pc + 1, bank, rest))
                    here = np.ones(bank.size, bool) if active is None else active
                    self._groups.append(self._part(step.target, bank, here.copy()))
                    return
                backwards, pc = step.target <= pc, step.target
                if backwards and not alone:
                    break
                if backwards and self.steps_run > self.options.most_steps:
                    raise fault(step.instruction, f"more than {self.options.most_steps} steps")
            else:
                self._leave(step, pc, bank, mask, active)
                return
            if pc >= limit:
                break
        self._groups.append(Group(pc, bank, mask))

    @staticmethod
    def _rest(bank: Bank, mask, active) -> np.ndarray | None:
        """The threads of a group that a predicate leaves out; None: there are none."""
        if active is None or active is mask:
            return None
        rest = ~active if mask is None else mask & ~active
        return rest if rest.any() else None

    def _leave(self, step: Step, pc: int, bank: Bank, mask, active) -> None:
        """Exits, barriers and waits: what becomes of a group's threads."""
        rest = self._rest(bank, mask, active)
        if rest is not None:
            self._groups.append(self._part(pc + 1, bank, rest))
        here = np.ones(bank.size, bool) if active is None else active.copy()
        if step.kind == Kind.EXIT:
            self.exited[bank.first : bank.last] |= here
            blocks, counts = np.unique(
                self.block_of[bank.first : bank.last][here], return_counts=True
            )
            self._live[blocks] -= counts
            for block in blocks.tolist():
                for key in [k for k in self._barriers if k[0] == block]:
                    self._try_barrier(step.instruction, key)
        elif step.kind == Kind.WAIT:
            waiting = step.run(bank, active)
            if waiting is None:
                self._groups.append(self._part(pc + 1, bank, here))
                return
            if (here & ~waiting).any():
                self._groups.append(self._part(pc + 1, bank, here & ~waiting))
            parked = self._part(pc, bank, waiting)
            # The flip may be among this step's own doings in the mode that lands at once.
            ready = self.mbarriers.flips != self._flips_seen
            (self._groups if ready else self._parked).append(parked)
        else:
            self._arrive(step, pc, bank, active, here, step.run(bank, active))

    def _arrive(self, step, pc: int, bank: Bank, active, here, request: Request) -> None:
        lanes = np.flatnonzero(here)
        blocks = self.block_of[bank.first + lanes]
        key = blocks * 16 + request.number
        hazards = self.shared.hazards
        if not request.waits:
            self._groups.append(self._part(pc + 1, bank, here))
        for value in np.unique(key).tolist():
            chosen = key == value
            name = divmod(value, 16)
            expected = np.unique(request.expected[chosen])
            barrier = self._barriers.setdefault(name, NamedBarrier(int(expected[0])))
            if len(expected) > 1 or barrier.expected != expected[0]:
                raise fault(step.instruction, f"barrier {name[1]} with different thread counts")
            barrier.arrived += int(chosen.sum())
            if request.predicate is not None:
                barrier.true += int(request.predicate[chosen].sum())
            part = np.zeros(bank.size, bool)
            part[lanes[chosen]] = True
            if hazards:
                agents = np.unique(bank.agent[lanes[chosen]])
                known = hazards.clock[agents].max(0)
                before = barrier.known
                barrier.known = known if before is None else np.maximum(before, known)
                hazards.tick(agents)
            if request.waits:
                barrier.waiting.append((self._part(pc + 1, bank, part), request.finish))
            self._try_barrier(step.instruction, name)

    def _try_barrier(self, instruction: Instruction, name: tuple[int, int]) -> None:
        barrier = self._barriers[name]
        expected = barrier.expected or int(self._live[name[0]])
        if barrier.arrived > expected:
            raise fault(
                instruction,
                f"{barrier.arrived} threads arrived at barrier {name[1]} of {expected}",
            )
        if barrier.arrived < expected:
            return
        del self._barriers[name]
        hazards = self.shared.hazards
        for group, finish in barrier.waiting:
            if hazards:
                agents = np.unique(group.bank.agent[group.active()])
                hazards.acquire(agents, barrier.known)
            if finish:
                finish(group.bank, group.mask, barrier.true, expected)
            self._groups.append(group)

    def _deadlock(self) -> SimulationError:
        stalled = [g for g in self._groups if g.stalled is not None]
        if stalled and not self._parked and not self._barriers:
            assert stalled[0].stalled is not None
            return stalled[0].stalled
        lines = []
        for group in self._parked:
            step = self.steps[group.pc]
            what = step.describe(group.bank, group.mask) if step.describe else "waits"
            at = f"ptx line {step.instruction.line}, source {step.instruction.location}"
            lines.append(f"{group} {what}  [{at}]")
        for (block, number), barrier in self._barriers.items():
            lines.append(
                f"barrier {number} of block {block} of the batch has {barrier.arrived} of "
                f"{barrier.expected or int(self._live[block])} threads"
            )
        lines += [f"{group} stand at: {group.stalled}" for group in stalled]
        return SimulationError("deadlock: " + "\n  ".join(lines))

    def _check_end(self) -> None:
        left = []
        if any(c.serial for c in self.copies.pending):
            left.append("cp.async")
        if self.events:
            left.append("a bulk copy or an arrival")
        if any(b.open or any(b.groups) for b in self._bulk.values()):
            left.append("a bulk store")
        if any(w.open or any(w.groups) for w in self.warpgroups.values()):
            left.append("wgmma")
        if self._barriers:
            numbers = sorted({n for _, n in self._barriers})
            left.append(f"arrivals at barriers {numbers}")
        if left:
            raise SimulationError(f"the kernel ended with {', '.join(left)} in flight")
        held = 32 * sum(self.registers_of.values())
        if held > self.blocks * 65536:
            raise SimulationError(f"setmaxnreg adds up to {held} registers")


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
