"""ld, st, prefetch: every state space, vectors, and generic addresses."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from .errors import fault
from .memory import Address, lanes_of
from .parse import TYPE_BYTES, Instruction
from .registers import LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, UNSIGNED, VIEWS, Registers
from .steps import Run, kind_of, opcode, unknown, vector

_SPACES = ("global", "shared", "param", "local", "const")


def space_of(instruction: Instruction) -> str:
    """The state space that the opcode names; "generic" where it names none."""
    for part in instruction.parts[1:]:
        space = part.split("::")[0]
        if space in _SPACES:
            if part in ("shared::cluster", "param::func"):
                raise unknown(instruction, part)
            return space
    return "generic"


def _width(instruction: Instruction) -> int:
    return next((int(p[1:]) for p in instruction.parts if re.fullmatch(r"v[248]", p)), 1)


def window_of(address: np.ndarray) -> tuple[str, int]:
    """Space and window of a generic address."""
    first = int(address[0])
    for space, window in (
        ("local", LOCAL_WINDOW),
        ("param", PARAM_WINDOW),
        ("shared", SHARED_WINDOW),
    ):
        if first >= window:
            return space, window
    return "global", 0


def _load(instruction, bank, lanes, space, address, element, count) -> np.ndarray:
    """[n, count] elements for the active threads."""
    if space == "generic" and address.size:
        space, window = window_of(address)
        if window_of(address[[int(address.argmin())]])[0] != space:
            raise fault(instruction, "one access reaches several state spaces")
        address = address - window
        if space == "param":
            address = address + window
    wave = bank.wave
    if space == "shared":
        return wave.shared.load(instruction, bank, lanes, address, element, count)
    if space == "param":
        return wave.load_parameters(instruction, address, element, count)
    if space == "local":
        index = wave.local_index(instruction, bank, lanes, address, element * count)
        return wave.local_views[element][index[:, None] // element + np.arange(count)]
    return wave.memory.load(instruction, address, element, count)


def _store(instruction, bank, lanes, space, address, values) -> None:
    if space == "generic" and address.size:
        space, window = window_of(address)
        if window_of(address[[int(address.argmin())]])[0] != space:
            raise fault(instruction, "one access reaches several state spaces")
        address = address - window
    wave = bank.wave
    if space == "shared":
        wave.shared.store(instruction, bank, lanes, address, values)
    elif space == "local":
        element, count = values.itemsize, values.shape[1]
        index = wave.local_index(instruction, bank, lanes, address, element * count)
        wave.local_views[element][index[:, None] // element + np.arange(count)] = values
    elif space == "param":
        raise fault(instruction, "store to a parameter")
    else:
        wave.memory.store(instruction, address, values)


@opcode("ld", "ldu")
def _ld(instruction: Instruction, registers: Registers) -> Run:
    kind = kind_of(instruction, TYPE_BYTES)
    space, count = space_of(instruction), _width(instruction)
    targets = [registers.loose(x, kind, writes=True) for x in vector(instruction.operands[0])]
    address = Address.parse(instruction.operands[1], registers)
    element = TYPE_BYTES[kind]
    if len(targets) != count or element > 8:
        raise unknown(instruction, "this vector")
    unsigned = UNSIGNED[element]

    def run(bank: Any, mask: np.ndarray | None) -> None:
        lanes = lanes_of(mask)
        values = _load(instruction, bank, lanes, space, address.of(bank, lanes), element, count)
        for k, (bits, row) in enumerate(targets):
            value = values[:, k]
            if bits != 8 * element:
                value = value.view(VIEWS[kind]) if kind[0] == "s" else value.view(unsigned)
                signed = VIEWS[("s" if kind[0] == "s" else "u") + str(bits)]
                value = value.astype(signed).view(VIEWS[f"b{bits}"])
            bank.rows[f"b{bits}"][row][lanes] = value

    return run


@opcode("st")
def _st(instruction: Instruction, registers: Registers) -> Run:
    kind = kind_of(instruction, TYPE_BYTES)
    space, count = space_of(instruction), _width(instruction)
    address = Address.parse(instruction.operands[0], registers)
    sources = [registers.loose(x, kind) for x in vector(instruction.operands[1])]
    element = TYPE_BYTES[kind]
    if len(sources) != count or element > 8:
        raise unknown(instruction, "this vector")

    def run(bank: Any, mask: np.ndarray | None) -> None:
        lanes = lanes_of(mask)
        where = address.of(bank, lanes)
        values = np.empty((len(where), count), UNSIGNED[element])
        for k, (bits, row) in enumerate(sources):
            values[:, k] = bank.rows[f"b{bits}"][row][lanes]
        _store(instruction, bank, lanes, space, where, values)

    return run


@opcode("prefetch", "prefetchu", "createpolicy", "discard", "applypriority")
def _hint(instruction: Instruction, registers: Registers) -> Run:
    """Caches are not modelled; a policy is a number that nobody looks into."""
    if instruction.parts[0] == "createpolicy":
        bits, row = registers.loose(instruction.operands[0], "b64")

        def run(bank, mask):
            bank.rows[f"b{bits}"][row][lanes_of(mask)] = 0

        return run
    return lambda bank, mask: None
