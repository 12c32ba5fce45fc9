"""What a run prints: every ratio with its target and verdict, and how quiet the machine was."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from bench.machine import threads_text
from bench.results import Row, break_even

_MARK = {True: "[green]met[/]", False: "[red]missed[/]", None: "[dim]shown[/]"}


def print_case(console: Console, row: Row) -> None:
    """One table a case: ratio, target, verdict, the ratio to our own dense list, times.

    Below it, what planners keep of heads of known attention.
    """
    table = Table(title=f"{row.case}: {row.title}", caption=_caption(row), title_justify="left")
    for name, justify in (
        ("ratio", "left"),
        ("measured", "right"),
        ("target", "right"),
        ("", "left"),
        ("vs our dense list", "right"),
        ("ms", "right"),
        ("GFLOP/s", "right"),
    ):
        table.add_column(name, justify=justify, no_wrap=name != "ratio")  # type: ignore[arg-type]
    for name, goal in row.goals.items():
        slow, fast = row.runs[goal["slow"]], row.runs[goal["fast"]]
        table.add_row(
            name,
            _number(goal["value"]),
            _target(goal["target"], goal["at_most"]),
            _MARK[goal["met"]],
            _own(goal),
            f"{slow['ms']:.4g} / {fast['ms']:.4g}",
            f"{fast['gflops']:.0f}" if fast["gflop"] else "",
        )
    console.print(table)
    for name, run in row.runs.items():
        if "recall" in run:
            console.print(
                f"  {name}: {100 * run['density']:.1f} % of the pairs hold "
                f"{100 * run['recall']:.1f} % of the attention, of the worst head "
                f"{100 * run['least_recall']:.1f} %",
                highlight=False,
            )
    for name, verdict in row.gate.items():
        if not verdict["ok"]:
            console.print(
                f"[bold red]wrong[/]: {row.case} {name}: error {verdict['error']:.2e} from "
                f"float64, allowed {verdict['bound']:.2e}; not timed"
            )


def print_summary(console: Console, rows: Sequence[Row]) -> None:
    """How many targets are met, and which are not."""
    goals = [(row.case, name, goal) for row in rows for name, goal in row.goals.items()]
    verdicts = [met for *_, goal in goals for met in (goal["met"], goal["own_met"])]
    missed = [x for x in goals if False in (x[2]["met"], x[2]["own_met"])]
    wrong = [row.case for row in rows if not row.is_right]
    wanted = len(verdicts) - verdicts.count(None)
    if text := break_even(rows):
        console.print(text, highlight=False)
    if wanted:
        console.print(f"{verdicts.count(True)} of {wanted} targets met")
    for case, name, goal in missed:
        console.print(
            f"  missed: {case}, {name}: {_number(goal['value'])} "
            f"(target {_target(goal['target'], goal['at_most'])})"
            + (f", vs our dense list {_own_text(goal)}" if goal["own_met"] is False else ""),
            highlight=False,
        )
    if wrong:
        console.print(f"[bold red]wrong results[/] in: {', '.join(wrong)}")


def _caption(row: Row) -> str:
    facts = row.machine
    noisy = [name for name, run in row.runs.items() if run.get("quiet") is False]
    text = f"{row.shape}; {facts['cpu']}, {threads_text(facts['threads'])}, {facts['isa']}"
    if noisy:
        text += f"; measured on a busy machine, read with care: {', '.join(noisy)}"
    return text


def _number(value: float) -> str:
    return f"{value:.3g}"


def _target(target: float | None, at_most: bool) -> str:
    if target is None:
        return ""
    return f"{'<=' if at_most else '>='} {target:g}"


def _own_text(goal: dict) -> str:
    text = f"{goal['own']:.3g}"
    return text if goal["own_target"] is None else f"{text} (>= {goal['own_target']:g})"


def _own(goal: dict) -> str:
    if goal["own"] is None:
        return ""
    if goal["own_met"] is None:
        return _own_text(goal)
    return f"[{'green' if goal['own_met'] else 'red'}]{_own_text(goal)}[/]"
