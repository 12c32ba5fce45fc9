"""The memory part of `permattn info --explain`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from permattn.calibrate.memory import LayerShape, layer_memory, most_heads_that_fit
from permattn.cli.errors import UserError
from permattn.patterns.mminference import HeadPattern
from permattn.patterns.mminference.config import PatternName

_GIB = 2**30
_GB = 10**9


@dataclass(frozen=True)
class MemoryQuestion:
    """What the command line says about memory.

    Args:
        frame: "HEIGHTxWIDTH" in tokens.
        layers: layers whose keys and values are in memory.
        weights_gb, memory_gb: in units of 10**9 bytes, as devices are sold; None = not asked.
    """

    pattern: str = "auto"
    frame: str = "16x16"
    heads_per_pass: int | None = None
    layers: int = 1
    weights_gb: float = 0.0
    memory_gb: float | None = None


def parse_pattern(name: str) -> HeadPattern:
    """The pattern of this name at its default size."""
    if name not in get_args(PatternName):
        raise UserError(f"--pattern: wants {', '.join(get_args(PatternName))}, got {name!r}")
    return HeadPattern(name)  # type: ignore[arg-type]


def parse_frame(text: str) -> tuple[int, int]:
    """Height and width from "16x16"."""
    height, cross, width = text.partition("x")
    if not (cross and height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise UserError(f"--frame: wants HEIGHTxWIDTH in tokens such as 16x16, got {text!r}")
    return int(height), int(width)


def memory_report(shape: LayerShape, question: MemoryQuestion) -> dict[str, Any]:
    """One layer's bytes, what is held beside it, and whether that fits.

    Raises:
        UserError: heads per pass that cut a group of query heads.
    """
    try:
        layer = layer_memory(shape, question.heads_per_pass)
    except ValueError as e:
        raise UserError(f"--heads-per-pass: {e}") from e
    beside = (question.layers - 1) * (layer.k + layer.v) + int(question.weights_gb * _GB)
    report: dict[str, Any] = {
        **layer.to_json(),
        "pattern": question.pattern,
        "layers": question.layers,
        "beside": beside,
        "total": layer.peak + beside,
    }
    if question.memory_gb is not None:
        available = int(question.memory_gb * _GB)
        most = most_heads_that_fit(shape, available - beside)
        report["available"] = available
        report["fits"] = report["total"] <= available
        report["most_heads_per_pass"] = None if most is None else most.heads_per_pass
        report["total_at_most_heads"] = None if most is None else most.peak + beside
    return report


def print_memory(console: Console, report: dict[str, Any]) -> None:
    """The table, and in words whether it fits."""
    console.print(
        f"[bold]Memory[/] of one layer, pattern {report['pattern']}, "
        f"{report['heads_per_pass']} heads per pass",
        highlight=False,
    )
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, key in (
        ("q", "q"),
        ("k and v", "kv"),
        ("out", "out"),
        ("plan", "plan"),
        ("kept per prompt, for all layers", "prompt"),
        ("alive while planning, at most", "planner_peak"),
        ("output and lse of a pass", "pass_out"),
        ("float32 state between kernels", "state"),
    ):
        value = report["k"] + report["v"] if key == "kv" else report[key]
        table.add_row(name, _size(value))
    table.add_section()
    table.add_row("peak of the layer", _size(report["peak"]))
    if report["beside"]:
        held = f"k and v of {report['layers'] - 1} other layers, weights"
        table.add_row(held, _size(report["beside"]))
        table.add_row("together", _size(report["total"]))
    console.print(table)
    if "available" in report:
        console.print(_verdict(report), highlight=False)


def _verdict(report: dict[str, Any]) -> str:
    room = _size(report["available"])
    most = report["most_heads_per_pass"]
    if most is None:
        return f"[red]Does not fit {room}, not even one key head at a time.[/]"
    at_most = f"{most} heads per pass need {_size(report['total_at_most_heads'])}"
    if report["fits"]:
        return f"[green]Fits {room}.[/] The most that fits: {at_most}."
    return f"[yellow]Does not fit {room}; set heads_per_pass: {at_most}.[/]"


def _size(value: int) -> str:
    return f"{value / _GIB:,.2f} GiB" if value >= _GIB else f"{value / 2**20:,.1f} MiB"
