"""The text of docs/performance.md, from rows of results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.bilevel_pages import bilevel_section
from bench.gpu_pages import gpu_pages
from bench.gpu_record import newest_by_device, records
from bench.machine import threads_text
from bench.registry import CASES, PLANNERS, TARGETS
from bench.results import Row, break_even, load

_INTRO = """\
<!-- Written by `make docs` from bench/results. Do not edit: a test compares both. -->

# Performance

Every number on this page comes from `bench/results`, written by `make bench`. A result is checked
first: a sample of queries of every head against float64, allowed at most twice the error of plain
torch attention in the same dtype. What is not right is not timed. Times are medians of
interleaved samples (A B A B, one process); samples during which other programs used more than a
tenth of a core are dropped where enough others remain. Inputs are seeded normal numbers, and
lists are random: another one for every head, and in every row the same share of blocks. Where a
plan is found online, q and k hold what there is to find. FLOPs are those of listed blocks.

Two ratios stand side by side. *Over SDPA* is what a user gains against
`F.scaled_dot_product_attention` in the same dtype. *Over our dense list* divides by the same
kernel with every block listed: the part of the gain that is sparsity, not a better dense kernel.

How good torch's own kernel is differs from CPU to CPU, so the first ratio does not carry over:
where SDPA reaches about the same rate in bf16 as in fp32 (compare the GFLOP/s), it has no fast
bf16 path on that CPU; on CPUs with AMX it has one, and the bf16 ratios will be smaller. The targets
are those that were set for a CPU with AMX.
"""
_SPEED_COLUMNS = (
    ("100 %", "100 % vs SDPA"),
    ("50 %", "50 % vs SDPA"),
    ("25 %", "25 % vs SDPA"),
    ("10 %", "10 % vs SDPA"),
    ("causal dense", "causal dense vs causal SDPA"),
    ("causal, 25 % of its blocks", "causal 25 % vs causal SDPA"),
)
_GROUPS = {
    "structure": "What structure costs",
    "planning": "Finding a plan",
    "prefill": "Sparse prefill, planning included",
    "length": "Where it begins to pay",
    "planners": "Other planners on the same kernel",
    "paro": "PAROAttention: reordered, quantised",
    "threads": "Threads",
    "size": "Small, large, sparser",
}


def performance_page(results: Path) -> str:
    """The whole page; it says so where nothing has been measured."""
    rows = sorted(load(results / "cpu.jsonl"), key=_order)
    parts = [_INTRO]
    if not rows:
        parts.append("## CPU\n\nNothing has been measured yet: run `make bench`.\n")
    else:
        parts += _cpu(rows, results)
    single = sorted(load(results / "cpu-1-thread.jsonl"), key=_order)
    if single:
        parts += _one_thread(single)
    if (results / "bilevel.json").exists():
        parts.append(bilevel_section(json.loads((results / "bilevel.json").read_text())))
    parts += gpu_pages(newest_by_device(records(results / "gpu")))
    return "\n".join(parts).rstrip() + "\n"


def speed_table(rows: Sequence[Row]) -> str:
    """Speed-up over SDPA, its target, and the speed-up over our own dense list."""
    lines = [
        "| over SDPA (target), over our dense list | "
        + " | ".join(c for c, _ in _SPEED_COLUMNS)
        + " |",
        "|---|" + "---|" * len(_SPEED_COLUMNS),
    ]
    by_case = {row.case: row for row in rows}
    for dtype, head_dim in TARGETS:
        row = by_case.get(f"{dtype}-d{head_dim}")
        if row is not None:
            cells = [_cell(row.goals.get(goal)) for _, goal in _SPEED_COLUMNS]
            lines.append(f"| {dtype}, D = {head_dim} | " + " | ".join(cells) + " |")
    return "\n".join(lines) if len(lines) > 2 else "Nothing has been measured yet."


def _cell(goal: dict[str, Any] | None) -> str:
    if goal is None:
        return ""
    text = f"**{goal['value']:.2f}x**"
    if goal["target"] is not None:
        text += f" ({goal['target']:g}x{'' if goal['met'] else ', missed'})"
    if goal["own"] is not None:
        text += f", {goal['own']:.2f}x"
    return text


def _cpu(rows: Sequence[Row], results: Path) -> Iterable[str]:
    yield f"## CPU\n\n{_machine(rows)}\n"
    speed = [row for row in rows if row.group == "speed"]
    if speed:
        sizes = speed[0].shape.rsplit(" D=", 1)[0]
        yield f"Speed-ups, {sizes}, blocks of 128:\n\n{speed_table(rows)}\n"
    if (results / "cpu.png").exists():
        yield "![speed-up against the share of blocks listed](../bench/results/cpu.png)\n"
    flex = [(row, name) for row in speed for name in row.goals if "FlexAttention" in name]
    if flex:
        yield "### Against compiled FlexAttention, same blocks\n"
        yield _goal_table([(row, name, row.goals[name]) for row, name in flex])
    for group, title in _GROUPS.items():
        members = [row for row in rows if row.group == group]
        if members:
            yield f"### {title}\n"
            yield "\n".join(f"- `{row.case}`: {row.title} ({row.shape})" for row in members) + "\n"
            if group == "length":
                yield break_even(members) + "\n"
            if group == "planners":
                yield "\n".join(_planners(row) for row in members)
            yield _goal_table([(row, n, g) for row in members for n, g in row.goals.items()])
    yield _missed(rows)
    yield _samples(rows)


def _one_thread(rows: Sequence[Row]) -> Iterable[str]:
    """CPU time on one thread: fewer cores, but true on a busy machine too."""
    yield (
        "## CPU, one thread\n\nProcess CPU time, which other programs disturb less than the "
        f"wall's. {_machine(rows)}\n"
    )
    yield f"{speed_table(rows)}\n"
    shown = [(r, n, g) for r in rows for n, g in r.goals.items()]
    yield _goal_table([x for x in shown if x[0].group != "speed" or "FlexAttention" in x[1]])


def _goal_table(goals: Sequence[tuple[Row, str, dict[str, Any]]]) -> str:
    lines = [
        "| case | ratio | measured | target | over our dense list |",
        "|---|---|---|---|---|",
    ]
    for row, name, goal in goals:
        target = ""
        if goal["target"] is not None:
            sign = "at most" if goal["at_most"] else "at least"
            target = f"{sign} {goal['target']:g}{'' if goal['met'] else ', **missed**'}"
        own = "" if goal["own"] is None else f"{goal['own']:.2f}"
        lines.append(f"| {row.case} | {name} | {goal['value']:.3g} | {target} | {own} |")
    return "\n".join(lines) + "\n"


def _planners(row: Row) -> str:
    """What every planner lists, what of the true attention that holds, and what it costs."""
    lines = [
        "Recall is the share of the attention mass that a plan keeps. The heads are built, so that",
        "where the mass lies is known (`bench/heads.py`): single keys, lines and diagonals above",
        "unit normal noise. That suits no method that scores whole blocks, so the table says what",
        "each rule does with such heads, not how it does on a model.",
        "",
        "| planner | listed | recall, mean | recall, worst head | plan, ms | plan and attend, ms |",
        "|---|---|---|---|---|---|",
    ]
    for name in PLANNERS:
        run, plan = row.runs.get(name), row.runs.get(f"{name}-plan")
        if run is None or plan is None:
            continue
        shares = [run["density"], run["recall"], run["least_recall"]]
        cells = [name, *(f"{100 * x:.1f} %" for x in shares)]
        cells += [f"{plan['ms']:.4g}", f"{run['ms']:.4g}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _missed(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        for name, goal in row.goals.items():
            if goal["met"] is False:
                lines.append(
                    f"- {row.case}, {name}: {goal['value']:.3g}, wanted {goal['target']:g}"
                )
            if goal["own_met"] is False:
                lines.append(
                    f"- {row.case}, {name}, over our dense list: {goal['own']:.3g}, "
                    f"wanted {goal['own_target']:g}"
                )
    text = "\n".join(lines) if lines else "None."
    return f"### Targets missed\n\n{text}\n"


def _samples(rows: Sequence[Row]) -> str:
    """Every contender: time, spread, how many samples, rate, distance from float64."""
    lines = [
        "### Every contender\n",
        "`kept` of `tried` samples were used; * = the machine was busy, so none was dropped. Error",
        "and its bound are the largest distances from float64 over the sampled queries.\n",
        "| case | contender | listed | ms | p10 to p90 | kept / tried | GFLOP/s | error (bound) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for name, run in row.runs.items():
            density = run.get("density")
            listed = "" if density is None else f"{100 * density:.1f} %"
            spread = f"{run['p10']:.4g} to {run['p90']:.4g}" if "p10" in run else ""
            busy = "" if run.get("quiet", True) else " *"
            kept = f"{run['kept']} / {run['tried']}{busy}" if "kept" in run else "one"
            gate = row.gate.get(name)
            error = f"{gate['error']:.1e} ({gate['bound']:.1e})" if gate else ""
            rate = f"{run['gflops']:.0f}" if run["gflop"] else ""
            cells = (row.case, name, listed, f"{run['ms']:.4g}", spread, kept, rate, error)
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _machine(rows: Sequence[Row]) -> str:
    facts = sorted(
        {
            (
                f"{row.machine['cpu']}, {row.machine['cores']} cores, "
                f"{threads_text(row.machine['threads'])}, {row.machine['isa']}, "
                f"{row.machine['system']}, torch {row.machine['torch']}, "
                f"backend {row.backend}"
            )
            for row in rows
        }
    )
    commits = sorted({row.commit + (" with local changes" if row.dirty else "") for row in rows})
    days = sorted({row.utc[:10] for row in rows})
    return f"{'; '.join(facts)}. Commit {', '.join(commits)}; measured {', '.join(days)} (UTC)."


def _order(row: Row) -> int:
    names = [case.name for case in CASES]
    return names.index(row.case) if row.case in names else len(names)
