"""Results: one JSON object a line and a case, with everything needed to judge and repeat it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.clock import Samples
from bench.digits import rounded
from bench.gate import Verdict
from bench.registry import CASES, Goal

ALL_CORES = Path("bench/results/cpu.jsonl")
ONE_THREAD = Path("bench/results/cpu-1-thread.jsonl")


@dataclass
class Row:
    """The result of one case.

    runs: contender -> ms (median), p10, p90, kept and tried samples, quiet, gflop of the selected
        blocks, gflops, density (of causal pairs where the plan is causal); where heads of known
        attention are planned, recall and least_recall: the share of it kept, mean and worst head.
    goals: name -> value, target, met, slow, fast, and the ratio to our own dense list.
    gate: contender -> error from float64, plain torch's error, bound, ok.
    """

    case: str
    group: str
    title: str
    shape: str
    backend: str
    machine: dict[str, Any]
    commit: str
    dirty: bool
    utc: str
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    goals: dict[str, dict[str, Any]] = field(default_factory=dict)
    gate: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def is_right(self) -> bool:
        return all(x["ok"] for x in self.gate.values())

    def add_verdict(self, name: str, verdict: Verdict) -> None:
        self.gate[name] = {
            "error": verdict.error,
            "torchs": verdict.torchs,
            "bound": verdict.bound,
            "ok": verdict.ok,
        }

    def add_run(
        self, name: str, samples: Samples, flops: float, pairs: float, density: float | None
    ) -> None:
        self.runs[name] = {
            "ms": samples.median,
            "p10": samples.quantile(0.1),
            "p90": samples.quantile(0.9),
            "kept": len(samples.used),
            "tried": samples.tried,
            "quiet": samples.is_quiet,
            "gflop": flops / 1e9,
            "gflops": flops / samples.median / 1e6,
            "pairs": pairs,
            "density": density,
        }

    def add_goal(self, goal: Goal) -> None:
        """Reads a ratio off the runs; a goal whose runs are missing (gate, threads) is left out."""
        if goal.slow not in self.runs or goal.fast not in self.runs:
            return
        value = self._ratio(goal.slow, goal.fast)
        if goal.per_pair:
            value *= self.runs[goal.fast]["pairs"] / self.runs[goal.slow]["pairs"]
        self.add_value(goal, value)

    def add_value(self, goal: Goal, value: float) -> None:
        own = None
        if goal.own is not None and goal.own in self.runs:
            own = self._ratio(goal.own, goal.fast)
        own_met = None
        if own is not None and goal.own_target is not None:
            own_met = own >= goal.own_target
        self.goals[goal.name] = {
            "value": value,
            "target": goal.target,
            "at_most": goal.at_most,
            "met": goal.is_met(value),
            "slow": goal.slow,
            "fast": goal.fast,
            "own": own,
            "own_target": goal.own_target,
            "own_met": own_met,
        }

    def _ratio(self, slow: str, fast: str) -> float:
        return self.runs[slow]["ms"] / self.runs[fast]["ms"]


def break_even(rows: Sequence[Row]) -> str:
    """From which measured length on sparse prefill, planning counted, is ahead of dense torch."""
    sizes = {case.name: case.shape.num_tokens for case in CASES if case.group == "length"}
    ahead = {
        sizes[row.case]: goal["value"] >= 1.0
        for row in rows
        if row.case in sizes
        for goal in row.goals.values()
    }
    if not ahead:
        return ""
    behind = [n for n, is_ahead in ahead.items() if not is_ahead]
    paying = [n for n in ahead if n > max(behind, default=0)]
    if not paying:
        return f"Sparse prefill is behind SDPA at every length up to {max(ahead)} tokens."
    shortest = "" if behind else ", the shortest measured"
    return (
        f"Sparse prefill, planning included, is ahead of SDPA from {min(paying)} tokens{shortest}."
    )


def load(path: Path) -> list[Row]:
    """All rows of a file, in order; an absent file has none."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Row(**json.loads(line)) for line in lines if line.strip()]


def merge(path: Path, row: Row) -> None:
    """Writes a row into a file in place of an older one of the same case; other rows stay."""
    rows = [r for r in load(path) if r.case != row.case] + [row]
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(
        "".join(json.dumps(rounded(asdict(r)), sort_keys=False) + "\n" for r in rows),
        encoding="utf-8",
    )
    os.replace(beside, path)
