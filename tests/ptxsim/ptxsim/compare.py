"""Comparisons and selections."""

from __future__ import annotations

import numpy as np

from .formats import CODECS
from .parse import Instruction
from .registers import VIEWS, Registers, put
from .steps import Run, kind_of, opcode, unknown

_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_JOIN = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _comparison(name: str, is_float: bool):
    """A function of two arrays; of floats, "u" at the end is also true where one is NaN."""
    if name == "num":
        return lambda x, y: ~(np.isnan(x) | np.isnan(y))
    if name == "nan":
        return lambda x, y: np.isnan(x) | np.isnan(y)
    name = _UNSIGNED_NAMES.get(name, name)
    if name in _COMPARE:
        # numpy says "not equal" of NaN, PTX says that only of neu.
        if is_float and name == "ne":
            return lambda x, y: (x != y) & ~(np.isnan(x) | np.isnan(y))
        return _COMPARE[name]
    function = _COMPARE[name[:-1]]
    return lambda x, y: function(x, y) | np.isnan(x) | np.isnan(y)


@opcode("setp", "set")
def _setp(instruction: Instruction, registers: Registers) -> Run:
    parts, operands = instruction.parts, instruction.operands
    kind = kind_of(instruction, VIEWS)
    is_float = kind in ("f32", "f64", "f16", "bf16")
    if kind in ("f16x2", "bf16x2"):
        raise unknown(instruction, "packed comparisons")
    compare = _comparison(parts[1], is_float)
    join = next((_JOIN[p] for p in parts[2:-1] if p in _JOIN), None)
    left, right = (registers.read(x, kind) for x in operands[1:3])
    negated = len(operands) > 3 and operands[3].startswith("!")
    other = registers.read(operands[3].lstrip("!"), "pred") if join else -1
    decode = CODECS[kind][0] if kind in ("f16", "bf16") else None
    if parts[0] == "set":
        return _set(instruction, registers, compare, join, kind, left, right)
    targets = [registers.write(x.strip(), "pred") for x in operands[0].split("|")]

    def run(bank, mask):
        rows, predicates = bank.rows[kind], bank.rows["pred"]
        x, y = rows[left], rows[right]
        result = compare(decode(x), decode(y)) if decode else compare(x, y)
        results = (result, ~result) if len(targets) == 2 else (result,)
        if join:
            with_ = ~predicates[other] if negated else predicates[other].copy()
            results = tuple(join(r, with_) for r in results)
        for target, value in zip(targets, results, strict=True):
            put(predicates[target], value, mask)

    return run


def _set(instruction, registers, compare, join, kind, left, right) -> Run:
    """set.eq.u32.f32 and the like: all ones, or 1.0, where the comparison holds."""
    target = instruction.parts[-2]
    if join or target not in ("u32", "s32", "f32") or kind in CODECS:
        raise unknown(instruction, "this form of set")
    into = registers.write(instruction.operands[0], target)
    true = np.float32(1) if target == "f32" else VIEWS[target](-1 if target == "s32" else 2**32 - 1)

    def run(bank, mask):
        rows = bank.rows[kind]
        value = np.where(compare(rows[left], rows[right]), true, type(true)(0))
        put(bank.rows[target][into], value, mask)

    return run


@opcode("selp")
def _selp(instruction: Instruction, registers: Registers) -> Run:
    kind = kind_of(instruction, VIEWS)
    into = registers.write(instruction.operands[0], kind)
    left, right = (registers.read(x, kind) for x in instruction.operands[1:3])
    which = registers.read(instruction.operands[3], "pred")

    def run(bank, mask):
        rows = bank.rows[kind]
        put(rows[into], np.where(bank.rows["pred"][which], rows[left], rows[right]), mask)

    return run


@opcode("slct")
def _slct(instruction: Instruction, registers: Registers) -> Run:
    kind, by = instruction.parts[-2], instruction.parts[-1]
    into = registers.write(instruction.operands[0], kind)
    left, right = (registers.read(x, kind) for x in instruction.operands[1:3])
    which = registers.read(instruction.operands[3], by)

    def run(bank, mask):
        rows = bank.rows[kind]
        put(rows[into], np.where(bank.rows[by][which] >= 0, rows[left], rows[right]), mask)

    return run


@opcode("testp")
def _testp(instruction: Instruction, registers: Registers) -> Run:
    tests = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "notanumber": np.isnan,
        "number": lambda x: ~np.isnan(x),
    }
    test, kind = tests[instruction.parts[1]], instruction.parts[2]
    into = registers.write(instruction.operands[0], "pred")
    source = registers.read(instruction.operands[1], kind)

    def run(bank, mask):
        put(bank.rows["pred"][into], test(bank.rows[kind][source]), mask)

    return run
