"""`python -m bench.run`: checks every contender, then times it, prints a table and writes JSONL.

A result outside the float64 bound is not timed, and makes the run fail. A target that is missed
does not: losses are published too.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from permattn.backends import AUTO_ORDER
from permattn.core import AttnPlan
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench.clock import Timing, measure
from bench.contenders import Bench
from bench.gate import judge
from bench.heads import recall
from bench.machine import ROOT, commit, describe, utc_now
from bench.memory import measure_memory
from bench.registry import CASES, Case
from bench.results import ALL_CORES, ONE_THREAD, Row, merge
from bench.table import print_case, print_summary

QUICK = Timing(rounds=2, max_rounds=2, min_seconds=0.02)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("cases", nargs="*", metavar="CASE", help="names or patterns such as 'bf16-*'; all if none")
    add("--list", action="store_true", help="list the cases and stop")
    add("--quick", action="store_true", help="a small smoke run: few cases, few tokens, not saved")
    add("--backend", default="auto", choices=("auto", *AUTO_ORDER), help="default: auto")
    add("--threads", type=int, default=None, help="torch threads (default: all cores)")
    add("--rounds", type=int, default=7, help="quiet samples of each contender (default: 7)")
    add("--max-rounds", type=int, default=None, help="rounds at most (default: 3 x rounds)")
    add("--patience", type=float, default=30, help="seconds a case may wait for a quiet machine")
    add("--no-flex", action="store_true", help="leave out compiled FlexAttention")
    add("--out", type=Path, default=None, help=f"JSONL file (default: {ALL_CORES}, {ONE_THREAD})")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the bench. Returns 0; 1 when a result is wrong; 2 for bad arguments; 130 on Ctrl-C."""
    args = parse(sys.argv[1:] if argv is None else argv)
    console = Console() if sys.stdout.isatty() else Console(width=140)
    try:
        return _run(args, console)
    except NotImplementedError as error:
        console.print(f"bench: {error}", highlight=False)
        return 2
    except KeyboardInterrupt:
        console.print("bench: interrupted; finished cases are saved")
        return 130


def _run(args: argparse.Namespace, console: Console) -> int:
    cases = _selected(args)
    if args.list:
        for case in CASES:
            console.print(f"{case.name:14} {case.title} ({case.shape})", highlight=False)
        return 0
    if not cases:
        console.print(f"no case matches {args.cases}; --list names them")
        return 2
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    one = torch.get_num_threads() == 1
    rounds, most = args.rounds, args.max_rounds or 3 * args.rounds
    timing = QUICK if args.quick else Timing(rounds, most, patience=args.patience, cpu_time=one)
    rows = []
    for case in cases:
        row = run_case(case, args.backend, shortened(timing, case), console)
        print_case(console, row)
        rows.append(row)
        out = args.out or (None if args.quick else ROOT / (ONE_THREAD if one else ALL_CORES))
        if out is not None and row.is_right:
            merge(out, row)  # after each case, so that an interrupted run keeps what it has
    print_summary(console, rows)
    return 0 if all(row.is_right for row in rows) else 1


def shortened(timing: Timing, case: Case) -> Timing:
    """A case with a slow contender takes fewer rounds; one more may replace a disturbed sample."""
    if case.rounds is None:
        return timing
    rounds = min(timing.rounds, case.rounds)
    return replace(timing, rounds=rounds, max_rounds=min(timing.max_rounds, case.rounds + 1))


def run_case(case: Case, backend: str, timing: Timing, console: Console) -> Row:
    """Gate first, then time."""
    threads = torch.get_num_threads()
    head, dirty = commit()
    row = Row(
        case=case.name,
        group=case.group,
        title=case.title,
        shape=str(case.shape),
        backend=backend,
        machine=describe(threads) | {"clock": "process CPU time" if timing.cpu_time else "wall"},
        commit=head,
        dirty=dirty,
        utc=utc_now(),
    )
    if case.probe == "memory":
        _probe_memory(case, backend, threads, row)
    else:
        _probe_time(case, backend, timing, row, console)
    return row


def _probe_time(case: Case, backend: str, timing: Timing, row: Row, console: Console) -> None:
    bench = Bench(case, backend, row.machine["threads"])
    row.backend = bench.backend_name
    contenders = {}
    for run in case.runs:
        if run.threads is not None and run.threads > row.machine["threads"]:
            continue
        contender = bench.contender(run)
        if contender.judged:
            out = contender.call()
            assert isinstance(out, torch.Tensor) and contender.plan is not None
            verdict = judge(out, bench.q, bench.k, bench.v, contender.plan)
            row.add_verdict(run.name, verdict)
            if not verdict.ok:
                continue
        contenders[run.name] = contender
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(case.name, total=len(contenders) * timing.rounds)
        samples = measure(
            {name: c.call for name, c in contenders.items()},
            timing,
            lambda name: progress.update(task, advance=1, description=f"{case.name} {name}"),
        )
    for name, contender in contenders.items():
        plan = contender.plan
        density = None if plan is None else plan.density(causal=is_causal(plan))
        row.add_run(name, samples[name], contender.flops, contender.pairs, density)
        if contender.recall and plan is not None:
            kept = recall(plan, bench.q, bench.k, bench.v, backend=backend)
            row.runs[name] |= {"recall": float(kept.mean()), "least_recall": float(kept.min())}
    for goal in case.goals:
        row.add_goal(goal)


def is_causal(plan: AttnPlan) -> bool:
    """Whether every part looks back only: its density is then a share of the causal pairs."""
    return all(p.band.min_lag is not None and p.band.min_lag >= 0 for p in plan.parts)


def _probe_memory(case: Case, backend: str, threads: int, row: Row) -> None:
    facts = measure_memory(case, backend, threads)
    row.backend = facts["backend"]
    name = case.runs[0].name
    row.gate[name] = {x: facts[x] for x in ("error", "torchs", "bound", "ok")}
    row.runs[name] = {
        "ms": facts["ms"],
        "gflop": facts["flops"] / 1e9,
        "gflops": facts["flops"] / facts["ms"] / 1e6,
        "density": facts["density"],
        "peak_gb": facts["peak_gb"],
        "before_gb": facts["before_gb"],
    }
    for goal in case.goals:
        row.add_value(goal, facts["peak_gb"])


def _selected(args: argparse.Namespace) -> list[Case]:
    patterns = args.cases or ["*"]
    cases = [c for c in CASES if any(fnmatch.fnmatch(c.name, p) for p in patterns)]
    if args.quick:
        return [c.small() for c in cases if c.quick]
    return [c.without_flex() for c in cases] if args.no_flex else cases


if __name__ == "__main__":
    raise SystemExit(main())
