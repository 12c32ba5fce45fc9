"""PARO plans as a table: a row per layer, with orders, density, recall and output error."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table

from permattn.calibrate.paro import PlanCheck, free_density
from permattn.core.axis_order import ORDER_NAMES
from permattn.patterns.paro import ParoPlan

# Errors are coloured from here on.
_WARN, _BAD = 0.05, 0.2


def print_plan(console: Console, plan: ParoPlan, check: PlanCheck | None, *, title: str) -> None:
    """The table, and a line of totals below it.

    Args:
        check: measured on a run; None = what the plan's file knows.
    """
    console.print()
    console.print(f"[bold]{title}[/]", highlight=False)
    table = Table()
    table.add_column("layer", justify="right")
    table.add_column("axis orders", overflow="fold")
    for name in ("density", "free", "recall"):
        table.add_column(name, justify="right")
    if check is not None:
        table.add_column("output error", justify="right")
        table.add_column("worst head", justify="right")
    facts = plan_facts(plan, check)
    for row in facts["layers"]:
        cells = [
            str(row["layer"]),
            ", ".join(f"{n} {name}" for name, n in row["orders"].items()),
            f"{row['density']:.1%}",
            f"{row['free_density']:.1%}",
            "" if row["recall"] is None else f"{row['recall']:.1%}",
        ]
        if check is not None:
            cells += [_error(row["error"]), f"{row['worst']}: {_error(row['worst_error'])}"]
        table.add_row(*cells)
    console.print(table)
    console.print(_totals(facts), highlight=False)
    if facts["empty_heads"]:
        console.print(
            f"{facts['empty_heads']} heads are empty: they see text alone", highlight=False
        )


def plan_facts(plan: ParoPlan, check: PlanCheck | None) -> dict[str, Any]:
    """What the table shows, as JSON values."""
    density = plan.density()
    free = free_density(plan.num_blocks, plan.num_vision_tokens, plan.block)
    recall = plan.recall.mean(0) if plan.recall is not None else None
    if check is not None:
        recall = check.recall
    layers = []
    for n in range(plan.num_layers):
        orders = Counter(ORDER_NAMES[i] for i in plan.axis_orders[n].tolist())
        row: dict[str, Any] = {
            "layer": n,
            "orders": dict(orders.most_common()),
            "density": float(density[:, n].mean()),
            "free_density": float(free[:, n].mean()),
            "recall": None if recall is None else float(recall[n].mean()),
        }
        if check is not None:
            row["error"] = float(check.error[n].mean())
            row["worst"] = int(check.error[n].argmax())
            row["worst_error"] = float(check.error[n].max())
        layers.append(row)
    nq, nk = plan.mask_shape
    return {
        "model_class": plan.origin.model_class,
        "grid": list(plan.grid),
        "tokens": plan.num_vision_tokens,
        "block": list(plan.block),
        "blocks": [nq, nk],
        "text": plan.text,
        "bins": plan.num_bins,
        "sigma_edges": list(plan.sigma_edges),
        "bytes": plan.num_bytes,
        "metric": plan.origin.metric,
        "scope": plan.origin.scope,
        "orders": dict(
            Counter(ORDER_NAMES[i] for i in plan.axis_orders.flatten().tolist()).most_common()
        ),
        "density": float(density.mean()),
        "free_density": float(free.mean()),
        "recall": None if recall is None else float(recall.mean()),
        "least_recall": None if recall is None else float(recall.min()),
        "error": None if check is None else float(check.error.mean()),
        "empty_heads": int(plan.empty_heads.sum()),
        "layers": layers,
    }


def plan_title(plan: ParoPlan) -> str:
    """One line that says what a plan is for."""
    frames, height, width = plan.grid
    return (
        f"{plan.origin.model_class}: {frames} x {height} x {width} = "
        f"{plan.num_vision_tokens:,} tokens, {plan.num_layers} layers x {plan.num_heads} heads, "
        f"density {float(plan.density().mean()):.1%}"
    )


def size_of(plan_bytes: int) -> str:
    """The size of a plan, in words."""
    unit, name = (1e6, "MB") if plan_bytes >= 1e6 else (1e3, "kB")
    return f"{plan_bytes / unit:.1f} {name} of orders and masks"


def _totals(facts: dict[str, Any]) -> str:
    orders = ", ".join(f"{n} {name}" for name, n in facts["orders"].items())
    parts = [f"Orders: {orders}", f"density {facts['density']:.1%}"]
    if facts["recall"] is not None:
        parts.append(f"recall {facts['recall']:.2%} (least {facts['least_recall']:.1%})")
    if facts["error"] is not None:
        parts.append(f"output error {facts['error']:.2%}")
    bins = "1 bin" if facts["bins"] == 1 else f"{facts['bins']} bins"
    parts.append(f"{bins} of noise, {size_of(facts['bytes'])}")
    return "; ".join(parts)


def _error(value: float) -> str:
    colour = "green" if value < _WARN else "yellow" if value < _BAD else "red"
    return f"[{colour}]{value:.2%}[/]"
