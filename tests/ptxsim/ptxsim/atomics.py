"""atom and red, on global and on shared memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from .formats import CODECS
from .load_store import space_of, window_of
from .memory import Address, lanes_of
from .parse import Instruction
from .registers import VIEWS, Registers
from .steps import Run, kind_of, opcode, unknown, vector

_NAMES = ("add", "min", "max", "exch", "cas", "and", "or", "xor", "inc", "dec")


def _combine(name: str, old: Any, value: Any, swap: Any) -> Any:
    if name == "add":
        return old + value
    if name == "exch":
        return value
    if name == "cas":
        return swap if old == value else old
    if name == "inc":
        return type(old)(0) if old >= value else old + type(old)(1)
    if name == "dec":
        return value if old == 0 or old > value else old - type(old)(1)
    functions = {"min": min, "max": max}
    if name in functions:
        return functions[name](old, value)
    return {"and": old & value, "or": old | value, "xor": old ^ value}[name]


@opcode("atom", "red")
def _atomic(instruction: Instruction, registers: Registers) -> Run:
    """One thread after the other, in the order of their numbers."""
    parts, operands = instruction.parts, instruction.operands
    if "async" in parts:
        raise unknown(instruction, "red.async")
    name = next(p for p in parts[1:] if p in _NAMES)
    kind = kind_of(instruction, VIEWS)
    space = space_of(instruction)
    first = 1 if parts[0] == "atom" else 0
    targets = [registers.write(x, kind) for x in vector(operands[0])] if first else []
    address = Address.parse(operands[first], registers)
    values = [registers.read(x, kind) for x in vector(operands[first + 1])]
    swap = registers.read(operands[first + 2], kind) if name == "cas" else -1
    codec = CODECS.get(kind)
    size = VIEWS[kind]().itemsize

    def run(bank, mask):
        lanes = lanes_of(mask)
        threads = np.arange(bank.size)[lanes]
        where = address.of(bank, lanes)
        at, window = window_of(where) if space == "generic" else (space, 0)
        where = where - window
        if at == "shared":
            shared = bank.wave.shared
            flat = shared.flat(instruction, where, bank.shared_base[lanes], size * len(values))
            if shared.hazards:
                shared.hazards.access_atomically(
                    instruction, flat, size * len(values), bank.agent[lanes]
                )
            cells = shared.views[size].view(VIEWS[kind])
        rows = bank.rows[kind]
        for n, t in enumerate(threads):
            for k, value in enumerate(values):
                if at == "shared":
                    place = int(flat[n]) // size + k
                    cell = cells[place : place + 1]
                else:
                    cell = bank.wave.memory.element(
                        instruction, int(where[n]) + k * size, VIEWS[kind]
                    )
                old = cell[0]
                new = rows[swap][t] if swap >= 0 else None
                if codec:
                    total = codec[0](cell) + codec[0](rows[value][t : t + 1])
                    if name != "add":
                        raise unknown(instruction, f"{name} of {kind}")
                    cell[:] = codec[1](total)
                else:
                    cell[0] = _combine(name, old, rows[value][t], new)
                if targets:
                    rows[targets[k]][t] = old

    return run
