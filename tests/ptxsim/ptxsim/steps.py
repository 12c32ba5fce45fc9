"""The table of opcodes: an instruction becomes a function over a bank of threads."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import SimulationError, UnknownOpcode, fault
from .parse import Instruction
from .registers import Registers

# run(bank, mask): mask is None where all threads of the bank are active.
Run = Callable[[Any, "np.ndarray | None"], Any]


class Kind(enum.IntEnum):
    """What the scheduler does with a step."""

    PLAIN = 0  # runs and goes on
    BRANCH = 1
    EXIT = 2
    BARRIER = 3  # run returns the request: see barriers.py
    WAIT = 4  # run returns the threads that must try again, or None


@dataclass
class Step:
    """An instruction, ready to run.

    Args:
        guard: row of the predicate, or -1.
        target: of a branch.
        watched: rows of wgmma's registers that it names, as (bits, row); `overwritten` of them
            it writes.
    """

    instruction: Instruction
    kind: Kind
    run: Run | None
    guard: int
    negated: bool
    target: int
    watched: frozenset[tuple[int, int]]
    overwritten: frozenset[tuple[int, int]]
    describe: Callable[[Any, Any], str] | None = None


@dataclass
class Control:
    """What a builder returns for anything but a plain step."""

    kind: Kind
    run: Run | None = None
    describe: Callable[[Any, Any], str] | None = None  # of threads that wait here


Builder = Callable[[Instruction, Registers], "Run | Control"]
_BUILDERS: dict[str, Builder] = {}


def opcode(*names: str) -> Callable[[Builder], Builder]:
    """Registers a builder for opcodes that begin with one of the names; the longest name wins."""

    def add(builder: Builder) -> Builder:
        for name in names:
            if name in _BUILDERS:
                raise ValueError(f"{name} has two builders")
            _BUILDERS[name] = builder
        return builder

    return add


def builder_of(instruction: Instruction) -> Builder:
    parts = instruction.parts
    for length in range(len(parts), 0, -1):
        found = _BUILDERS.get(".".join(parts[:length]))
        if found is not None:
            return found
    raise UnknownOpcode(str(fault(instruction, "the simulator has no such instruction")))


def compile_steps(registers: Registers) -> list[Step]:
    """Every instruction of a program; raises where one is unknown, also if it would never run."""
    program = registers.program
    steps = []
    for instruction in program.instructions:
        builder = builder_of(instruction)
        registers.touched, registers.written = set(), set()
        try:
            guard = -1
            if instruction.guard is not None:
                guard = registers.read(instruction.guard, "pred")
            made = builder(instruction, registers)
        except UnknownOpcode:
            raise
        except (SimulationError, KeyError, IndexError, ValueError) as error:
            operands = ", ".join(instruction.operands)
            raise fault(instruction, f"not understood: {error} (operands {operands})") from error
        if not isinstance(made, Control):
            made = Control(Kind.PLAIN, made)
        target = program.labels[instruction.operands[0]] if made.kind == Kind.BRANCH else -1
        names = frozenset(registers.touched), frozenset(registers.written)
        steps.append(
            Step(
                *(instruction, made.kind, made.run, guard, instruction.negated, target),
                *names,
                describe=made.describe,
            )
        )
    # Only registers that some wgmma holds need watching.
    held = {
        row
        for step in steps
        if step.instruction.opcode.startswith("wgmma.mma_async")
        for row in step.watched
        if row[0] == 32
    }
    for step in steps:
        step.watched &= held
        step.overwritten &= held
    return steps


def kind_of(instruction: Instruction, known: Any) -> str:
    """The last part of the opcode that is one of the known types."""
    for part in reversed(instruction.parts):
        if part in known:
            return part
    raise UnknownOpcode(str(fault(instruction, "no type that is understood")))


def unknown(instruction: Instruction, what: str) -> UnknownOpcode:
    return UnknownOpcode(str(fault(instruction, f"not modelled: {what}")))


def vector(text: str) -> list[str]:
    """Elements of "{a, b}"; a lone operand is a vector of one."""
    text = text.strip()
    return [x.strip() for x in text[1:-1].split(",")] if text.startswith("{") else [text]
