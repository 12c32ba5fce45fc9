"""bar.sync, bar.arrive, bar.red by number; fences; the ends of a kernel and of its predecessor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import fault
from .memory import lanes_of
from .parse import Instruction
from .registers import Registers, put
from .steps import Control, Kind, Run, opcode, unknown


@dataclass
class Request:
    """What a thread asks of its block's barrier: [n] over a bank's active threads.

    Args:
        waits: False where it only arrives.
        finish: called with (bank, mask, number of threads with the predicate, of all).
    """

    number: np.ndarray
    expected: np.ndarray  # 0: all threads of the block that have not left
    waits: bool
    predicate: np.ndarray | None = None
    finish: Any = None


@dataclass
class NamedBarrier:
    """Arrivals at one barrier of one block."""

    expected: int
    arrived: int = 0
    true: int = 0
    known: np.ndarray | None = None
    waiting: list[Any] = field(default_factory=list)


@opcode("bar", "barrier")
def _bar(instruction: Instruction, registers: Registers) -> Control:
    parts = [p for p in instruction.parts[1:] if p not in ("cta", "aligned")]
    mode = parts[0]
    operands = list(instruction.operands)
    if mode not in ("sync", "arrive", "red"):
        raise unknown(instruction, f"barrier of {mode}")
    into = predicate = -1
    negated = False
    if mode == "red":
        kind = "u32" if parts[1] == "popc" else "pred"
        into = registers.write(operands.pop(0), kind)
        name = operands.pop()
        negated = name.startswith("!")
        predicate = registers.read(name.lstrip("!"), "pred")
    number = registers.read(operands[0], "u32")
    count = registers.read(operands[1], "u32") if len(operands) > 1 else -1

    def finish(bank, mask, true, total):
        value = {"popc": true, "and": true == total, "or": true > 0}[parts[1]]
        row = bank.rows["u32" if parts[1] == "popc" else "pred"][into]
        put(row, np.full(bank.size, value, row.dtype), mask)

    def run(bank, mask):
        lanes = lanes_of(mask)
        numbers = bank.rows["u32"][number][lanes]
        if numbers.size and numbers.max() > 15:
            raise fault(instruction, f"barrier number {int(numbers.max())}, at most 15")
        expected = bank.rows["u32"][count][lanes] if count >= 0 else np.zeros_like(numbers)
        if (expected % 32).any():
            raise fault(instruction, f"a barrier of {int(expected.max())} threads")
        values = None
        if predicate >= 0:
            values = bank.rows["pred"][predicate][lanes] ^ negated
        done = finish if mode == "red" else None
        return Request(numbers, expected, mode != "arrive", values, done)

    return Control(Kind.BARRIER, run)


@opcode("fence", "membar")
def _fence(instruction: Instruction, registers: Registers) -> Run:
    """Only the fences between the generic and the async proxy matter to what is followed."""
    parts = instruction.parts
    joins_proxies = "proxy" in parts and any(p.startswith("async") for p in parts)
    if "proxy" in parts and not joins_proxies and not {"alias", "tensormap::generic"} & set(parts):
        raise unknown(instruction, "this proxy")
    of_init = "mbarrier_init" in parts

    def run(bank, mask):
        agents = np.unique(bank.agent[lanes_of(mask)])
        if joins_proxies or of_init:
            bank.wave.mbarriers.fence(agents)
        if joins_proxies and bank.wave.shared.hazards:
            bank.wave.shared.hazards.fence_proxy(agents)

    return run


@opcode("griddepcontrol", "nanosleep", "pmevent")
def _nothing(instruction: Instruction, registers: Registers) -> Run:
    """Launches run one after the other, so that the one before is always over."""
    for operand in instruction.operands:
        registers.find(operand)
    return lambda bank, mask: None


@opcode("setmaxnreg")
def _setmaxnreg(instruction: Instruction, registers: Registers) -> Run:
    number = int(instruction.operands[0], 0)
    if number % 8 or not 24 <= number <= 256:
        raise unknown(instruction, f"{number} registers: multiples of 8 from 24 to 256")
    return lambda bank, mask: bank.wave.set_registers(instruction, bank, mask, number)


@opcode("trap", "brkpt")
def _trap(instruction: Instruction, registers: Registers) -> Run:
    def run(bank, mask):
        raise fault(instruction, "the kernel trapped")

    return run


@opcode("bra")
def _bra(instruction: Instruction, registers: Registers) -> Control:
    return Control(Kind.BRANCH)


@opcode("ret", "exit")
def _exit(instruction: Instruction, registers: Registers) -> Control:
    return Control(Kind.EXIT)
