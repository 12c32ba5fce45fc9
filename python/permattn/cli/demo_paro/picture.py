"""The sheet: the dense run step by step, final frames and their errors, speed, and head maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colors
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from permattn.cli.demo_paro.headmaps import HeadMap
from permattn.cli.demo_paro.latents import decode
from permattn.cli.demo_paro.quality import Quality
from permattn.cli.demo_paro.report import Report, decibels
from permattn.cli.demo_paro.runs import Run, Variant

_INK, _FAINT, _PAPER = "#1c1d22", "#6b6f7a", "#ffffff"
_DENSE, _SPARSE, _RAW = "#b9bcc6", "#d1495b", "#e8a0a9"
_TRAIL, _TILES, _HEADS_PER_ROW = 6, 6, 2
# Differences from the dense frames are shown that many times as large.
_GAIN = 8
_WIDTH = 15.0
_MAPS = ("before", "after", "mask")


def draw(path: Path, report: Report) -> None:
    """Writes the PNG."""
    frame = report.dense[0].frames.shape[1] / report.dense[0].frames.shape[2]
    # Inches of the parts: title, trail, tiles, bars, heads.
    trail, tiles = min(_TRAIL, len(report.dense[0].trail)), len(_chosen(report))
    strip = _WIDTH * 0.95 / trail * frame + 0.3
    pairs = 2 * _WIDTH * 0.95 / tiles * frame + 0.95
    rows = -(-len(report.heads) // _HEADS_PER_ROW)
    bars = 0.5 + 0.15 * (len(report.runs) + 1)
    parts = (1.3, strip, pairs, bars, 2.75 * rows)
    height = sum(parts) + 1.7
    figure = Figure(figsize=(_WIDTH, height), facecolor=_PAPER, dpi=130)
    FigureCanvasAgg(figure)
    top = height - 0.25
    edges = []
    for part in parts:
        edges.append((top - part, part))
        top -= part + 0.28
    _draw_title(figure, _place(edges[0], height), report)
    _draw_trail(figure, _place(edges[1], height), report.dense[0])
    _draw_tiles(figure, _place(edges[2], height), report)
    _draw_bars(figure, _place(edges[3], height), report)
    _draw_heads(figure, _place(edges[4], height), report.heads)
    figure.savefig(path, facecolor=_PAPER)


def _place(edge: tuple[float, float], height: float) -> tuple[float, float]:
    """(bottom, height) as shares of the figure."""
    return edge[0] / height, edge[1] / height


def _draw_title(figure: Figure, place: tuple[float, float], report: Report) -> None:
    axis = _bare(figure.add_axes((0.025, place[0], 0.95, place[1])))
    facts = report.facts
    density = min(report.plans, key=lambda plan: plan[1])[0]
    run, quality = report.find(Variant(density, facts["dtype"])) or _chosen(report)[0]
    axis.text(
        0,
        1.0,
        f"{facts['tokens']:,} tokens, {run.variant.density:.0%} of the attention: "
        f"{report.speedups(run)[0]:.1f}x faster, {decibels(quality.psnr)} against the dense video",
        fontsize=20,
        fontweight="bold",
        color=_INK,
        va="top",
    )
    lines = [
        f"{facts['model']}; {facts['steps']} steps of {facts['scheduler']}; {facts['dtype']} on "
        f"{facts['device']} ({facts['threads']} threads), backend {facts['backend']}; calibrated "
        f"in {report.calibration_seconds:.0f} s on another video.",
        facts["note"],
        *report.remarks()[:2],
    ]
    for i, line in enumerate(lines):
        axis.text(
            0,
            0.58 - 0.2 * i,
            line,
            fontsize=10,
            color=_SPARSE if i == 1 else _FAINT,
            fontweight="bold" if i == 1 else "normal",
            va="top",
        )


def _draw_trail(figure: Figure, place: tuple[float, float], dense: Run) -> None:
    """One frame of the dense run after some of its steps."""
    last = len(dense.trail) - 1
    chosen = np.unique(np.linspace(0, last, _TRAIL).round().astype(int))
    for i, step in enumerate(chosen):
        frames = decode(dense.trail[step])
        name = f"dense, after step {step} of {last}" if step else "the start: a noised video"
        axis = _tile(figure, place, (i, len(chosen)), (0, 1))
        _show(axis, frames[len(frames) // 2], name)


def _draw_tiles(figure: Figure, place: tuple[float, float], report: Report) -> None:
    """Final frames of some runs, and below each its difference from the dense one."""
    dense = report.dense[0].frames
    middle = len(dense) // 2
    chosen = _chosen(report)
    for i, (run, quality) in enumerate(chosen):
        frames = run.frames
        attention, _ = report.speedups(run)
        _show(
            _tile(figure, place, (i, len(chosen)), (0, 2)),
            frames[middle],
            run.variant.name,
            f"{decibels(quality.psnr)}, SSIM {quality.ssim:.3f}, attention {attention:.1f}x",
        )
        error = ((frames[middle] - dense[middle]) * _GAIN + 0.5).clamp(0, 1)
        _show(
            _tile(figure, place, (i, len(chosen)), (1, 2)),
            error,
            f"difference from dense, x{_GAIN}",
        )


def _chosen(report: Report) -> list[tuple[Run, Quality]]:
    """Every density without quantisation, the one without reordering, then quantised ones."""
    plain = report.facts["dtype"]
    pairs = list(zip(report.runs, report.quality, strict=True))
    unordered = [pair for pair in pairs if not pair[0].variant.ordered]
    first = [p for p in pairs if p[0].variant.ordered and p[0].variant.precision == plain]
    shown = unordered[0][0].variant.density
    quantised = [
        found
        for name in ("int4", "int8+int8", "int8")
        if (found := report.find(Variant(shown, name))) is not None
    ]
    return [*first[: _TILES - 1 - bool(quantised)], *unordered, *quantised][:_TILES]


def _draw_bars(figure: Figure, place: tuple[float, float], report: Report) -> None:
    dense = report.dense_run
    runs = [dense, *report.runs]
    names = ["dense (SDPA)", *(run.variant.name for run in report.runs)]
    for i, (label, of) in enumerate(
        (("attention of one step", lambda r: r.attention), ("one step", lambda r: r.step))
    ):
        axis = figure.add_axes((0.14 + 0.5 * i, place[0], 0.335, 0.9 * place[1]))
        values = [of(run) / 1000 for run in runs]
        shades = [_DENSE, *(_SPARSE if r.variant.ordered else _RAW for r in report.runs)]
        where = np.arange(len(runs))[::-1]
        axis.barh(where, values, color=shades, height=0.76)
        for y, value in zip(where, values, strict=True):
            ratio = "" if y == where[0] else f"   {values[0] / max(value, 1e-9):.1f}x"
            axis.text(
                value + 0.01 * max(values), y, f"{value:.2f} s{ratio}", va="center", fontsize=8
            )
        axis.set(xlim=(0, 1.2 * max(values)), xticks=(), ylim=(-0.6, len(runs) - 0.4))
        axis.set_yticks(where, names, fontsize=8, color=_INK)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        axis.set_title(label, fontsize=12, fontweight="bold", color=_INK, loc="left", pad=4)


def _draw_heads(figure: Figure, place: tuple[float, float], heads: list[HeadMap]) -> None:
    rows = -(-len(heads) // _HEADS_PER_ROW)
    wide, high = 0.95 / _HEADS_PER_ROW, place[1] / rows
    size = 0.295 * wide
    tall = size * figure.get_figwidth() / figure.get_figheight()
    for i, head in enumerate(heads):
        left = 0.025 + wide * (i % _HEADS_PER_ROW)
        bottom = place[0] + place[1] - high * (i // _HEADS_PER_ROW + 1)
        captions = (
            "attention, read as FHW",
            "attention, in its own order" if head.order != "FHW" else "its own order is FHW",
            f"kept: {head.density:.0%} of the blocks",
        )
        for j, kind in enumerate(_MAPS):
            axis = figure.add_axes((left + j * (size + 0.012 * wide), bottom, size, tall))
            _draw_map(axis, head, kind)
            axis.set_title(captions[j], fontsize=8.5, color=_FAINT, loc="left", pad=3)
            if j == 0:
                axis.text(
                    0,
                    1.16,
                    f"{head.name}: {head.order} holds {head.kept:.1%} of the attention in "
                    f"{head.density:.0%} of the blocks, FHW {head.kept_before:.1%}",
                    fontsize=9,
                    fontweight="bold",
                    color=_INK,
                    transform=axis.transAxes,
                )


def _draw_map(axis: Any, head: HeadMap, kind: str) -> None:
    axis.set(xticks=(), yticks=())
    axis.spines[:].set_visible(False)
    if kind == "mask":
        shades = colors.ListedColormap(("#15131c", "#f2c14e"))
        axis.imshow(head.mask.numpy(), cmap=shades, interpolation="nearest", vmin=0, vmax=1)
        return
    # Mass over what an even spread would give: black is a thirtieth, bright is a lot more.
    values = getattr(head, kind) * head.mask.shape[1]
    norm = colors.LogNorm(vmin=0.03, vmax=max(float(head.after.max()) * head.mask.shape[1], 1.0))
    axis.imshow(values.clamp_min(0.03).numpy(), cmap="magma", norm=norm, interpolation="nearest")


def _tile(
    figure: Figure, place: tuple[float, float], column: tuple[int, int], row: tuple[int, int]
) -> Any:
    """Axes of one cell; column and row are (number, count). A title fits above, a line below."""
    wide, high = 0.95 / column[1], place[1] / row[1]
    above, below = 0.22 / figure.get_figheight(), 0.24 / figure.get_figheight()
    if row[1] == 1 or row[0] > 0:
        below = 0.0
    bottom = place[0] + place[1] - high * (row[0] + 1) + below
    return figure.add_axes((0.025 + wide * column[0], bottom, 0.965 * wide, high - above - below))


def _show(axis: Any, frame: Tensor, title: str, below: str = "") -> None:
    axis.imshow(frame.numpy(), interpolation="antialiased", aspect="auto")
    axis.set(xticks=(), yticks=())
    axis.spines[:].set_visible(False)
    axis.set_title(
        title, fontsize=9.5, color=_INK, loc="left", pad=3, fontweight="bold" if below else "normal"
    )
    if below:
        axis.set_xlabel(below, fontsize=8, color=_FAINT, loc="left", labelpad=2)


def _bare(axis: Any) -> Any:
    axis.set_axis_off()
    return axis
