"""Heads as a table: what each runs, what that costs, and how far it is from exact attention."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from permattn.calibrate import SearchResult
from permattn.calibrate.choose import Choice
from permattn.calibrate.space import describe

# More heads than that are shown one layer a row.
MAX_ROWS = 64
# Errors are coloured from here on.
_WARN, _BAD = 0.05, 0.2


def print_heads(console: Console, result: SearchResult, *, title: str) -> None:
    """A row per head, or per layer where there are many."""
    console.print()
    console.print(f"[bold]{title}[/]", highlight=False)
    count = sum(map(len, result.layers.values()))
    console.print(_per_head(result) if count <= MAX_ROWS else _per_layer(result))
    everything = [c for row in result.layers.values() for c in row]
    names = Counter(c.name for c in everything).most_common()
    console.print(
        "Patterns: " + ", ".join(f"{n} x {name}" for name, n in names[:8]), highlight=False
    )
    mean = statistics.fmean
    console.print(
        f"Mean: density {mean(c.density for c in everything):.1%}, recall "
        f"{mean(c.recall for c in everything):.1%}, output error "
        f"{mean(c.error for c in everything):.2%}",
        highlight=False,
    )
    if result.shared is not None:
        console.print(
            f"Best for all heads alike: {describe(result.shared.pattern)}, mean error "
            f"{result.shared.errors[result.shared.name]:.2%}",
            highlight=False,
        )
    budget = result.facts.get("budget_density")
    over = [
        n
        for n, row in result.layers.items()
        if budget and mean(c.density for c in row) > 1.06 * budget
    ]
    if over:
        console.print(
            f"[yellow]Layers over the budget, where nothing cheaper was found: "
            f"{', '.join(map(str, over))} (kernels compute blocks of 64 keys, which is coarse for "
            "short prompts; --max-error makes heads dense)[/]",
            highlight=False,
        )
    times = result.facts.get("ms_per_head", {})
    if times:
        fastest = sorted(times.items(), key=lambda pair: pair[1])[:3]
        console.print(
            "Fastest at this budget, planning included: "
            + ", ".join(f"{n.split('/', 1)[1]} {ms:.2f} ms per head" for n, ms in fastest),
            highlight=False,
        )


def _per_head(result: SearchResult) -> Table:
    table = _table(("layer", "head", "pattern", "density", "recall", "output error", "ms"))
    for number, row in result.layers.items():
        for h, c in enumerate(row):
            ms = "" if c.ms is None else f"{c.ms:.2f}"
            table.add_row(str(number), str(h), describe(c.pattern), *_numbers((c,)), ms)
        table.add_section()
    return table


def _per_layer(result: SearchResult) -> Table:
    table = _table(("layer", "patterns", "density", "recall", "output error", "worst head"))
    for number, row in result.layers.items():
        counts = Counter(c.name.split()[0] for c in row).most_common()
        worst = max(range(len(row)), key=lambda h: row[h].error)
        table.add_row(
            str(number),
            ", ".join(f"{n} {name}" for name, n in counts),
            *_numbers(row),
            f"{worst}: {row[worst].name} {row[worst].error:.1%}",
        )
    return table


def _table(columns: Sequence[str]) -> Table:
    table = Table()
    for name in columns:
        left = name in ("pattern", "patterns", "worst head")
        table.add_column(name, justify="left" if left else "right", overflow="fold")
    return table


def _numbers(row: Sequence[Choice]) -> tuple[str, str, str]:
    mean = statistics.fmean
    error = mean(c.error for c in row)
    colour = "green" if error < _WARN else "yellow" if error < _BAD else "red"
    return (
        f"{mean(c.density for c in row):.1%}",
        f"{mean(c.recall for c in row):.1%}",
        f"[{colour}]{error:.2%}[/]",
    )
