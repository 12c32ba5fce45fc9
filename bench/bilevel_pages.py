"""The part of docs/performance.md that is about bi-level routing attention."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

PHASES = {"forward": "forward", "both": "forward and gradients"}
# As bench.bilevel.TARGETS; ahead of the best other in at least this many of the shapes.
TARGETS = {"forward": 3.0, "both": 4.0}
AHEAD = 5

_INTRO = """\
## Bi-level routing attention

Stages 1 to 3 of a BiFormer at 224 (batch 16) and 512 (batch 2), heads of 32, one packed
channels-last projection, the same graph for everybody: routing is timed apart. *gather* is what the
released code does; *index_select* picks regions by number and calls torch's SDPA; *mask* is SDPA
under a boolean mask; each also compiled. A contender more than 20 times slower than ours was timed
once.
"""


def bilevel_section(found: dict[str, Any]) -> str:
    """The whole section, from bench/results/bilevel.json."""
    lines = [_INTRO]
    rows = [x for x in found.get("speed", {}).values() if isinstance(x, dict)]
    for phase in PHASES:
        for dtype in ("bf16", "fp32"):
            some = [row for row in rows if row["dtype"] == dtype]
            if some:
                lines += [*_speed(some, phase, dtype), ""]
    if "routing" in found:
        lines += [*_routing(found["routing"]), ""]
    if "memory" in found:
        lines += [_memory(found["memory"]), ""]
    if "model" in found:
        lines += [*_model(found["model"]), ""]
    lines.append(_where(found))
    return "\n".join(lines)


def _speed(rows: list[dict[str, Any]], phase: str, dtype: str) -> Iterable[str]:
    ahead = sum(row[phase]["over_best_other"] > 1 for row in rows)
    verdict = "" if ahead >= min(AHEAD, len(rows)) else " (**missed**)"
    yield (
        f"{dtype}, {PHASES[phase]}: ahead of the best of the others in {ahead} of {len(rows)} "
        f"shapes (wanted: {AHEAD}){verdict}.\n"
    )
    yield (
        f"| stage | ours, ms | gather, ms | over gather (target {TARGETS[phase]:g}x) "
        "| best other, ms | over best other |"
    )
    yield "|---|---|---|---|---|---|"
    for row in rows:
        x = row[phase]
        missed = ", **missed**" if x["over_gather"] < TARGETS[phase] else ""
        best = x["best_other"]
        yield (
            f"| {row['stage']}: {row['title']} | {x['ms']['ours']:.3g} | {x['ms']['gather']:.4g} "
            f"| {x['over_gather']:.2f}x{missed} | {best} {x['ms'][best]:.3g} "
            f"| {x['over_best_other']:.2f}x |"
        )


def _routing(found: dict[str, Any]) -> Iterable[str]:
    yield "Routing (means, affinities, the largest k), float32:\n"
    yield "| stage | ours, ms | torch, ms | over torch |\n|---|---|---|---|"
    for name, row in found.items():
        if isinstance(row, dict):
            ms = row["ms"]
            yield f"| {name} | {ms['ours']:.3g} | {ms['torch']:.3g} | {row['over_torch']:.2f}x |"


def _memory(found: dict[str, Any]) -> str:
    times = found["gather_over_ours"]
    missed = "" if times >= 8 else ", **missed**"
    return (
        f"Memory of one call with gradients beyond its inputs, {found['stage']}, bf16: ours "
        f"{found['ours']['megabytes']:.0f} MB, gather {found['gather']['megabytes']:.0f} MB "
        f"({times:.1f}x; wanted: 8x{missed}), index_select "
        f"{found['index_select']['megabytes']:.0f} MB."
    )


def _model(found: dict[str, Any]) -> Iterable[str]:
    yield (
        "A whole BiFormer-T at 224, from end to end. Attention, routing and stage 4 are 6.2 % of "
        "its multiply-adds; linear layers and convolutions are the rest, the same for both.\n"
    )
    yield "| run | ours, ms | released gather, ms | gain |\n|---|---|---|---|"
    for row in found["runs"]:
        yield f"| {row['title']} | {row['ours']:.4g} | {row['gather']:.4g} | {row['gain']:.2f}x |"


def _where(found: dict[str, Any]) -> str:
    facts = found["machine"]
    commits = sorted(
        {
            part["commit"] + (" with local changes" if part["dirty"] else "")
            for part in found.values()
            if "commit" in part
        }
    )
    return (
        f"{facts['cpu']}, {facts['isa']}, {facts['threads']} threads, torch {facts['torch']}. "
        f"Commit {', '.join(commits)}. Written by `python -m bench.bilevel`.\n"
    )


def gpu_bilevel(data: dict[str, Any]) -> Iterable[str]:
    """The table of a GPU's report."""
    yield f"\n### bilevel (bf16; a copy reaches {data['bandwidth'] / 1e9:.0f} GB/s)\n"
    yield "| ratio | measured | target |\n|---|---|---|"
    for name, goal in data["ratios"].items():
        missed = (goal["value"] > goal["target"]) == goal["at_most"]
        sign = "at most" if goal["at_most"] else "at least"
        target = f"{sign} {goal['target']:g}{', **missed**' if missed else ''}"
        yield f"| {name} | {goal['value']:.3g} | {target} |"
    yield "\n| stage | phase | contender | ms |\n|---|---|---|---|"
    for row in data["stages"]:
        for phase, what in PHASES.items():
            for name, run in row[phase].items():
                ms = f"{run['ms']:.4g}" if "ms" in run else run["why_not"]
                yield f"| {row['stage']} | {what} | {name} | {ms} |"
        yield f"| {row['stage']} | routing | ours | {row['routing']:.4g} |"
        yield f"| {row['stage']} | compulsory traffic | | {row['traffic']:.4g} |"
