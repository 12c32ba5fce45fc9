"""mbarrier: arrivals, bytes of transactions, and waits by the parity of a phase."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import fault
from .memory import Address, lanes_of
from .parse import Instruction
from .registers import Registers
from .steps import Control, Kind, Run, opcode, unknown

_MOST_ARRIVALS = (1 << 20) - 1


@dataclass
class Barrier:
    """One mbarrier object.

    Args:
        pending: arrivals that the phase still expects.
        bytes: of transactions that it still expects.
        phase: how many phases are over.
        gathered: clocks of those who arrived in this phase; `released`: of the last one that ended.
        fenced: the initialisation is visible to bulk copies.
    """

    name: str
    count: int
    pending: int
    by: int
    gathered: np.ndarray
    released: np.ndarray
    bytes: int = 0
    phase: int = 0
    fenced: bool = False

    def __str__(self) -> str:
        return (
            f"{self.name}: phase {self.phase}, {self.pending} of {self.count} arrivals and "
            f"{self.bytes} bytes missing"
        )


class Barriers:
    """All mbarriers of a batch, by their place in shared memory."""

    def __init__(self, wave: Any) -> None:
        self.wave = wave
        self.known: dict[int, Barrier] = {}
        self.flips = 0  # phases that ended, of all barriers

    def reset(self) -> None:
        self.known.clear()

    def find(self, instruction: Instruction, flat: int) -> Barrier:
        barrier = self.known.get(flat)
        if barrier is None:
            where = self.wave.describe_shared(flat)
            raise fault(instruction, f"{where} is used as an mbarrier before mbarrier.init")
        return barrier

    def init(self, instruction: Instruction, flat: int, count: int, agent: int) -> None:
        if not 0 < count <= _MOST_ARRIVALS:
            raise fault(instruction, f"mbarrier.init with a count of {count}")
        if flat in self.known:
            raise fault(instruction, "mbarrier.init of an mbarrier that is in use")
        hazards = self.wave.shared.hazards
        clocks = np.zeros(hazards.agents if hazards else 1, np.int32)
        name = f"mbarrier at {self.wave.describe_shared(flat)}"
        self.known[flat] = Barrier(name, count, count, agent, clocks, clocks.copy())

    def arrive(
        self, instruction: Instruction, flat: int, count: int, known: np.ndarray | None
    ) -> None:
        """`count` arrivals by one who knows these clocks (None: nothing is followed)."""
        barrier = self.find(instruction, flat)
        if count > barrier.pending:
            raise fault(instruction, f"more arrivals than the phase expects; {barrier}")
        if known is not None:
            barrier.gathered = np.maximum(barrier.gathered, known)
        barrier.pending -= count
        self._end_phase(barrier)

    def expect(self, instruction: Instruction, flat: int, number: int) -> None:
        self.find(instruction, flat).bytes += number

    def complete(self, instruction: Instruction, flat: int, number: int, moment: int) -> None:
        """Bytes of a bulk copy arrived; `moment` is when, for the asynchronous agent."""
        barrier = self.find(instruction, flat)
        barrier.bytes -= number
        if self.wave.shared.hazards:
            barrier.gathered[-1] = max(barrier.gathered[-1], moment)
        self._end_phase(barrier)

    def _end_phase(self, barrier: Barrier) -> None:
        if barrier.pending == 0 and barrier.bytes == 0:
            barrier.phase += 1
            barrier.pending = barrier.count
            barrier.released = np.maximum(barrier.released, barrier.gathered)
            barrier.gathered = np.zeros_like(barrier.gathered)
            self.flips += 1

    def fence(self, agents: np.ndarray) -> None:
        """What these agents initialised becomes visible to bulk copies."""
        chosen = set(agents.tolist())
        for barrier in self.known.values():
            if barrier.by in chosen:
                barrier.fenced = True


def _places(instruction: Instruction, bank: Any, lanes: Any, address: Address) -> np.ndarray:
    shared = bank.wave.shared
    return shared.flat(instruction, address.of(bank, lanes), bank.shared_base[lanes], 8)


def _touch(instruction: Instruction, bank: Any, lanes: Any, flat: np.ndarray) -> None:
    """Whoever uses an mbarrier must know that it was initialised."""
    if bank.wave.shared.hazards and flat.size:
        bank.wave.shared.hazards.read(instruction, flat, 8, bank.agent[lanes])


@opcode("mbarrier.init")
def _init(instruction: Instruction, registers: Registers) -> Run:
    address = Address.parse(instruction.operands[0], registers)
    count = registers.read(instruction.operands[1], "u32")

    def run(bank, mask):
        lanes, wave = lanes_of(mask), bank.wave
        flat = _places(instruction, bank, lanes, address)
        agents, counts = bank.agent[lanes], bank.rows["u32"][count][lanes]
        if wave.shared.hazards:
            wave.shared.hazards.write(instruction, flat, 8, agents)
        for place, n, agent in zip(flat, counts, agents, strict=True):
            wave.mbarriers.init(instruction, int(place), int(n), int(agent))

    return run


@opcode("mbarrier.inval")
def _inval(instruction: Instruction, registers: Registers) -> Run:
    address = Address.parse(instruction.operands[0], registers)

    def run(bank, mask):
        lanes, wave = lanes_of(mask), bank.wave
        flat = _places(instruction, bank, lanes, address)
        for place in flat:
            wave.mbarriers.find(instruction, int(place))
            del wave.mbarriers.known[int(place)]
        if wave.shared.hazards:
            wave.shared.hazards.write(instruction, flat, 8, bank.agent[lanes])

    return run


@opcode("mbarrier.arrive", "mbarrier.expect_tx", "mbarrier.complete_tx")
def _arrive(instruction: Instruction, registers: Registers) -> Run:
    """arrive, arrive.expect_tx, expect_tx and complete_tx: one after the other by thread."""
    parts, operands = instruction.parts, list(instruction.operands)
    if "noComplete" in parts or "shared::cluster" in parts:
        raise unknown(instruction, "noComplete and remote arrivals")
    arrives = parts[1] == "arrive"
    if arrives and not operands[0].startswith("["):
        operands.pop(0)  # the state token: waits by parity need none
    address = Address.parse(operands[0], registers)
    number = registers.read(operands[1], "u32") if len(operands) > 1 else -1
    expects = "expect_tx" in parts

    def run(bank, mask):
        lanes, wave = lanes_of(mask), bank.wave
        flat = _places(instruction, bank, lanes, address)
        _touch(instruction, bank, lanes, flat)
        agents = bank.agent[lanes]
        numbers = bank.rows["u32"][number][lanes] if number >= 0 else np.ones(len(flat), int)
        hazards = wave.shared.hazards
        for place, n, agent in zip(flat.tolist(), numbers.tolist(), agents.tolist(), strict=True):
            if expects:
                wave.mbarriers.expect(instruction, place, n)
            elif not arrives:
                wave.mbarriers.complete(instruction, place, n, 0)
            if arrives:
                known = hazards.clock[agent] if hazards else None
                wave.mbarriers.arrive(instruction, place, 1 if expects else n, known)
        if hazards and arrives:
            hazards.tick(np.unique(agents))

    return run


@opcode("mbarrier.try_wait", "mbarrier.test_wait")
def _wait(instruction: Instruction, registers: Registers) -> Control:
    """Threads whose phase is not over are stopped here until it is: try_wait never says no.

    test_wait says at once how things are.
    """
    parts, operands = instruction.parts, instruction.operands
    if "parity" not in parts:
        raise unknown(instruction, "waits by a state token")
    into = registers.write(operands[0], "pred")
    address = Address.parse(operands[1], registers)
    parity = registers.read(operands[2], "u32")

    def run(bank, mask):
        lanes, wave = lanes_of(mask), bank.wave
        flat = _places(instruction, bank, lanes, address)
        _touch(instruction, bank, lanes, flat)
        agents = bank.agent[lanes]
        key = flat * 2 + (bank.rows["u32"][parity][lanes].astype(np.int64) & 1)
        over = np.zeros(len(flat), bool)
        for value in np.unique(key):
            barrier = wave.mbarriers.find(instruction, int(value) // 2)
            # Parity p is over once the phase in progress has the other parity.
            if (barrier.phase & 1) != (int(value) & 1):
                chosen = key == value
                over |= chosen
                if wave.shared.hazards:
                    wave.shared.hazards.acquire(np.unique(agents[chosen]), barrier.released)
        bank.rows["pred"][into][lanes] = over
        if over.all() or "test_wait" in parts:
            return None
        waiting = np.zeros(bank.size, bool)
        waiting[lanes] = ~over
        return waiting

    def describe(bank, mask):
        lanes = lanes_of(mask)
        flat = np.unique(_places(instruction, bank, lanes, address))
        parities = np.unique(bank.rows["u32"][parity][lanes] & np.uint32(1)).tolist()
        known = [str(bank.wave.mbarriers.find(instruction, int(f))) for f in flat]
        return f"waits for parity {parities} of {'; '.join(known)}"

    return Control(Kind.WAIT, run, describe)
