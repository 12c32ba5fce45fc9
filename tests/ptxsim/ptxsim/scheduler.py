"""The order in which the threads of a wave run.

All threads that stand at the same instruction are one group and run as vectors; the group that is
furthest behind runs first, until it meets another. Threads that wait (barriers, mbarriers) are
parked. Asynchronous copies land only when nobody can run, so that a missing wait is found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .barriers import NamedBarrier, Request
from .errors import Diverged, SimulationError, fault
from .parse import Instruction
from .steps import Kind, Step
from .wave import Bank, Wave
from .wgmma import note_registers

_FAR = 1 << 60


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


class Scheduler:
    """Runs the blocks of a wave; `steps_run` counts what groups did, `ran` marks the steps."""

    def __init__(self, wave: Wave) -> None:
        self.wave = wave
        self.steps_run = 0
        self.ran = bytearray(len(wave.steps))

    def run(self, blocks: Sequence[tuple[int, int, int]], grid: tuple[int, int, int]) -> None:
        """Runs some blocks to their end."""
        wave = self.wave
        wave.reset(blocks, grid)
        here = ~wave.exited
        self._barriers: dict[tuple[int, int], NamedBarrier] = {}
        self._flips_seen = wave.mbarriers.flips
        self._parked: list[Group] = []
        self._groups = [self._group(0, here)]
        self._live = here.reshape(wave.blocks, -1).sum(1)
        while self._groups or self._parked:
            if self.wave.mbarriers.flips != self._flips_seen:
                self._flips_seen = self.wave.mbarriers.flips
                self._groups += self._parked
                self._parked = []
            self._merge()
            ready = [g for g in self._groups if g.stalled is None]
            if not ready:
                if not self.wave.events:
                    raise self._deadlock()
                self.wave.events.popleft()()
                continue
            group = min(ready, key=lambda g: g.pc)
            self._groups = [g for g in self._groups if g is not group]
            later = [g.pc for g in self._groups if g.pc > group.pc]
            self._advance(group, min(later, default=_FAR))
        self._check_end()

    def _group(self, pc: int, active: np.ndarray) -> Group:
        """The smallest bank around the active ones of all threads."""
        warps = np.flatnonzero(active.reshape(-1, 32).any(1))
        first, last = 32 * int(warps[0]), 32 * int(warps[-1]) + 32
        mask = active[first:last]
        return Group(pc, self.wave.bank(first, last), None if mask.all() else mask)

    def _spread(self, group: Group) -> np.ndarray:
        active = np.zeros(self.wave.threads, bool)
        active[group.bank.first : group.bank.last] = group.active()
        return active

    def _part(self, pc: int, bank: Bank, mask: np.ndarray) -> Group:
        active = np.zeros(self.wave.threads, bool)
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
        bank, mask, pc, steps = group.bank, group.mask, group.pc, self.wave.steps
        predicates, ran = bank.rows["pred"], self.ran
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
            ran[pc] = 1
            if step.watched and self.wave.warpgroups and step.instruction.parts[0] != "wgmma":
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
                if backwards and self.steps_run > self.wave.options.most_steps:
                    raise fault(step.instruction, f"more than {self.wave.options.most_steps} steps")
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
            self.wave.exited[bank.first : bank.last] |= here
            blocks, counts = np.unique(
                self.wave.block_of[bank.first : bank.last][here], return_counts=True
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
            ready = self.wave.mbarriers.flips != self._flips_seen
            (self._groups if ready else self._parked).append(parked)
        else:
            self._arrive(step, pc, bank, active, here, step.run(bank, active))

    def _arrive(self, step, pc: int, bank: Bank, active, here, request: Request) -> None:
        lanes = np.flatnonzero(here)
        blocks = self.wave.block_of[bank.first + lanes]
        key = blocks * 16 + request.number
        hazards = self.wave.shared.hazards
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
        hazards = self.wave.shared.hazards
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
            step = self.wave.steps[group.pc]
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
        if any(barrier.waiting for barrier in self._barriers.values()):
            raise self._deadlock()
        left = self.wave.in_flight()
        if self._barriers:
            numbers = sorted({n for _, n in self._barriers})
            left.append(f"arrivals at barriers {numbers}")
        if left:
            raise SimulationError(f"the kernel ended with {', '.join(left)} in flight")
        held = 32 * sum(self.wave.registers_of.values())
        if held > self.wave.blocks * 65536:
            raise SimulationError(f"setmaxnreg adds up to {held} registers")
