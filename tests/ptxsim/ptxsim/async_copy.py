"""cp.async: copies of 4, 8 or 16 bytes, which land when they are waited for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .hazards import IN_FLIGHT
from .memory import Address, lanes_of
from .parse import Instruction
from .registers import Registers
from .steps import Run, opcode, unknown


@dataclass
class Copy:
    """One instruction's copies that are under way, a row per thread.

    Args:
        serial: number of the instruction's run.
        thread: of the batch.
        group: number of the commit group, counted per thread; open groups have the number that
            their commit will give.
        flat: place in shared memory.
        length: bytes that are read; the rest is zero.
    """

    instruction: Instruction
    size: int
    serial: int
    thread: np.ndarray
    group: np.ndarray
    flat: np.ndarray
    source: np.ndarray
    length: np.ndarray


class AsyncCopies:
    """All cp.async of a batch that have not landed."""

    def __init__(self, wave: Any, threads: int) -> None:
        self.wave = wave
        self.pending: list[Copy] = []
        self.commits = np.zeros(threads, np.int64)

        self.serial = 0

    def reset(self) -> None:
        self.pending, self.commits[:] = [], 0

    def start(self, instruction: Instruction, size: int, *arrays: np.ndarray) -> Copy:
        self.serial += 1
        self.pending.append(Copy(instruction, size, self.serial, *arrays))
        return self.pending[-1]

    def land(
        self,
        chosen: np.ndarray,
        up_to: np.ndarray | None = None,
        last: int | None = None,
        clock: np.ndarray | None = None,
    ) -> None:
        """Lands the copies of the chosen threads [threads].

        Args:
            up_to: groups [threads] that may land; None: all.
            last: serial of the last one that may; None: all.
            clock: of every agent, at the moment that counts as the writing; None: now.
        """
        rest = []
        for copy in self.pending:
            done = chosen[copy.thread]
            if up_to is not None:
                done &= copy.group <= up_to[copy.thread]
            if last is not None and copy.serial > last:
                done[:] = False
            if done.any():
                self.finish(copy, done, clock)
            if not done.all():
                keep = ~done
                arrays = (copy.thread, copy.group, copy.flat, copy.source, copy.length)
                kept = (x[keep] for x in arrays)
                rest.append(Copy(copy.instruction, copy.size, copy.serial, *kept))
        self.pending = rest

    def finish(self, copy: Copy, done: np.ndarray, clock: np.ndarray | None = None) -> None:
        wave, size = self.wave, copy.size
        data = np.zeros((int(done.sum()), size), np.uint8)
        source, length, flat = copy.source[done], copy.length[done], copy.flat[done]
        full = length == size
        if full.any():
            element, count = min(size, 8), max(1, size // 8)
            words = wave.memory.load(copy.instruction, source[full], element, count)
            data[full] = np.ascontiguousarray(words).view(np.uint8).reshape(-1, size)
        for k in np.flatnonzero((length > 0) & ~full):
            n = int(length[k])
            where = source[k] + np.arange(n, dtype=np.int64)
            data[k, :n] = wave.memory.load(copy.instruction, where, 1, 1)[:, 0]
        wave.shared.bytes[flat[:, None] + np.arange(size)] = data
        hazards = wave.shared.hazards
        if hazards:
            index, count = hazards.granules(flat, size)
            hazards.wrote(index, np.repeat(wave.agent[copy.thread[done]], count), clock)


@opcode("cp.async")
def _cp_async(instruction: Instruction, registers: Registers) -> Run:
    operands, parts = instruction.operands, instruction.parts
    if parts[2] not in ("ca", "cg") or len(operands) > 4:
        raise unknown(instruction, "this form")
    target, source = (Address.parse(x, registers) for x in operands[:2])
    size = int(operands[2], 0)
    length = registers.read(operands[3], "u32") if len(operands) > 3 else -1
    if size not in ((16,) if parts[2] == "cg" else (4, 8, 16)):
        raise unknown(instruction, f"copies of {size} bytes")

    def run(bank: Any, mask: np.ndarray | None) -> None:
        wave, lanes = bank.wave, lanes_of(mask)
        where, origin = target.of(bank, lanes), source.of(bank, lanes)
        flat = wave.shared.flat(instruction, where, bank.shared_base[lanes], size)
        bytes_read = np.full(len(where), size, np.int64)
        if length >= 0:
            bytes_read = bank.rows["u32"][length][lanes].astype(np.int64)
            bytes_read = np.minimum(bytes_read, size)
        wave.memory.check(instruction, origin[bytes_read == size], size)
        if wave.shared.hazards:
            wave.shared.hazards.start_copy(instruction, flat, size, bank.agent[lanes])
        thread = np.arange(bank.first, bank.last)[lanes]
        group = wave.copies.commits[thread] + 1
        copy = wave.copies.start(instruction, size, thread, group, flat, origin, bytes_read)
        if wave.eager:
            # The bytes are there at once, but nobody may look before the wait.
            wave.copies.finish(copy, np.ones(len(thread), bool))
            if wave.shared.hazards:
                index, _ = wave.shared.hazards.granules(flat, size)
                wave.shared.hazards.writer[index] = IN_FLIGHT

    return run


def _chosen(bank: Any, mask: np.ndarray | None) -> np.ndarray:
    chosen = np.zeros(bank.wave.threads, bool)
    chosen[bank.first : bank.last] = True if mask is None else mask
    return chosen


@opcode("cp.async.commit_group")
def _commit(instruction: Instruction, registers: Registers) -> Run:
    def run(bank: Any, mask: np.ndarray | None) -> None:
        bank.wave.copies.commits[bank.first : bank.last][lanes_of(mask)] += 1

    return run


@opcode("cp.async.wait_group", "cp.async.wait_all")
def _wait(instruction: Instruction, registers: Registers) -> Run:
    is_all = instruction.parts[2] == "wait_all"
    allowed = -1 if is_all else int(instruction.operands[0], 0)

    def run(bank: Any, mask: np.ndarray | None) -> None:
        copies = bank.wave.copies
        copies.land(_chosen(bank, mask), copies.commits - allowed)

    return run


@opcode("cp.async.mbarrier.arrive")
def _arrive(instruction: Instruction, registers: Registers) -> Run:
    """Arrives at an mbarrier once all earlier copies of the thread have landed.

    Without `.noinc` the barrier expects one arrival more, so that its count stays as it was.
    """
    address = Address.parse(instruction.operands[0], registers)
    no_increment = "noinc" in instruction.parts

    def run(bank: Any, mask: np.ndarray | None) -> None:
        wave, lanes = bank.wave, lanes_of(mask)
        thread = np.arange(bank.first, bank.last)[lanes]
        flat = wave.shared.flat(instruction, address.of(bank, lanes), bank.shared_base[lanes], 8)
        if not no_increment:
            for place in flat:
                wave.mbarriers.find(instruction, int(place)).pending += 1
        chosen, last = _chosen(bank, mask), wave.copies.serial
        hazards = wave.shared.hazards
        clock = hazards.clock.copy() if hazards else None
        if hazards:
            hazards.tick(np.unique(bank.agent[lanes]))

        def land() -> None:
            wave.copies.land(chosen, last=last, clock=clock)
            for place, agent in zip(flat, wave.agent[thread], strict=True):
                known = None if clock is None else clock[agent]
                wave.mbarriers.arrive(instruction, int(place), 1, known)

        wave.events.append(land)

    return run
