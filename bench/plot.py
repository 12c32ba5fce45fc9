"""One picture of the results: speed-up against the share of blocks listed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.machine import threads_text
from bench.registry import DENSITIES, TARGETS, Dtype, percent
from bench.results import Row

# Okabe-Ito: told apart by every eye, and in grey.
COLOURS: dict[tuple[Dtype, int], str] = {
    ("bf16", 64): "#0072B2",
    ("bf16", 128): "#56B4E9",
    ("fp32", 64): "#D55E00",
    ("fp32", 128): "#E69F00",
}
MARKERS = {("bf16", 64): "o", ("bf16", 128): "s", ("fp32", 64): "^", ("fp32", 128): "D"}


def plot(rows: Sequence[Row], path: Path) -> None:
    """Writes a PNG. Needs at least one row of the group "speed"."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    speed = {row.case: row for row in rows if row.group == "speed"}
    if not speed:
        raise ValueError("plot: wants at least one row of the group 'speed', got none")
    any_row = next(iter(speed.values()))
    with plt.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.2), layout="constrained")
        for number, (key, colour) in enumerate(COLOURS.items()):
            row = speed.get(f"{key[0]}-d{key[1]}")
            if row is None:
                continue
            label = f"{key[0]}, D = {key[1]}"
            line = {"color": colour, "marker": MARKERS[key], "label": label, "lw": 2, "ms": 7}
            for axes, base in ((left, "sdpa"), (right, "100%")):
                ratios = [_ratio(row, base, d) for d in DENSITIES]
                axes.plot(DENSITIES, ratios, **line)
            left.annotate(
                f"{_ratio(row, 'sdpa', 0.1):.1f}x",
                (0.1, _ratio(row, "sdpa", 0.1)),
                # Lines of one dtype end close together: one label above, one below.
                xytext=(9, 3 if number % 2 == 0 else -13),
                textcoords="offset points",
                color=colour,
            )
            left.scatter(
                DENSITIES, TARGETS[key][:4], color=colour, marker="_", s=260, lw=1.6, alpha=0.9
            )
            if "flex-25%" in row.runs:
                value = row.runs["sdpa"]["ms"] / row.runs["flex-25%"]["ms"]
                left.scatter([0.25], [value], color=colour, marker="x", s=70, lw=2, zorder=5)
        _dress(left, "over torch's dense SDPA, same dtype")
        _dress(right, "over our own dense list")
        left.plot([], [], "_", color="black", ms=14, label="target")
        left.plot([], [], "x", color="black", ms=8, lw=0, label="FlexAttention, 25 %")
        figure.legend(
            *left.get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False
        )
        machine = any_row.machine
        sizes, model = any_row.shape.rsplit(" D=", 1)[0], machine["cpu"].split(" (")[0]
        figure.suptitle(
            f"Block-sparse attention, {sizes}, blocks of 128 — {model}, "
            f"{threads_text(machine['threads'])}, {machine['isa']}",
            fontsize=12,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130, metadata={"Software": None})
        plt.close(figure)


def _ratio(row: Row, base: str, density: float) -> float:
    return row.runs[base]["ms"] / row.runs[percent(density)]["ms"]


def _dress(axes: Any, title: str) -> None:
    """Logarithmic axes, percent labels, and the line that skipped blocks alone would give."""
    axes.plot(DENSITIES, [1 / d for d in DENSITIES], color="0.6", ls=":", label="1 / density")
    axes.set(xscale="log", yscale="log", title=f"Speed-up {title}", xlabel="share of blocks listed")
    axes.set_xlim(1.15, 0.078)
    axes.set_xticks(DENSITIES, [percent(d) for d in DENSITIES])
    ticks = [0.5, 1, 2, 4, 8, 16, 32, 64]
    low, high = axes.get_ylim()
    ticks = [t for t in ticks if low <= t <= high]
    axes.set_yticks(ticks, [f"{t:g}x" for t in ticks])
    axes.minorticks_off()
    axes.grid(axis="y", color="0.9")
