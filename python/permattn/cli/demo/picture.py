"""The sheet: film strip, headline, and for a few heads the true map beside the plan's blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colors
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from permattn.cli.demo.compare import Drawn
from permattn.cli.demo.maps import Window, attention_map, plan_map
from permattn.cli.demo.report import Report
from permattn.cli.demo.subject import SheetHead
from permattn.cli.demo.video import Clip

WHOLE_CELLS = 512
# The detail: the last tokens of the prompt, several frames of them.
DETAIL_TOKENS, DETAIL_CELLS = 2560, 320
STRIP = 8
# A first cell with that much of every row's mass is pointed out: on paper it is a hair's breadth.
SINK_SHARE = 0.1

_INK, _FAINT, _PAPER, _VOID = "#1c1d22", "#6b6f7a", "#ffffff", "#f1f1f4"
_DENSE, _SPARSE = "#b9bcc6", "#d1495b"
_KEY = (
    "True attention: black is under 3 % of what an even spread over the past would give, violet to "
    "yellow is more (logarithmic). Plan: yellow means every pair is computed, violet a few."
)
_EXPLAIN = {
    "place": "the same place in every earlier frame",
    "grid": "one place of every frame, seen by everyone",
    "spots": "a few single tokens, seen by everyone",
    "local": "this frame and its neighbours",
    "sink": "the first token",
    "place and grid": "both kinds of line",
}


def draw(
    path: Path,
    report: Report,
    clip: Clip,
    layers: dict[int, Drawn],
    heads: list[SheetHead],
    on_step: Callable[[], object] = lambda: None,
) -> None:
    """Writes the PNG."""
    width, top, row = 15.0, 4.3, 3.95
    height = top + row * len(heads)
    figure = Figure(figsize=(width, height), facecolor=_PAPER, dpi=150)
    FigureCanvasAgg(figure)
    outer = figure.add_gridspec(
        2,
        1,
        height_ratios=(top, row * len(heads)),
        hspace=1.3 / height,
        left=0.035,
        right=0.985,
        top=1.0 - 0.25 / height,
        bottom=0.35 / height,
    )
    _draw_head_line(figure, outer[0], report, clip)
    grid = outer[1].subgridspec(len(heads), 4, wspace=0.09, hspace=0.30)
    for i, head in enumerate(heads):
        axes = [figure.add_subplot(grid[i, j]) for j in range(4)]
        draw_head(axes, report.heads[i], head, layers[head.layer], first=i == 0)
        on_step()
    figure.savefig(path, facecolor=_PAPER)
    on_step()


def _draw_head_line(figure: Figure, place: Any, report: Report, clip: Clip) -> None:
    rows = place.subgridspec(3, 1, height_ratios=(1.05, 1.2, 1.5), hspace=0.32)
    title = _bare(figure.add_subplot(rows[0]))
    facts = report.facts
    title.text(
        0,
        0.95,
        f"{facts['visual_tokens']:,} visual tokens, {report.density:.1%} of all pairs computed",
        fontsize=23,
        fontweight="bold",
        color=_INK,
        va="top",
        transform=title.transAxes,
    )
    got = report.agreement
    lines = (
        f"{facts['model']}; {facts['video']}; {facts['dtype']} on {facts['device']}, "
        f"backend {facts['backend']}",
        f"error of the attention output {got.attention_error:.2%}, of the last hidden state "
        f"{got.hidden_error:.2%}; top-1 agreement {got.top1:.1%} over the last 64 positions. "
        + facts["note"].split(". ")[0].split(":")[0]
        + ".",
        _KEY,
    )
    for i, line in enumerate(lines):
        title.text(
            0,
            0.5 - 0.27 * i,
            line,
            fontsize=10,
            color=_FAINT,
            va="top",
            transform=title.transAxes,
        )
    strip = _bare(figure.add_subplot(rows[1]))
    chosen = np.linspace(0, len(clip.frames) - 1, 2 * STRIP + 1).round().astype(int)[1::2]
    gap = np.full((clip.frames.shape[1], max(2, clip.frames.shape[2] // 60), 3), 255, np.uint8)
    pieces = [x for i in chosen for x in (clip.frames[i], gap)][:-1]
    strip.imshow(np.concatenate(pieces, axis=1), aspect="auto", interpolation="antialiased")
    bars = rows[2].subgridspec(1, 3, wspace=0.12)
    names = (
        ("attention, all layers", "attention"),
        ("prefill of the language model", "prefill"),
        ("time to first token", "first_token"),
    )
    for i, (label, name) in enumerate(names):
        _draw_bars(figure.add_subplot(bars[i]), report, label, name)


def _draw_bars(axis: Any, report: Report, label: str, name: str) -> None:
    dense, sparse = (report.median(kind, name) / 1000 for kind in ("dense", "sparse"))
    axis.barh((1, 0), (dense, sparse), color=(_DENSE, _SPARSE), height=0.7)
    limit = 1.5 * max(dense, sparse)
    for y, (value, text) in enumerate(((sparse, "permattn"), (dense, "torch SDPA"))):
        axis.text(
            value + 0.015 * limit,
            y,
            f"{value:.2f} s  {text}",
            va="center",
            fontsize=9.5,
            color=_INK,
        )
    axis.set(xlim=(0, limit), ylim=(-0.5, 1.5), xticks=(), yticks=())
    axis.set_title(
        f"{label}: {report.speedup(name):.1f}x",
        fontsize=13,
        fontweight="bold",
        color=_INK,
        loc="left",
        pad=4,
    )
    axis.spines[:].set_visible(False)


def draw_head(
    axes: list[Any], facts: dict[str, Any], head: SheetHead, layer: Drawn, *, first: bool
) -> None:
    """Four maps of one head: attention and plan, over the whole prompt and over its end.

    Args:
        facts: its "recall" and "density".
        first: whether to name the axes.
    """
    tokens = layer.q.shape[2]
    group = layer.q.shape[1] // layer.k.shape[1]
    q, k = layer.q[0, head.head], layer.k[0, head.head // group]
    # A power of two: frames and cells then often share their edges, and lines do not shimmer.
    whole = Window(0, tokens, 1 << (max(1, tokens // WHOLE_CELLS).bit_length() - 1))
    detail = min(DETAIL_TOKENS, tokens)
    close = Window(tokens - detail, tokens, max(1, detail // DETAIL_CELLS))
    for i, window in enumerate((whole, close)):
        values = attention_map(q, k, window, layer.scale)
        _draw_attention(axes[2 * i], values, window)
        if window is whole and float(values[:, 0].mean()) > SINK_SHARE:
            _point_at_sink(axes[0], float(values[:, 0].mean()), window)
        _draw_plan(axes[2 * i + 1], plan_map(layer.plan, head.head, window), window)
    # Blank space above each row of maps holds one line of text, wider than a map.
    name = f"layer {head.layer}, head {head.head}"
    if head.label:
        name += f": {_EXPLAIN.get(head.label, head.label)}"
    axes[0].text(
        0, 1.135, name, fontsize=12, fontweight="bold", color=_INK, transform=axes[0].transAxes
    )
    axes[2].text(
        0,
        1.135,
        f"the plan keeps {facts['recall']:.1%} of the attention in {facts['density']:.1%} of the "
        "pairs",
        fontsize=12,
        color=_SPARSE,
        fontweight="bold",
        transform=axes[2].transAxes,
    )
    captions = (
        f"true attention, {tokens:,} x {tokens:,} tokens",
        "pairs that the plan computes",
        f"true attention, the last {detail:,} tokens",
        "pairs that the plan computes",
    )
    for axis, text in zip(axes, captions, strict=True):
        axis.set_title(text, fontsize=9.5, color=_FAINT, loc="left", pad=4)
    if first:
        axes[0].set_ylabel("query token", fontsize=9, color=_FAINT)
        axes[0].set_xlabel("key token", fontsize=9, color=_FAINT, labelpad=1)


def _draw_attention(axis: Any, values: Tensor, window: Window) -> None:
    """Mass of a cell over the mean mass of its row: a map of any length reads alike."""
    row = torch.arange(values.shape[0])
    lit = values * (row[:, None] + 1 + window.start / window.cell)
    shown = lit.masked_fill(row > row[:, None], float("nan"))
    norm = colors.LogNorm(vmin=0.03, vmax=max(float(lit.max()), 1.0))
    _show(axis, shown.clamp_min(0.03), window, cmap="magma", norm=norm)


def _point_at_sink(axis: Any, share: float, window: Window) -> None:
    axis.annotate(
        f"first {window.cell} tokens: {share:.0%}",
        xy=(0.004, 0.16),
        xytext=(0.09, 0.08),
        xycoords="axes fraction",
        textcoords="axes fraction",
        color=_PAPER,
        fontsize=9,
        arrowprops={"arrowstyle": "->", "color": _PAPER, "lw": 1.0},
    )


def _draw_plan(axis: Any, values: Tensor, window: Window) -> None:
    """Share of the cell's pairs; a square root keeps thin lines visible."""
    shades = colors.LinearSegmentedColormap.from_list("plan", ("#000004", "#8c2981", "#fde725"))
    norm = colors.PowerNorm(0.5, vmin=0.0, vmax=1.0)
    _show(axis, values, window, cmap=shades, norm=norm)


def _show(axis: Any, values: Tensor, window: Window, **how: Any) -> None:
    axis.set_facecolor(_VOID)
    extent = (window.start, window.stop, window.stop, window.start)
    axis.imshow(values.numpy(), extent=extent, interpolation="nearest", **how)
    middle = (window.start + window.stop) // 2
    axis.set_xticks((window.start, middle, window.stop))
    axis.set_yticks((window.start, middle, window.stop))
    axis.ticklabel_format(style="plain")
    axis.tick_params(labelsize=7, colors=_FAINT, length=2, pad=2)
    axis.get_xticklabels()[-1].set_ha("right")
    axis.get_xticklabels()[0].set_ha("left")
    for label in axis.get_yticklabels():
        label.set_rotation(90)
        label.set_va("center")
    axis.spines[:].set_visible(False)


def _bare(axis: Any) -> Any:
    axis.set_axis_off()
    return axis
