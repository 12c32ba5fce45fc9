"""The sheet of a training: losses, accuracy, how far equal runs drift apart, and time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from permattn.cli.train_biformer.report import LABELS, Report, last_evaluation, seconds_per_step
from permattn.cli.train_biformer.trainer import Run

_INK, _FAINT, _GRID, _PAPER = "#1c1d22", "#6b6f7a", "#e6e7ec", "#ffffff"
_COLOURS = {"dense": "#8d93a5", "gather": "#2a78b8", "ours": "#d1495b", "nudged": "#e9a23b"}
# Ours is drawn thin and dashed over gather: where both curves are one, both are seen.
_WIDTHS = {"dense": 1.8, "gather": 4.2, "ours": 1.7, "nudged": 1.2}
_STYLES: dict[str, Any] = {"dense": "-", "gather": "-", "ours": "-", "nudged": (0, (3, 2))}
_SMOOTH = 0.04


def draw_curves(path: Path, report: Report) -> None:
    """Writes the PNG."""
    figure = Figure(figsize=(15.0, 8.6), facecolor=_PAPER, dpi=130)
    FigureCanvasAgg(figure)
    _draw_title(figure, report)
    _draw_losses(figure.add_axes((0.055, 0.085, 0.46, 0.68)), report)
    _draw_accuracy(figure.add_axes((0.60, 0.49, 0.375, 0.275)), report)
    gaps = report.agreement("gather") is not None and report.agreement("nudged") is not None
    if gaps:
        _draw_gaps(figure.add_axes((0.60, 0.085, 0.175, 0.27)), report)
    left = 0.845 if gaps else 0.66
    _draw_times(figure.add_axes((left, 0.085, 0.975 - left, 0.27)), report)
    figure.savefig(path, facecolor=_PAPER)


def _draw_title(figure: Figure, report: Report) -> None:
    facts = report.facts
    names = {kind: run for kind in LABELS if (run := report.find(kind)) is not None}
    best = names.get("ours") or next(iter(names.values()))
    title = (
        f"BiFormer from scratch on {len(best.losses):,} batches of photographs: "
        f"{last_evaluation(best).accuracy:.0%} of unseen crops recognised"
    )
    figure.text(0.025, 0.955, title, fontsize=19, fontweight="bold", color=_INK, va="center")
    lines = (
        f"{facts['model']}.",
        f"{facts['task']}; chance is {facts['chance']:.1%}.",
        f"One seed, one order of batches, the same weights to begin with. fp32 on "
        f"{facts['settings']['device']} (threads: {facts['threads']}), backend {facts['backend']}, "
        f"torch {facts['torch']}.",
    )
    for i, line in enumerate(lines):
        figure.text(0.025, 0.912 - 0.027 * i, line, fontsize=10, color=_FAINT, va="center")


def _draw_losses(axis: Any, report: Report) -> None:
    for run in report.runs:
        losses = np.asarray(run.losses)
        steps = np.arange(1, len(losses) + 1)
        colour = _COLOURS[run.kind]
        if run.kind in ("dense", "ours"):
            axis.plot(steps, losses, color=colour, linewidth=0.5, alpha=0.22)
        axis.plot(steps, _smooth(losses), label=LABELS[run.kind], **_line(run))
    axis.set_xlim(1, max(2, len(report.runs[0].losses)))
    _dress(axis, "training loss", "step")
    axis.legend(frameon=False, fontsize=10, labelcolor=_INK, handlelength=2.6)


def _draw_accuracy(axis: Any, report: Report) -> None:
    for run in report.runs:
        steps = [e.step for e in run.evaluations]
        values = [100 * e.accuracy for e in run.evaluations]
        # A lone validation is a point.
        axis.plot(steps, values, marker="o", markersize=3.2, **_line(run))
    chance = 100 * report.facts["chance"]
    axis.axhline(chance, color=_FAINT, linewidth=0.9, linestyle=(0, (1, 2)))
    axis.text(1, chance + 1.5, " chance", color=_FAINT, fontsize=9, ha="left", va="bottom")
    axis.set_xlim(0, max(2, len(report.runs[0].losses)))
    axis.set_ylim(0, 102)
    count = report.facts["validation_crops"]
    _dress(axis, f"accuracy on {count} validation crops, %", "step")


def _draw_gaps(axis: Any, report: Report) -> None:
    """Distance of losses between ours and the runs that compute the same function."""
    ours = report.find("ours")
    assert ours is not None
    for kind in ("gather", "nudged"):
        run = report.find(kind)
        assert run is not None
        gap = np.abs(np.asarray(run.losses) - np.asarray(ours.losses))
        name = "gather" if kind == "gather" else "ours, nudged by 1e-7"
        # Equal losses are drawn at the foot: a logarithm has no zero.
        gap = np.maximum(_smooth(gap), 1e-8)
        steps = np.arange(1, len(gap) + 1)
        axis.semilogy(steps, gap, color=_COLOURS[kind], linewidth=1.8, label=name)
    axis.set_xlim(1, max(2, len(ours.losses)))
    _dress(axis, "loss, distance to ours", "step")
    axis.legend(frameon=False, fontsize=8.5, labelcolor=_INK, handlelength=1.4, loc="lower right")


def _draw_times(axis: Any, report: Report) -> None:
    runs = [run for run in report.runs if run.kind != "nudged"]
    where = np.arange(len(runs))[::-1]
    values = [1000 * seconds_per_step(run) for run in runs]
    axis.barh(where, values, color=[_COLOURS[run.kind] for run in runs], height=0.62)
    ours = report.find("ours")
    for y, value, run in zip(where, values, runs, strict=True):
        text = f"{value:,.0f} ms"
        if ours is not None and run is not ours:
            text += f"\n{value / (1000 * seconds_per_step(ours)):.2f}x ours"
        axis.text(value + 0.02 * max(values), y, text, va="center", fontsize=9, color=_INK)
    axis.set(xlim=(0, 1.45 * max(values)), xticks=(), ylim=(len(runs) - 3.6, len(runs) - 0.4))
    axis.set_yticks(where, [run.kind for run in runs], fontsize=10, color=_INK)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title("time of a step", fontsize=12, fontweight="bold", color=_INK, loc="left")


def _line(run: Run) -> dict[str, Any]:
    return {
        "color": _COLOURS[run.kind],
        "linewidth": _WIDTHS[run.kind],
        "linestyle": _STYLES[run.kind],
        "alpha": 0.55 if run.kind == "gather" else 1.0,
    }


def _smooth(values: np.ndarray) -> np.ndarray:
    """A centred mean over a few per cent of the steps, shorter at both ends."""
    half = int(_SMOOTH * len(values) / 2)
    total = np.concatenate(([0.0], np.cumsum(values)))
    i = np.arange(len(values))
    low, high = np.maximum(i - half, 0), np.minimum(i + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def _dress(axis: Any, title: str, below: str) -> None:
    axis.set_title(title, fontsize=12, fontweight="bold", color=_INK, loc="left")
    axis.set_xlabel(below, fontsize=9, color=_FAINT)
    axis.tick_params(which="both", colors=_FAINT, labelsize=9, length=0)
    axis.grid(True, color=_GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[:].set_visible(False)
