"""Routed regions over an image: where a region looks, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from permattn.cli.train_biformer.routed import StageRoutes

_INK, _FAINT, _PAPER = "#1c1d22", "#6b6f7a", "#ffffff"
_QUERIES = ("#35c9f0", "#ff5d73")
_ROUTED = "#ffd23f"
_DARK = 0.28


@dataclass(frozen=True, eq=False)
class RoutedView:
    """An image, its routing, and the places whose regions are asked for.

    Args:
        name: of the image.
        pixels: uint8 [3, H, W], what is drawn.
        stages: see `routes_of`.
        places: (x, y) in shares of width and height, two at most.
    """

    name: str
    pixels: Tensor
    stages: list[StageRoutes]
    places: tuple[tuple[float, float], ...]


def draw_routed(axis: Any, pixels: Tensor, stage: StageRoutes, query: int, colour: str) -> None:
    """Draws on matplotlib axes what one region looks at; the rest of the image is dimmed.

    Args:
        axis: matplotlib axes.
        pixels: uint8 [3, H, W].
        stage: the routing.
        query: number of the region, raster order.
        colour: of its outline.
    """
    image = pixels.permute(1, 2, 0).numpy().astype(np.float32) / 255
    height, width = image.shape[:2]
    grey = image.mean(-1, keepdims=True)
    dimmed = _DARK * (0.35 * image + 0.65 * grey)
    graph, weights = stage.graph[query].tolist(), stage.weights[query]
    shares = (weights / weights.max()).tolist()
    boxes = [_box(stage, region, width, height) for region in graph]
    for (x, y, w, h), share in zip(boxes, shares, strict=True):
        rows, columns = slice(round(y), round(y + h)), slice(round(x), round(x + w))
        tint = 0.08 + 0.22 * share
        colour_of = np.array([int(_ROUTED[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        # A region that matters little stays dim, one that matters is bright and tinted.
        bright = 0.62 + 0.38 * share
        dimmed[rows, columns] = bright * ((1 - tint) * image[rows, columns] + tint * colour_of)
    axis.imshow(dimmed.clip(0, 1), interpolation="antialiased", extent=(0, width, height, 0))
    for (x, y, w, h), share in zip(boxes, shares, strict=True):
        axis.add_patch(_outline((x, y, w, h), _ROUTED, 1.1, 0.35 + 0.65 * share))
    box = _box(stage, query, width, height)
    axis.add_patch(_outline(box, "#000000", 4.0, 0.8))
    axis.add_patch(_outline(box, colour, 2.2, 1.0))
    _bare(axis, width, height)


def draw_views(path: Path, views: Sequence[RoutedView], note: str) -> None:
    """Writes the PNG: a row per image, the stages of every asked-for region beside it."""
    stages = views[0].stages
    columns = 1 + len(stages) * len(views[0].places)
    cell, gap, head = 1.82, 0.09, 1.75
    group = 0.22
    width = columns * (cell + gap) + group * len(views[0].places) + 0.5
    height = head + len(views) * (cell + gap) + 0.25
    figure = Figure(figsize=(width, height), facecolor=_PAPER, dpi=130)
    FigureCanvasAgg(figure)
    figure.text(
        0.3 / width,
        1 - 0.36 / height,
        "Where a region looks: routed regions, learned from photographs",
        fontsize=18,
        fontweight="bold",
        color=_INK,
        va="center",
    )
    figure.text(0.3 / width, 1 - 0.74 / height, note, fontsize=9.5, color=_FAINT, va="center")
    for i, view in enumerate(views):
        bottom = height - head - (i + 1) * (cell + gap) + gap

        def place(column: int, shift: float, bottom: float = bottom) -> Any:
            left = 0.3 + column * (cell + gap) + shift
            return figure.add_axes((left / width, bottom / height, cell / width, cell / height))

        _draw_image(place(0, 0.0), view, first=i == 0)
        for j, (x, y) in enumerate(view.places):
            for n, stage in enumerate(view.stages):
                axis = place(1 + j * len(stages) + n, (j + 1) * group)
                query = stage.region_at(x, y)
                draw_routed(axis, view.pixels, stage, query, _QUERIES[j])
                if i == 0:
                    _head(axis, stage, _QUERIES[j])
    figure.savefig(path, facecolor=_PAPER)


def _draw_image(axis: Any, view: RoutedView, *, first: bool) -> None:
    height, width = view.pixels.shape[1:]
    axis.imshow(view.pixels.permute(1, 2, 0).numpy(), extent=(0, width, height, 0))
    for (x, y), colour in zip(view.places, _QUERIES, strict=False):
        box = _box(view.stages[0], view.stages[0].region_at(x, y), width, height)
        axis.add_patch(_outline(box, "#000000", 4.0, 0.8))
        axis.add_patch(_outline(box, colour, 2.2, 1.0))
    _bare(axis, width, height)
    axis.text(
        0.03,
        0.03,
        view.name,
        transform=axis.transAxes,
        fontsize=9,
        color="white",
        fontweight="bold",
        bbox={"facecolor": "#000000", "alpha": 0.55, "edgecolor": "none", "pad": 2},
    )
    if first:
        axis.set_title("two query regions", fontsize=10, fontweight="bold", color=_INK, loc="left")


def _head(axis: Any, stage: StageRoutes, colour: str) -> None:
    axis.set_title(
        f"{stage.topk} of {stage.num_regions} regions", fontsize=9, color=_FAINT, loc="left", pad=4
    )
    axis.text(
        0,
        1.15,
        f"stage {stage.stage}",
        transform=axis.transAxes,
        fontsize=10,
        fontweight="bold",
        color=_INK,
    )
    axis.plot(
        (0, 1), (1.27, 1.27), transform=axis.transAxes, color=colour, linewidth=3, clip_on=False
    )


def _box(stage: StageRoutes, region: int, width: int, height: int) -> tuple[float, ...]:
    rows, columns = stage.counts
    row, column = divmod(region, columns)
    return column * width / columns, row * height / rows, width / columns, height / rows


def _outline(box: tuple[float, ...], colour: str, width: float, alpha: float) -> Rectangle:
    x, y, w, h = box
    return Rectangle((x, y), w, h, fill=False, edgecolor=colour, linewidth=width, alpha=alpha)


def _bare(axis: Any, width: int, height: int) -> None:
    axis.set(xticks=(), yticks=(), xlim=(0, width), ylim=(height, 0))
    axis.spines[:].set_visible(False)
