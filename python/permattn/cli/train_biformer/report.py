"""The numbers of a training: gathered once, shown as a table and as JSON."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from permattn.cli.train_biformer.trainer import Evaluation, Run

LABELS = {
    "dense": "dense (SDPA)",
    "gather": "routed, torch gather",
    "ours": "routed, permattn",
    "nudged": "the same, nudged",
}
# The first steps carry compilation and cold caches.
_WARM = 3
_LAST = 0.1


@dataclass(frozen=True, eq=False)
class Report:
    """Everything that a training found.

    Args:
        facts: about settings and machine.
        runs: in the order of a step.
    """

    facts: dict[str, Any]
    runs: list[Run]

    def find(self, kind: str) -> Run | None:
        """The run of that kind."""
        return next((run for run in self.runs if run.kind == kind), None)

    def agreement(self, other: str) -> dict[str, float] | None:
        """How far the loss of another run is from that of ours; None where one is missing."""
        ours, run = self.find("ours"), self.find(other)
        if ours is None or run is None:
            return None
        gaps = [abs(a - b) for a, b in zip(ours.losses, run.losses, strict=True)]
        last = max(1, round(_LAST * len(gaps)))
        return {
            "first_step": gaps[0],
            "median": statistics.median(gaps),
            "largest": max(gaps),
            "mean_loss_of_last_tenth": abs(
                statistics.fmean(ours.losses[-last:]) - statistics.fmean(run.losses[-last:])
            ),
            "accuracy": abs(last_evaluation(ours).accuracy - last_evaluation(run).accuracy),
        }

    def to_json(self) -> dict[str, Any]:
        ours = self.find("ours")
        rows = []
        for run in self.runs:
            seconds = seconds_per_step(run)
            row: dict[str, Any] = {
                "kind": run.kind,
                "name": LABELS[run.kind],
                "final_loss": final_loss(run),
                "final_accuracy": last_evaluation(run).accuracy,
                "validation_loss": last_evaluation(run).loss,
                "seconds_per_step": seconds,
                "images_per_second": self.facts["settings"]["batch"] / seconds,
                "steps": len(run.losses),
            }
            if ours is not None:
                row["time_over_ours"] = seconds / seconds_per_step(ours)
            row["evaluations"] = [
                {"step": e.step, "loss": e.loss, "accuracy": e.accuracy} for e in run.evaluations
            ]
            row["losses"] = [round(loss, 6) for loss in run.losses]
            rows.append(row)
        agreement = {k: found for k in ("gather", "nudged") if (found := self.agreement(k))}
        return {**self.facts, "loss_gap_to_ours": agreement, "runs": rows}


def final_loss(run: Run) -> float:
    """Mean training loss of the last tenth of the steps."""
    return statistics.fmean(run.losses[-max(1, round(_LAST * len(run.losses))) :])


def last_evaluation(run: Run) -> Evaluation:
    """The validation after the last step."""
    return run.evaluations[-1]


def seconds_per_step(run: Run) -> float:
    """Median, forward to optimiser; the first steps do not count."""
    return statistics.median(run.seconds[_WARM:] or run.seconds)


def print_report(console: Console, report: Report) -> None:
    """The table, and in words what it means."""
    facts = report.facts
    console.print()
    console.print(f"[bold]{facts['model']}[/]", highlight=False)
    console.print(f"{facts['task']}; chance is {facts['chance']:.1%}", highlight=False)
    console.print()
    console.print(_table(report))
    console.print(
        "[dim]One seed, one order of batches, the same weights to begin with; the runs take turns "
        "at every step. Loss: mean of the last tenth of the steps. Seconds: median of forward, "
        "backward and optimiser.[/]",
        highlight=False,
    )
    gather, nudged = report.agreement("gather"), report.agreement("nudged")
    if gather is not None and nudged is not None:
        console.print(
            f"Gather and ours are one function: their losses differ by {gather['first_step']:.1e} "
            f"at the first step, by {gather['median']:.1e} in the median. Ours against itself, "
            "weights moved by one part in ten million at every step: "
            f"{nudged['first_step']:.1e} and {nudged['median']:.1e}.",
            highlight=False,
        )


def _table(report: Report) -> Table:
    table = Table()
    table.add_column("attention")
    for name in ("loss", "accuracy", "s / step", "images / s", "over ours"):
        table.add_column(name, justify="right")
    ours = report.find("ours")
    for run in report.runs:
        seconds = seconds_per_step(run)
        ratio = "" if ours is None else f"{seconds / seconds_per_step(ours):.2f}x"
        table.add_row(
            LABELS[run.kind],
            f"{final_loss(run):.4f}",
            f"{last_evaluation(run).accuracy:.1%}",
            f"{seconds:.3f}",
            f"{report.facts['settings']['batch'] / seconds:,.0f}",
            ratio,
        )
    return table
