"""A PARO plan as a picture: all heads at a glance, then maps before and after reordering."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colors
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from permattn.calibrate.paro import HeadMap, PlanCheck
from permattn.cli.calibrate.sheet import FAINT, INK, PAPER, draw_values, frame_heads, write_title
from permattn.core.axis_order import ORDER_NAMES
from permattn.core.plan import ceil_div
from permattn.patterns.paro import ParoPlan

# Colours that colour-blind readers tell apart (Okabe and Ito); grey = the model's own order.
ORDER_COLOURS = ("#c9ccd3", "#56b4e9", "#e8834a", "#f0c24b", "#3fb68f", "#cc79a7", "#8f929c")
KEPT = "#2a6f97"
_SKIPPED = "#eceef1"
_LOST = "#d1495b"
# Cells with room for a name, and pixels that a map is shown in at most.
_MAX_NAMED, _MAX_CELLS = 16, 256
# Mass per block is shown over so many powers of ten.
_DECADES = 3.5
_WIDTH, _MAPS = 15.0, 3.75


def draw_plan(
    path: Path, plan: ParoPlan, check: PlanCheck | None, *, title: str, note: str
) -> None:
    """Writes the PNG: orders, density, recall and error; a row of panels per map."""
    maps = () if check is None else check.maps
    panel = min(max(0.42 * plan.num_layers, 1.9), 5.5)
    rows = 1 if check is None else 2
    top = 1.35 + rows * panel + (rows - 1) * 0.8 + 0.55
    height = top + (0.75 + _MAPS * len(maps) if maps else 0.0)
    figure = Figure(figsize=(_WIDTH, height), facecolor=PAPER, dpi=130)
    FigureCanvasAgg(figure)
    write_title(figure, height, title, note)
    columns = 3 if check is None else 2
    grid = figure.add_gridspec(
        rows,
        columns,
        left=0.05,
        right=0.965,
        top=1.0 - 1.35 / height,
        bottom=1.0 - (top - 0.45) / height,
        hspace=0.8 / panel,
        wspace=0.13 if columns == 2 else 0.22,
    )
    places = itertools.product(range(rows), range(columns))
    _draw_panels([figure.add_subplot(grid[i, j]) for i, j in places], plan, check)
    if maps:
        below = figure.add_gridspec(
            len(maps),
            4,
            left=0.04,
            right=0.985,
            top=1.0 - (top + 0.6) / height,
            bottom=0.5 / height,
            wspace=0.17,
            hspace=0.34,
        )
        for i, head in enumerate(maps):
            _draw_head([figure.add_subplot(below[i, j]) for j in range(4)], plan, head)
    figure.savefig(path, facecolor=PAPER)


def heads_to_draw(plan: ParoPlan, count: int = 3) -> list[tuple[int, int]]:
    """(layer, head) pairs: of different orders where there are such, easy and hard ones.

    Without a recall in the plan those with few blocks count as easy.
    """
    value = plan.recall.mean(0) if plan.recall is not None else -plan.density().mean(0)
    value = value.masked_fill(plan.empty_heads, -1.0)
    ranked = value.flatten().argsort(descending=True, stable=True).tolist()
    heads = [divmod(i, plan.num_heads) for i in ranked]
    reordered = [x for x in heads if int(plan.axis_orders[x])]
    best = _of_new_orders(reordered or heads, plan, count - 1)
    worst = next((x for x in reversed(heads) if x not in best), None)
    return [*best, *([worst] if worst is not None and len(best) < count else [])]


def _of_new_orders(
    heads: list[tuple[int, int]], plan: ParoPlan, count: int
) -> list[tuple[int, int]]:
    """The first `count` heads of orders that differ; of any order where those run out."""
    found: dict[int, tuple[int, int]] = {}
    for place in heads:
        found.setdefault(int(plan.axis_orders[place]), place)
    first = list(found.values())
    return [*first, *(x for x in heads if x not in first)][:count]


def _draw_panels(axes: list[Any], plan: ParoPlan, check: PlanCheck | None) -> None:
    numbers = range(plan.num_layers)
    _draw_orders(axes[0], plan)
    draw_values(
        axes[1], numbers, plan.density().mean(0).tolist(),
        "share of blocks that is computed", colors.Normalize(0.0, None), "Purples",
    )  # fmt: skip
    recall = check.recall if check is not None else None
    if recall is None and plan.recall is not None:
        recall = plan.recall.mean(0)
    if recall is None:
        axes[2].set_visible(False)
    else:
        low = min(0.9, float(recall.min()))
        draw_values(
            axes[2], numbers, recall.tolist(),
            "share of attention mass that is kept", colors.Normalize(low, 1.0), "YlGn",
        )  # fmt: skip
    if check is not None:
        most = max(0.1, float(check.error.max()))
        draw_values(
            axes[3], numbers, check.error.tolist(),
            "relative error of the attention output", colors.PowerNorm(0.5, 0.0, most), "YlOrRd",
        )  # fmt: skip


def _draw_orders(axis: Any, plan: ParoPlan) -> None:
    orders = plan.axis_orders.numpy()
    image = np.array([colors.to_rgb(c) for c in ORDER_COLOURS])[orders]
    axis.imshow(image, aspect="auto", interpolation="nearest")
    frame_heads(axis, range(plan.num_layers), plan.num_heads, "axis order")
    if plan.num_heads <= _MAX_NAMED and plan.num_layers <= 2 * _MAX_NAMED:
        for (n, h), order in np.ndenumerate(orders):
            empty = bool(plan.empty_heads[n, h])
            text = "empty" if empty else ORDER_NAMES[order]
            axis.text(h, n, text, ha="center", va="center", fontsize=7, color=INK)
    used = sorted(set(orders.flatten().tolist()))
    axis.legend(
        handles=[Patch(color=ORDER_COLOURS[i], label=ORDER_NAMES[i]) for i in used],
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=len(used),
        fontsize=8,
        frameon=False,
        handlelength=0.9,
        columnspacing=0.9,
        handletextpad=0.4,
    )


def _draw_head(axes: list[Any], plan: ParoPlan, head: HeadMap) -> None:
    """Before, after, what is kept, and how fast the heaviest blocks add up."""
    order = ORDER_NAMES[int(plan.axis_orders[head.layer, head.head])]
    density = float(head.mask.float().mean())
    before, after = (_shown(x) for x in (head.before, head.after))
    peak = max(float(x.max()) for x in (before, after))
    norm = colors.LogNorm(peak * 10**-_DECADES, peak, clip=True)
    _draw_map(axes[0], before, norm, f"layer {head.layer}, head {head.head}: as tokens come")
    axes[0].set_ylabel("query blocks", fontsize=8.5, color=FAINT)
    _draw_map(axes[1], after, norm, f"read as {order}")
    _draw_kept(axes[2], head, norm, f"kept: {density:.1%} of blocks, {head.recall:.1%} of mass")
    _draw_curves(axes[3], head, order, density)


def _draw_map(axis: Any, mass: Tensor, norm: colors.Normalize, title: str) -> None:
    axis.imshow(mass.numpy(), norm=norm, cmap="magma_r", interpolation="nearest", aspect="auto")
    _bare(axis, title)


def _draw_kept(axis: Any, head: HeadMap, norm: colors.Normalize, title: str) -> None:
    """The map where blocks are kept; what is left out in red, the more mass the redder."""
    kept = _shown(head.mask.float())
    mass = _shown(head.after)
    image = np.ones((*mass.shape, 3)) * np.array(colors.to_rgb(_SKIPPED))
    inside = colors.LinearSegmentedColormap.from_list("kept", ["#b9d6e8", KEPT, "#0b2f45"])
    outside = colors.LinearSegmentedColormap.from_list("lost", [_SKIPPED, "#f1d0d5", _LOST])
    strength = norm(mass.numpy())
    is_kept = (kept > 0.5).numpy()
    image[is_kept] = inside(strength[is_kept])[:, :3]
    image[~is_kept] = outside(strength[~is_kept])[:, :3]
    axis.imshow(image, interpolation="nearest", aspect="auto")
    _bare(axis, title)
    handles = [Patch(color=KEPT, label="computed"), Patch(color=_LOST, label="left out, mass")]
    axis.legend(
        handles=handles,
        loc="upper right",
        bbox_to_anchor=(1.0, -0.02),
        ncols=2,
        fontsize=7.5,
        frameon=False,
        handlelength=0.9,
        columnspacing=0.9,
        handletextpad=0.4,
    )


def _draw_curves(axis: Any, head: HeadMap, order: str, density: float) -> None:
    """Share of the vision mass in the heaviest blocks, by the share of blocks."""
    for mass, colour, label in (
        (head.before, "#9aa0ab", "as tokens come"),
        (head.after, KEPT, f"read as {order}"),
    ):
        ranked = mass.flatten().double().sort(descending=True).values
        held = torch.cat((torch.zeros(1).double(), ranked.cumsum(0) / ranked.sum()))
        share = torch.linspace(0, 1, len(held))
        axis.plot(100 * share.numpy(), 100 * held.numpy(), color=colour, lw=1.8, label=label)
    axis.axvline(100 * density, color=_LOST, lw=1.0, ls=(0, (4, 3)))
    axis.text(100 * density + 1.2, 42, "density", fontsize=7.5, color=_LOST, rotation=90)
    axis.set_xlim(0, 100)
    axis.set_ylim(0, 102)
    axis.set_title("mass in the heaviest blocks", fontsize=9.5, color=INK, loc="left", pad=5)
    axis.set_xlabel("share of blocks, %", fontsize=8.5, color=FAINT, labelpad=2)
    axis.tick_params(labelsize=7.5, colors=FAINT, length=2)
    axis.grid(color="#e7e9ed", lw=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#c9ccd3")
    axis.legend(loc="lower right", fontsize=8, frameon=False)


def _bare(axis: Any, title: str) -> None:
    axis.set_title(title, fontsize=9.5, color=INK, loc="left", pad=5)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_xlabel("key blocks", fontsize=8.5, color=FAINT, labelpad=3, loc="left")
    axis.spines[:].set_color("#c9ccd3")


def _shown(blocks: Tensor) -> Tensor:
    """[nq, nk] as at most _MAX_CELLS cells a side, means of the blocks in each."""
    for dim, size in enumerate(blocks.shape):
        step = ceil_div(size, _MAX_CELLS)
        if step > 1:
            edges = list(itertools.chain(range(0, size, step), [size]))
            pieces = blocks.split([b - a for a, b in itertools.pairwise(edges)], dim)
            blocks = torch.stack([x.mean(dim) for x in pieces], dim)
    return blocks
