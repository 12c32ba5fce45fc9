"""Kernels with one thing missing: whatever keeps threads and copies apart, left out one by one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import ptxsim

# What is left out, and what stands there instead.
TARGETS = {
    "bar.sync": (r"bar\.sync\b[^;]*;", ""),
    "cp.async.wait_group": (r"cp\.async\.wait_group\b[^;]*;", ""),
    "fence.proxy.async": (r"fence\.proxy\.async[^;]*;", ""),
    "fence.mbarrier_init": (r"fence\.mbarrier_init[^;]*;", ""),
    "wgmma.fence": (r"wgmma\.fence\b[^;]*;", ""),
    "wgmma.commit_group": (r"wgmma\.commit_group\b[^;]*;", ""),
    "wgmma.wait_group": (r"wgmma\.wait_group\b[^;]*;", ""),
    "mbarrier.init": (r"mbarrier\.init\b[^;]*;", ""),
    "mbarrier.arrive": (r"mbarrier\.arrive\.shared[^;]*;", ""),
    # An arrival that expects no bytes; a wait that is over at once.
    "expect_tx": (
        r"mbarrier\.arrive\.expect_tx(\.\S+) (\S+ \S+), [^;]*;",
        r"mbarrier.arrive\1 \2;",
    ),
    "mbarrier wait": (r"mbarrier\.try_wait\.\S+ ([%\w]+), [^;]*;", r"setp.eq.u32 \1, 0, 0;"),
}


@dataclass
class Outcome:
    """How many mutants of a kind there were, how they were caught, and those that were not."""

    made: int = 0
    caught: Counter[str] = field(default_factory=Counter)
    survivors: list[str] = field(default_factory=list)


def mutants(ptx: str, target: str, lines: frozenset[int]) -> Iterator[tuple[str, str]]:
    """(where, text): every occurrence on one of the lines, left out by itself."""
    pattern, instead = TARGETS[target]
    for match in re.finditer(pattern, ptx):
        line = ptx.count("\n", 0, match.start()) + 1
        if line not in lines:
            continue
        yield (
            f"line {line}: {match.group()}",
            (ptx[: match.start()] + match.expand(instead) + ptx[match.end() :]),
        )


def try_all(ptx: str, lines: frozenset[int], is_right: Callable[[str], bool]) -> dict[str, Outcome]:
    """Outcomes by target, of those that occur.

    Args:
        lines: those that run; what never runs cannot be missed.
        is_right: runs a text and looks at its results.
    """
    outcomes = {}
    for target in TARGETS:
        outcome = Outcome()
        for where, text in mutants(ptx, target, lines):
            outcome.made += 1
            try:
                right = is_right(text)
            except ptxsim.SimulationError as error:
                outcome.caught[str(error).split(":")[0].split("  [")[0][:60]] += 1
                continue
            if right:
                outcome.survivors.append(where)
            else:
                outcome.caught["wrong numbers"] += 1
        if outcome.made:
            outcomes[target] = outcome
    return outcomes


def told(outcomes: dict[str, Outcome]) -> str:
    """One line per target."""
    lines = []
    for target, o in outcomes.items():
        lines.append(f"{target}: {o.made - len(o.survivors)} of {o.made} caught, {dict(o.caught)}")
        lines += [f"    survives: {where}" for where in o.survivors]
    return "\n".join(lines)
