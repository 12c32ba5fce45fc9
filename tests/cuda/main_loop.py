"""The main loop of a kernel for sm_90a in its disassembly: what one tile of keys costs a warp.

Counted is the shortest way round the loop: a tile whose keys are all seen, and which moves no row's
maximum. It falls into three spans by the loop's two waits (`csrc/cuda/sm90/math.cuh`): until Q K^T
is done, while P V is under way, and after it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from machine_code import INSTRUCTION

LABEL = re.compile(r"(\.L_\w+):")
TARGET = re.compile(r"`\((\.L_\w+)\)")
FIRST_WAIT, LAST_WAIT = "gsb0, 0x1", "gsb0, 0x0"
# Pipes of a quarter of a multiprocessor, of CUDA's programming guide (throughput of native
# arithmetic instructions, 9.0): float32 sums and products, and integer products; everything else
# that is done lane by lane; special functions. What is in none takes an issue slot alone.
FLOAT = frozenset({"FADD", "FMUL", "FFMA", "IMAD", "IDP", "HADD2", "HMUL2", "HFMA2"})
LOGIC = frozenset(
    {
        *("FMNMX", "FSETP", "FSEL", "FCHK", "ISETP", "IADD3", "LOP3", "PLOP3", "SHF", "SEL"),
        *("PRMT", "LEA", "MOV", "VIADD", "VIMNMX", "IABS", "IMNMX", "F2FP", "P2R", "R2P"),
    }
)
SPECIAL = frozenset({"MUFU"})
ISSUE_ONLY = frozenset(
    {
        *("BRA", "BSSY", "BSYNC", "NOP", "WARPSYNC", "ELECT", "DEPBAR", "WARPGROUP", "YIELD"),
        *("HGMMA", "IGMMA", "QGMMA", "LDS", "STS", "LDC", "LDG", "SHFL", "VOTE", "SYNCS", "S2R"),
        *("R2UR", "UMOV", "UIADD3", "ULEA", "ULOP3", "UIMAD", "USHF", "USEL", "UISETP", "ULDC"),
        *("VOTEU", "S2UR", "CS2R", "FENCE", "UPRMT", "BAR"),
    }
)
PIPES = ("issue", "float", "logic", "special")
"""What a span is counted in, in the order of a `Span`."""

Span = list[int]


@dataclass(frozen=True)
class _Line:
    opcode: str
    rest: str
    is_guarded: bool


def spans_of_listing(listing: Sequence[str]) -> list[Span]:
    """(issue, float, logic, special) of the loop's three spans, in instructions of a warp.

    Raises:
        ValueError: there is no such loop, or an opcode that no pipe is known for.
    """
    lines, labels = _read(listing)
    begin, end = _loop(lines, labels)
    spans = [[0, 0, 0, 0] for _ in range(3)]
    at = 0
    for i in _shortest_way(lines, labels, begin, end):
        opcode = lines[i].opcode
        pipe = next((p for p, ops in enumerate((FLOAT, LOGIC, SPECIAL)) if opcode in ops), None)
        if pipe is None and opcode not in ISSUE_ONLY:
            raise ValueError(f"opcode: wants one whose pipe is known, got {opcode}")
        spans[at][0] += 1
        if pipe is not None:
            spans[at][1 + pipe] += 1
        if _is_wait(lines[i]):
            at += 1
    if at != 2:
        raise ValueError(f"loop: wants two waits for products, got {at}")
    return spans


def _read(listing: Sequence[str]) -> tuple[list[_Line], dict[str, int]]:
    """Instructions, and the index of the one that follows each label."""
    lines: list[_Line] = []
    labels: dict[str, int] = {}
    for text in listing:
        label = LABEL.match(text)
        if label:
            labels[label[1]] = len(lines)
        found = INSTRUCTION.match(text)
        if found:
            lines.append(_Line(found["opcode"], found["rest"], found["guard"] is not None))
    return lines, labels


def _is_wait(line: _Line) -> bool:
    return line.opcode == "WARPGROUP" and line.rest.strip() in (FIRST_WAIT, LAST_WAIT)


def _target(line: _Line, labels: dict[str, int]) -> int | None:
    found = TARGET.search(line.rest) if line.opcode == "BRA" else None
    return labels[found[1]] if found else None


def _loop(lines: Sequence[_Line], labels: dict[str, int]) -> tuple[int, int]:
    """First and last instruction of the innermost loop round the wait that leaves P V under way."""
    waits = [i for i, x in enumerate(lines) if _is_wait(x) and x.rest.strip() == FIRST_WAIT]
    if len(waits) != 1:
        raise ValueError(f"loop: wants one wait that leaves a product under way, got {len(waits)}")
    loops = []
    for i, line in enumerate(lines):
        to = _target(line, labels)
        if to is not None and to <= waits[0] <= i:
            loops.append((i - to, to, i))
    if not loops:
        raise ValueError("loop: none is round the wait")
    _, begin, end = min(loops)
    return begin, end


def _shortest_way(
    lines: Sequence[_Line], labels: dict[str, int], begin: int, end: int
) -> list[int]:
    """Fewest instructions from the first to the last one of a loop, forwards alone."""
    before: dict[int, int] = {}
    length = {begin: 1}
    for i in range(begin, end):
        if i not in length:
            continue
        to = _target(lines[i], labels)
        onward = [i + 1] if to is None or lines[i].is_guarded else []
        if to is not None and i < to <= end:
            onward.append(to)
        for j in onward:
            if length[i] + 1 < length.get(j, len(lines) + 1):
                length[j], before[j] = length[i] + 1, i
    if end not in length:
        raise ValueError("loop: its end is not reached from its begin")
    way = [end]
    while way[-1] != begin:
        way.append(before[way[-1]])
    return way[::-1]
