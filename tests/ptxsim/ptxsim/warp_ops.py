"""What the threads of a warp do together: shuffles, votes, matches, reductions, elect."""

from __future__ import annotations

from typing import Any

import numpy as np

from .errors import Diverged, fault
from .parse import Instruction
from .registers import VIEWS, Registers, put
from .steps import Run, kind_of, opcode, unknown

_LANES = np.arange(32)


def _active(bank: Any, mask: np.ndarray | None) -> np.ndarray:
    """[warps, 32]: who takes part."""
    if mask is None:
        return np.ones((bank.size // 32, 32), bool)
    return mask.reshape(-1, 32)


def check_members(instruction: Instruction, bank: Any, mask, members: np.ndarray) -> None:
    """The member mask of every active thread must be exactly the active threads of its warp."""
    active = _active(bank, mask)
    bits = (active.astype(np.uint64) << _LANES.astype(np.uint64)).sum(1)
    wrong = active & (members.reshape(-1, 32) != bits[:, None])
    # A mask of all 32 threads beside exited ones is common; others are not forgiven.
    wrong &= ~(
        (members.reshape(-1, 32) == 0xFFFFFFFF) & bank.wave.only_exited_missing(bank, active)
    )
    if wrong.any():
        raise Diverged(
            fault(instruction, "the member mask is not the set of threads that are here")
        )


def whole_warps(instruction: Instruction, bank: Any, mask: np.ndarray | None) -> np.ndarray:
    """[warps] of a bank that take part, each with all its threads."""
    active = _active(bank, mask)
    every = active.all(1)
    if (active.any(1) != every).any():
        raise Diverged(fault(instruction, "only a part of a warp is here"))
    return every


@opcode("shfl")
def _shfl(instruction: Instruction, registers: Registers) -> Run:
    operands = instruction.operands
    if instruction.parts[1] != "sync":
        raise unknown(instruction, "shfl without .sync")
    mode = instruction.parts[2]
    targets = [x.strip() for x in operands[0].split("|")]
    into = registers.write(targets[0], "b32")
    inside = registers.write(targets[1], "pred") if len(targets) > 1 else -1
    source = registers.read(operands[1], "b32")
    by, clamp, members = (registers.read(x, "u32") for x in operands[2:5])

    def run(bank, mask):
        rows = bank.rows["u32"]
        check_members(instruction, bank, mask, rows[members])
        shape = (-1, 32)
        offset = rows[by].astype(np.int64).reshape(shape)
        limit = rows[clamp].astype(np.int64).reshape(shape)
        bound, segment = limit & 31, (limit >> 8) & 31
        most, least = (_LANES & segment) | (bound & ~segment), _LANES & segment
        if mode == "bfly":
            lane = _LANES ^ offset
        elif mode == "idx":
            lane = least | (offset & ~segment & 31)
        elif mode == "up":
            lane = _LANES - offset
        else:
            lane = _LANES + offset
        good = lane >= most if mode == "up" else lane <= most
        lane = np.where(good, lane, _LANES)
        active = _active(bank, mask)
        if mask is not None and (active & ~np.take_along_axis(active, lane, 1)).any():
            raise fault(instruction, "a shuffle reads from a thread that is not here")
        value = np.take_along_axis(rows[source].reshape(shape), lane, 1)
        put(rows[into], value.ravel(), mask)
        if inside >= 0:
            put(bank.rows["pred"][inside], good.ravel(), mask)

    return run


@opcode("vote")
def _vote(instruction: Instruction, registers: Registers) -> Run:
    operands = instruction.operands
    if instruction.parts[1] != "sync":
        raise unknown(instruction, "vote without .sync")
    mode = instruction.parts[2]
    negated = operands[1].startswith("!")
    source = registers.read(operands[1].lstrip("!"), "pred")
    members = registers.read(operands[2], "u32")
    into = registers.write(operands[0], "b32" if mode == "ballot" else "pred")

    def run(bank, mask):
        check_members(instruction, bank, mask, bank.rows["u32"][members])
        active = _active(bank, mask)
        value = bank.rows["pred"][source].reshape(-1, 32)
        value = ~value if negated else value
        if mode == "ballot":
            bits = (value & active).astype(np.uint64) << _LANES.astype(np.uint64)
            put(bank.rows["u32"][into], np.repeat(bits.sum(1), 32).astype(np.uint32), mask)
            return
        every, some = (value | ~active).all(1), (value & active).any(1)
        result = {"all": every, "any": some, "uni": every | ~some}[mode]
        put(bank.rows["pred"][into], np.repeat(result, 32), mask)

    return run


@opcode("match")
def _match(instruction: Instruction, registers: Registers) -> Run:
    operands = instruction.operands
    if instruction.parts[1:3] != ["any", "sync"]:
        raise unknown(instruction, "this match")
    kind = kind_of(instruction, ("b32", "b64"))
    into = registers.write(operands[0], "b32")
    source, members = registers.read(operands[1], kind), registers.read(operands[2], "u32")

    def run(bank, mask):
        check_members(instruction, bank, mask, bank.rows["u32"][members])
        active, value = _active(bank, mask), bank.rows[kind][source].reshape(-1, 32)
        same = (value[:, :, None] == value[:, None, :]) & active[:, None, :]
        bits = (same.astype(np.uint64) << _LANES.astype(np.uint64)).sum(2)
        put(bank.rows["u32"][into], bits.ravel().astype(np.uint32), mask)

    return run


_REDUCE = {"add": (np.add, 0), "and": (np.bitwise_and, -1), "or": (np.bitwise_or, 0)}
_REDUCE |= {"xor": (np.bitwise_xor, 0), "min": (np.minimum, None), "max": (np.maximum, None)}


@opcode("redux")
def _redux(instruction: Instruction, registers: Registers) -> Run:
    name = instruction.parts[2]
    kind = kind_of(instruction, ("s32", "u32", "b32"))
    into = registers.write(instruction.operands[0], kind)
    source = registers.read(instruction.operands[1], kind)
    members = registers.read(instruction.operands[2], "u32")
    function, neutral = _REDUCE[name]
    limits = np.iinfo(VIEWS[kind])
    if neutral is None:
        neutral = limits.max if name == "min" else limits.min

    def run(bank, mask):
        check_members(instruction, bank, mask, bank.rows["u32"][members])
        value = bank.rows[kind][source].reshape(-1, 32)
        start = np.array(neutral, np.int64).astype(VIEWS[kind])
        value = np.where(_active(bank, mask), value, start)
        result = function.reduce(value, axis=1, dtype=VIEWS[kind])
        put(bank.rows[kind][into], np.repeat(result, 32), mask)

    return run


@opcode("elect")
def _elect(instruction: Instruction, registers: Registers) -> Run:
    """The first active thread of a warp is the leader."""
    targets = [x.strip() for x in instruction.operands[0].split("|")]
    into, leader = registers.write(targets[0], "b32"), registers.write(targets[1], "pred")
    members = registers.read(instruction.operands[1], "u32")

    def run(bank, mask):
        check_members(instruction, bank, mask, bank.rows["u32"][members])
        first = _active(bank, mask).argmax(1)
        put(bank.rows["u32"][into], np.repeat(first, 32).astype(np.uint32), mask)
        put(bank.rows["pred"][leader], (first[:, None] == _LANES).ravel(), mask)

    return run


@opcode("activemask")
def _activemask(instruction: Instruction, registers: Registers) -> Run:
    into = registers.write(instruction.operands[0], "b32")

    def run(bank, mask):
        bits = (_active(bank, mask).astype(np.uint64) << _LANES.astype(np.uint64)).sum(1)
        put(bank.rows["u32"][into], np.repeat(bits, 32).astype(np.uint32), mask)

    return run


@opcode("bar.warp", "barrier.warp")
def _warp_barrier(instruction: Instruction, registers: Registers) -> Run:
    """The threads of a warp run in step, so that only their presence is checked."""
    members = registers.read(instruction.operands[0], "u32")

    def run(bank, mask):
        check_members(instruction, bank, mask, bank.rows["u32"][members])

    return run
