"""Heads as a picture: layers down, heads across; pattern, density, recall and error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colors
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from permattn.calibrate import SearchResult
from permattn.calibrate.space import describe
from permattn.patterns.mminference import HeadPattern

INK, FAINT, PAPER = "#1c1d22", "#6b6f7a", "#ffffff"
# Colours that colour-blind readers tell apart (Okabe and Ito).
PATTERN_COLOURS = {
    "dense": "#8f929c",
    "a_shape": "#56b4e9",
    "tri_shape": "#4a90c4",
    "vertical_slash": "#e8834a",
    "block_sparse": "#cc79a7",
    "grid": "#3fb68f",
    "auto": "#f0e442",
}
# Cells with room for a number.
_MAX_WRITTEN = 16
_CELL_CHARACTERS = 10
_CENTRED = {"ha": "center", "va": "center"}


def draw_result(path: Path, result: SearchResult, *, title: str, note: str) -> None:
    """Writes the PNG."""
    rows = len(result.layers)
    panel = min(max(0.55 * rows, 2.2), 7.0)
    height = 1.9 + 2 * panel + 0.75
    figure = Figure(figsize=(14.0, height), facecolor=PAPER, dpi=140)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        2,
        2,
        left=0.05,
        right=0.96,
        top=1.0 - 1.35 / height,
        bottom=0.5 / height,
        hspace=0.75 / panel,
        wspace=0.12,
    )
    write_title(figure, height, title, note)
    axes = [figure.add_subplot(grid[i // 2, i % 2]) for i in range(4)]
    draw_panels(axes, result)
    figure.savefig(path, facecolor=PAPER)


def write_title(figure: Figure, height: float, title: str, note: str) -> None:
    """The headline and one line below it."""
    figure.text(0.05, 1 - 0.3 / height, title, fontsize=17, fontweight="bold", color=INK, va="top")
    figure.text(0.05, 1 - 0.72 / height, note, fontsize=9.5, color=FAINT, va="top")


def draw_panels(axes: Sequence[Any], result: SearchResult) -> None:
    """Four panels: pattern, density, recall, output error."""
    numbers = list(result.layers)
    _draw_patterns(axes[0], result)
    draw_values(
        axes[1], numbers, [[c.density for c in row] for row in result.layers.values()],
        "computed share of all pairs", colors.Normalize(0.0, None), "Purples",
    )  # fmt: skip
    draw_values(
        axes[2], numbers, [[c.recall for c in row] for row in result.layers.values()],
        "share of true attention mass that is kept", colors.Normalize(0.0, 1.0), "YlGn",
    )  # fmt: skip
    draw_values(
        axes[3], numbers, [[c.error for c in row] for row in result.layers.values()],
        "relative error of the attention output", colors.PowerNorm(0.5, 0.0, 1.0), "YlOrRd",
    )  # fmt: skip


def _draw_patterns(axis: Any, result: SearchResult) -> None:
    rows = list(result.layers.values())
    image = np.ones((len(rows), max(map(len, rows)), 3))
    for i, row in enumerate(rows):
        for h, choice in enumerate(row):
            image[i, h] = colors.to_rgb(PATTERN_COLOURS[choice.pattern.pattern])
            axis.text(h, i, _cell_text(choice.pattern, len(row)), **_CENTRED, fontsize=7, color=INK)
    axis.imshow(image, aspect="auto", interpolation="nearest")
    frame_heads(axis, list(result.layers), max(map(len, rows)), "pattern")
    used = {c.pattern.pattern for row in rows for c in row}
    handles = [Patch(color=c, label=name) for name, c in PATTERN_COLOURS.items() if name in used]
    axis.legend(
        handles=handles,
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=len(handles),
        fontsize=8,
        frameon=False,
        handlelength=0.9,
        columnspacing=0.9,
        handletextpad=0.4,
    )


def _cell_text(pattern: HeadPattern, heads: int) -> str:
    """What fits into a cell: sizes where heads are few, else the boundary alone."""
    boundary = "" if pattern.boundary in ("none", "k") else pattern.boundary
    if heads > _MAX_WRITTEN // 2:
        return boundary
    sizes = describe(replace(pattern, boundary="none", when=())).partition(" ")[2]
    if len(sizes) > _CELL_CHARACTERS:
        sizes = "\n+".join(sizes.rsplit("+", 1))
    return "\n".join((sizes.replace(" ", "\n"), boundary)).strip()


def draw_values(
    axis: Any,
    numbers: Sequence[int],
    values: Sequence[Sequence[float]],
    title: str,
    norm: colors.Normalize,
    cmap: str,
) -> None:
    """A panel of shares, layers down and heads across.

    Args:
        numbers: the layers.
        values: per layer, one per head.
    """
    table = np.full((len(values), max(map(len, values))), np.nan)
    for i, row in enumerate(values):
        table[i, : len(row)] = row
    image = axis.imshow(table, aspect="auto", interpolation="nearest", norm=norm, cmap=cmap)
    frame_heads(axis, numbers, table.shape[1], title)
    if table.shape[1] <= _MAX_WRITTEN and table.shape[0] <= 2 * _MAX_WRITTEN:
        for (i, h), value in np.ndenumerate(table):
            if np.isfinite(value):
                r, g, b, _ = image.cmap(image.norm(value))
                light = 0.3 * r + 0.59 * g + 0.11 * b > 0.55
                axis.text(
                    h,
                    i,
                    f"{100 * value:.3g}",
                    **_CENTRED,
                    fontsize=8,
                    color=INK if light else PAPER,
                )
    bar = axis.figure.colorbar(image, ax=axis, fraction=0.025, pad=0.012)
    bar.ax.yaxis.set_major_formatter(lambda x, _: f"{100 * x:.0f} %")
    bar.ax.tick_params(labelsize=7, colors=FAINT, length=2)
    bar.outline.set_visible(False)


def frame_heads(axis: Any, numbers: Sequence[int], heads: int, title: str) -> None:
    """Title, ticks and white lines of a panel with layers down and heads across."""
    axis.set_title(title, fontsize=11.5, fontweight="bold", color=INK, loc="left", pad=6)
    step = max(1, len(numbers) // 16)
    axis.set_yticks(range(0, len(numbers), step), [str(n) for n in numbers[::step]])
    axis.set_xticks(range(0, heads, max(1, heads // 16)))
    axis.tick_params(labelsize=7.5, colors=FAINT, length=0)
    axis.set_ylabel("layer", fontsize=8.5, color=FAINT)
    axis.set_xlabel("head", fontsize=8.5, color=FAINT, labelpad=1)
    # White lines between cells.
    axis.set_yticks(np.arange(len(numbers) + 1) - 0.5, minor=True)
    axis.set_xticks(np.arange(heads + 1) - 0.5, minor=True)
    axis.grid(which="minor", color=PAPER, linewidth=1.2)
    axis.tick_params(which="minor", length=0)
    axis.spines[:].set_visible(False)
