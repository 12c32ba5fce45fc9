"""The GPU part of docs/performance.md, from records of `make gpu`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bench.bilevel_pages import gpu_bilevel
from bench.gpu_record import Goal, Record, Run


def gpu_pages(runs: Sequence[Record]) -> list[str]:
    """One part a device; what was aimed at, where nothing has run."""
    if not runs:
        return ["## GPU\n\nNot yet run on hardware: run `make gpu` where there is a GPU.\n"]
    return ["\n".join(_device(run)) + "\n" for run in runs]


def _device(run: Record) -> Iterable[str]:
    local = " with local changes" if run.dirty else ""
    yield f"## GPU: {run.device}\n"
    yield (
        f"Driver {run.driver}, CUDA {run.cuda_runtime}, torch {run.torch}, triton {run.triton}. "
        f"Commit {run.commit}{local}; measured {run.utc[:10]} (UTC). "
        f"Clocks, temperature and power before: {run.clocks.get('before', '?')}; "
        f"after: {run.clocks.get('after', '?')}."
    )
    if run.goals:
        yield "\n### What was aimed at\n"
        yield from _goals(run.goals)
    if run.bench:
        yield from _runs(run)
    for section in run.sections:
        name, data = section.name, section.data
        if not isinstance(data, dict):
            continue
        if name.startswith("prefill "):
            yield from _prefill(section.key, data)
        elif name == "bilevel":
            yield from gpu_bilevel(data)
    yield "\n### Sections\n"
    yield "| section | result | seconds |\n|---|---|---|"
    for section in run.sections:
        why = f": {section.why}".replace("|", "/") if section.why else ""
        yield f"| {section.key} | {section.status}{why} | {section.seconds:.0f} |"


def _goals(goals: Sequence[Goal]) -> Iterable[str]:
    yield "| backend | goal | target | measured | |\n|---|---|---|---|---|"
    for goal in goals:
        sign = "at most" if goal.at_most else "at least"
        value = "" if goal.value is None else f"{goal.value:.3g}"
        state = goal.status if goal.status == "met" else f"**{goal.status}**"
        cells = (goal.backend, goal.title, f"{sign} {goal.target:g}", value, state)
        yield "| " + " | ".join(cells) + " |"


def _runs(run: Record) -> Iterable[str]:
    """Every timed call: ours itemised, and what others take for the same shape."""
    ceilings = run.ceilings
    yield "\n### Shapes\n"
    if "matmul_tflops" in ceilings:
        yield (
            f"Ceilings measured in the run: bf16 matrix product {ceilings['matmul_tflops']:.0f} "
            f"TFLOP/s, copy {ceilings['copy_tb_s']:.2f} TB/s. The device's datasheet: "
            f"{ceilings.get('nominal') or 'not known here'}. Rates are those of listed blocks.\n"
        )
    yield (
        "| shape | listed | block | run | operands | item | ms (p10 to p90) | samples "
        "| first call, ms | TFLOP/s | of best dense | of datasheet | of matrix product |"
    )
    yield "|" + 13 * "---|"
    for x in run.bench:
        yield _run_row(x)


def _run_row(x: Run) -> str:
    def share(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.1f} %"

    facts = [x.shape, share(x.density), "" if x.block is None else str(x.block), x.contender]
    facts += [x.format, x.what]
    if x.ms is None:
        cells = [*facts, x.why_not, *[""] * 6]
    else:
        spread = "" if x.p10 is None or x.p90 is None else f" ({x.p10:.4g} to {x.p90:.4g})"
        rate = "" if x.tflops is None else f"{x.tflops:.1f}"
        shares = [share(v) for v in (x.of_best_dense, x.of_nominal, x.of_measured)]
        first = "" if x.first_ms is None else f"{x.first_ms:.4g}"
        cells = [*facts, f"{x.ms:.4g}{spread}", str(x.reps), first, rate, *shares]
    return "| " + " | ".join(cells) + " |"


def _prefill(key: str, data: dict[str, Any]) -> Iterable[str]:
    """One length: what was aimed at, our planners itemised, and what others did."""
    yield f"\n### {key}: prefill of {data['tokens']} tokens ({data['shape']})\n"
    yield from _ratios(data["ratios"])
    yield (
        "\n| planner or kernel | listed | recall, mean (worst) | plan, ms | attend, ms | both, ms "
        "| TFLOP/s | peak, GB |\n|---|---|---|---|---|---|---|---|"
    )
    for run in (*data["ours"], *data["others"]):
        if "why_not" in run:
            yield f"| {run['run']} | {run['why_not']} | | | | | | |"
            continue
        listed = f"{100 * run['density']:.1f} %" if "density" in run else ""
        kept = f"{100 * run['recall']:.1f} % ({100 * run['least_recall']:.1f} %)" if listed else ""
        times = [f"{run[x]:.4g}" if x in run else "" for x in ("plan_ms", "attend_ms", "ms")]
        rate = f"{run['tflops']:.1f}" if "tflops" in run else ""
        peak = f"{run['peak_gb']:.1f}" if "peak_gb" in run else ""
        yield "| " + " | ".join((run["run"], listed, kept, *times, rate, peak)) + " |"


def _ratios(ratios: dict[str, dict[str, Any]]) -> Iterable[str]:
    yield "| ratio | measured | target |\n|---|---|---|"
    for name, goal in ratios.items():
        target = ""
        if goal["target"] is not None:
            missed = (goal["value"] > goal["target"]) == goal["at_most"]
            sign = "at most" if goal["at_most"] else "at least"
            target = f"{sign} {goal['target']:g}{', **missed**' if missed else ''}"
        yield f"| {name} | {goal['value']:.3g} | {target} |"
