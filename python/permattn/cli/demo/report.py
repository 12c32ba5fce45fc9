"""The numbers of a demo run: gathered once, shown as a table and as JSON."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from permattn.cli.demo.measure import Times

_MIB = 2**20


@dataclass(frozen=True)
class Agreement:
    """How far the sparse pass is from the dense one.

    Args:
        attention_error: of the attention outputs of all layers, on the dense pass's own inputs.
        attention_error_per_layer: the same, layer by layer.
        hidden_error: of the last hidden state, all positions.
        hidden_error_last: of the last hidden state, last 64 positions.
        top1: share of the last 64 positions where both predict the same token.
    """

    attention_error: float
    attention_error_per_layer: list[float]
    hidden_error: float
    hidden_error_last: float
    top1: float


@dataclass(frozen=True)
class Report:
    """Everything that a run found."""

    facts: dict[str, Any]
    dense: list[Times]
    sparse: list[Times]
    density_per_layer: list[float]
    agreement: Agreement
    heads: list[dict[str, Any]]
    stats: dict[str, Any]

    @property
    def density(self) -> float:
        return statistics.fmean(self.density_per_layer)

    def median(self, kind: str, name: str) -> float:
        values = [getattr(t, name) for t in getattr(self, kind)]
        # Resident memory drifts up from pass to pass, dense or sparse: the lowest peak counts.
        return min(values) if name == "peak_bytes" else statistics.median(values)

    def speedup(self, name: str) -> float:
        return self.median("dense", name) / max(self.median("sparse", name), 1e-9)

    def to_json(self) -> dict[str, Any]:
        names = ("first_token", "vision", "prefill", "attention", "plan", "peak_bytes")
        return {
            **self.facts,
            "density": self.density,
            "density_per_layer": self.density_per_layer,
            "dense_ms": [asdict(t) for t in self.dense],
            "sparse_ms": [asdict(t) for t in self.sparse],
            "median_dense": {n: self.median("dense", n) for n in names},
            "median_sparse": {n: self.median("sparse", n) for n in names},
            "speedup": {n: self.speedup(n) for n in ("attention", "prefill", "first_token")},
            "plan_share_of_dense_attention": self.median("sparse", "plan")
            / self.median("dense", "attention"),
            **asdict(self.agreement),
            "heads": self.heads,
            "stats": self.stats,
        }


def print_report(console: Console, report: Report) -> None:
    """The table, and in words what it means."""
    facts = report.facts
    console.print()
    console.print(f"[bold]{facts['model']}[/]", highlight=False)
    console.print(
        f"{facts['visual_tokens']:,} visual tokens in a prompt of {facts['tokens']:,}; "
        f"{facts['video']}; {facts['dtype']} on {facts['device']}, backend {facts['backend']}",
        highlight=False,
    )
    console.print(f"[yellow]{facts['note']}[/]", highlight=False)
    console.print()
    console.print(_times(report))
    console.print(_quality(report))
    console.print(
        f"[dim]Medians of {len(report.dense)} passes each, in turns. Attention counts planning. "
        f"Memory: {facts['memory_note']}.[/]",
        highlight=False,
    )
    if report.stats["dense"]:
        console.print(f"[yellow]{_dense_calls(report)}[/]", highlight=False)


def _times(report: Report) -> Table:
    table = Table()
    table.add_column("")
    table.add_column("dense (SDPA)", justify="right")
    table.add_column("sparse (permattn)", justify="right")
    table.add_column("speed-up", justify="right", style="bold green")
    rows = (
        ("attention, all layers", "attention"),
        ("prefill of the language model", "prefill"),
        ("time to first token, with vision tower", "first_token"),
    )
    for label, name in rows:
        dense, sparse = report.median("dense", name), report.median("sparse", name)
        table.add_row(label, _ms(dense), _ms(sparse), f"{report.speedup(name):.2f}x")
    table.add_section()
    table.add_row(
        "of it: vision tower",
        _ms(report.median("dense", "vision")),
        _ms(report.median("sparse", "vision")),
        "",
    )
    plan = report.median("sparse", "plan")
    share = 100 * plan / report.median("dense", "attention")
    table.add_row("of it: planning", "", f"{_ms(plan)} ({share:.1f} % of dense attention)", "")
    peaks = [report.median(kind, "peak_bytes") / _MIB for kind in ("dense", "sparse")]
    table.add_row("peak memory above rest", *(f"{x:,.0f} MiB" for x in peaks), "")
    return table


def _quality(report: Report) -> Table:
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    got = report.agreement
    low, high = min(report.density_per_layer), max(report.density_per_layer)
    table.add_row(
        "density: computed share of all causal pairs",
        f"{100 * report.density:.1f} % (layers {100 * low:.1f} to {100 * high:.1f} %)",
    )
    table.add_row("relative error of the attention output", f"{got.attention_error:.2%}")
    table.add_row("relative error of the last hidden state", f"{got.hidden_error:.2%}")
    table.add_row("the same, last 64 positions", f"{got.hidden_error_last:.2%}")
    table.add_row("top-1 agreement, last 64 positions", f"{got.top1:.1%}")
    return table


def _dense_calls(report: Report) -> str:
    reasons = ", ".join(f"{n} x {why}" for why, n in report.stats["dense_reasons"].items())
    return f"{report.stats['dense']} attention calls of the sparse passes ran dense: {reasons}"


def _ms(value: float) -> str:
    return f"{value:,.0f} ms"
