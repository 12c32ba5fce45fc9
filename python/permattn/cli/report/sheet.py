"""The report's picture: all heads at a glance, then maps of the best, a median and the worst."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from permattn.calibrate import SearchResult
from permattn.calibrate.space import describe
from permattn.cli.calibrate.sheet import PAPER, draw_panels, write_title
from permattn.cli.demo.compare import Drawn
from permattn.cli.demo.picture import draw_head
from permattn.cli.demo.subject import SheetHead

_WIDTH, _MAPS = 15.0, 3.95


def draw_report(
    path: Path,
    result: SearchResult,
    drawn: dict[int, Drawn],
    heads: list[SheetHead],
    title: str,
    note: str,
    on_step: Callable[[], object],
) -> None:
    """Writes the PNG."""
    panel = min(max(0.5 * len(result.layers), 2.0), 6.0)
    top = 1.35 + 2 * panel + 1.25
    height = top + _MAPS * len(heads) + 0.35
    figure = Figure(figsize=(_WIDTH, height), facecolor=PAPER, dpi=130)
    FigureCanvasAgg(figure)
    write_title(figure, height, title, note)
    panels = figure.add_gridspec(
        2,
        2,
        left=0.05,
        right=0.97,
        top=1.0 - 1.35 / height,
        bottom=1.0 - (top - 0.5) / height,
        hspace=0.75 / panel,
        wspace=0.12,
    )
    draw_panels([figure.add_subplot(panels[i // 2, i % 2]) for i in range(4)], result)
    maps = figure.add_gridspec(
        len(heads),
        4,
        left=0.035,
        right=0.985,
        top=1.0 - (top + 0.55) / height,
        bottom=0.35 / height,
        wspace=0.09,
        hspace=0.30,
    )
    for i, head in enumerate(heads):
        choice = result.layers[head.layer][head.head]
        label = f"{head.label} {choice.error:.2%}, {describe(choice.pattern)}"
        axes = [figure.add_subplot(maps[i, j]) for j in range(4)]
        facts = {"recall": choice.recall, "density": choice.density}
        shown = SheetHead(head.layer, head.head, label)
        draw_head(axes, facts, shown, drawn[head.layer], first=i == 0)
        on_step()
    figure.savefig(path, facecolor=PAPER)
    on_step()
