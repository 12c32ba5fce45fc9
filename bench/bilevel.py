"""`python -m bench.bilevel`: bi-level routing attention against the released gather and torch.

Every stage of a BiFormer at 224 and 512, forward and with gradients, in bf16 and float32; then
routing, peak memory and a whole model. Results of a contender count only when they are right.
Writes bench/results/bilevel.json, from which docs/performance.md is made.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from permattn import route_regions
from permattn.testing import float64_bound
from torch import Tensor

from bench.bilevel_baselines import STAGES, Attend, Stage, attends, gather
from bench.clock import Samples, Timing, measure, sample
from bench.digits import rounded
from bench.docs import RESULTS
from bench.machine import ROOT, commit, describe, utc_now
from bench.memory import peak_gb

if TYPE_CHECKING:
    from rich.console import Console

PATH = RESULTS / "bilevel.json"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# A contender this many times slower than ours is timed once.
FAR_BEHIND = 20.0
PARTS = ("speed", "routing", "memory", "model")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.bilevel", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", choices=PARTS, action="append", help="a part (default: all)")
    parser.add_argument("--stage", action="append", help="a stage (default: all)")
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--no-compile", action="store_true", help="leave compiled baselines out")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dry", action="store_true", help="print only")
    parser.add_argument(
        "--peak-of", nargs=2, metavar=("STAGE", "CONTENDER"), help=argparse.SUPPRESS
    )
    args = parser.parse_args(argv)
    if args.peak_of:
        print(json.dumps(peak_of(*args.peak_of)))
        return 0
    stages = [s for s in STAGES if not args.stage or s.name in args.stage]
    if args.stage and len(stages) < len(set(args.stage)):
        parser.error(f"--stage: wants any of {[s.name for s in STAGES]}, got {args.stage}")
    parts = args.only or PARTS
    # `make gpu` imports this module where only torch is installed.
    from rich.console import Console

    console = Console()
    found = json.loads(PATH.read_text()) if PATH.exists() else {}
    head, dirty = commit()
    stamp = {"commit": head, "dirty": dirty, "utc": utc_now()}
    found["machine"] = describe(torch.get_num_threads())
    timing = Timing(rounds=args.rounds, max_rounds=2 * args.rounds, min_seconds=0.05, patience=60)
    for part in parts:
        data = found.setdefault(part, {})
        data.update(stamp)
        if part == "speed":
            for stage in stages:
                for dtype in args.dtype or DTYPES:
                    row = speed(stage, dtype, timing, compiled=not args.no_compile)
                    data[f"{stage.name}-{dtype}"] = row
                    say(console, row)
                    save(found, args.dry)
        elif part == "routing":
            data.update({s.name: routing(s, timing) for s in stages})
        elif part == "memory":
            data.update(memory())
        else:
            from bench.bilevel_model import model

            data.update(model(timing))
        if part != "speed":
            console.print_json(data=data)
        save(found, args.dry)
    return 0


def save(found: dict[str, Any], dry: bool) -> None:
    if not dry:
        PATH.write_text(json.dumps(rounded(found), indent=1) + "\n", encoding="utf-8")


def speed(stage: Stage, dtype: str, timing: Timing, *, compiled: bool) -> dict[str, Any]:
    """Times of every contender, forward and with gradients, and ours over each of them."""
    row: dict[str, Any] = {"stage": stage.name, "title": str(stage), "dtype": dtype}
    for phase in ("forward", "both"):
        calls = contenders(stage, dtype, phase, compiled)
        errors = check(calls, stage, dtype, phase)
        times = clock(calls, timing)
        ms = {name: s.median for name, s in times.items()}
        best = min((n for n in ms if n != "ours"), key=lambda n: ms[n])
        row[phase] = {
            "ms": ms,
            "errors": errors,
            "over_gather": ms["gather"] / ms["ours"],
            "best_other": best,
            "over_best_other": ms[best] / ms["ours"],
            "quiet": all(s.is_quiet for s in times.values()),
        }
    return row


def contenders(
    stage: Stage, dtype: str, phase: str, compiled: bool
) -> dict[str, Callable[[], Tensor]]:
    """Ready calls; with gradients they return that of qkv."""
    qkv, graph, grad = stage.draw(DTYPES[dtype])
    # One function under many shapes would reach torch's limit and silently run as it is.
    torch._dynamo.reset()
    made = {}
    for name, attend in attends(stage).items():
        forms = {name: attend}
        if compiled and name != "ours":
            forms[f"{name}, compiled"] = torch.compile(attend, dynamic=False)
        for form, run in forms.items():
            made[form] = prepared(run, qkv, graph, grad, phase)
    return made


def prepared(
    run: Attend, qkv: Tensor, graph: Tensor, grad: Tensor, phase: str
) -> Callable[[], Tensor]:
    def forward() -> Tensor:
        with torch.no_grad():
            return run(qkv, graph)

    leaf = qkv.clone().requires_grad_()

    def both() -> Tensor:
        return torch.autograd.grad(run(leaf, graph), leaf, grad)[0]

    return forward if phase == "forward" else both


def check(
    calls: dict[str, Callable[[], Tensor]], stage: Stage, dtype: str, phase: str
) -> dict[str, float]:
    """Largest error over float64 of every contender.

    Raises:
        AssertionError: ours is more than twice as far from float64 as the gather in this dtype.
    """
    qkv, graph, grad = stage.draw(DTYPES[dtype])
    released = partial(gather, stage=stage)
    exact = prepared(released, qkv.double(), graph, grad.double(), phase)()
    results = {name: call() for name, call in calls.items()}
    error = float64_bound(results["ours"], results["gather"], exact)
    if not error.ok:
        raise AssertionError(
            f"{stage.name} {dtype} {phase}: error {error.ours:.2e}, bound {error.bound:.2e}"
        )
    return {name: float((x.double() - exact).abs().max()) for name, x in results.items()}


def clock(calls: dict[str, Callable[[], Tensor]], timing: Timing) -> dict[str, Samples]:
    """A B A B; those far behind ours once, before."""
    calls["ours"]()
    ours = min(sample(calls["ours"], timing)[0] for _ in range(3))
    near, far = {}, {}
    for name, call in calls.items():
        call()
        milliseconds = sample(call, Timing(min_seconds=0.0))[0]
        if milliseconds > FAR_BEHIND * ours:
            far[name] = Samples(noisy=[milliseconds])
        else:
            near[name] = call
    return measure(near, timing) | far


def routing(stage: Stage, timing: Timing) -> dict[str, Any]:
    """Milliseconds of our routing and of plain torch's, in float32."""
    qkv, _, _ = stage.draw(torch.float32)
    q, k, _ = qkv.unflatten(-1, (3, stage.heads, -1)).unbind(3)
    sides = (stage.regions, stage.regions)

    def plain() -> Tensor:
        s, (h, w) = stage.regions, stage.box
        x = qkv[..., : 2 * stage.channels].unflatten(2, (s, w)).unflatten(1, (s, h))
        mean_q, mean_k = x.mean((2, 4)).flatten(1, 2).chunk(2, -1)
        return (mean_q @ mean_k.transpose(-1, -2)).topk(stage.topk, -1).indices

    def ours() -> Tensor:
        return route_regions(q, k, sides, topk=stage.topk)[0]

    times = measure({"ours": ours, "torch": plain}, timing)
    ms = {name: s.median for name, s in times.items()}
    return {"ms": ms, "over_torch": ms["torch"] / ms["ours"]}


def memory() -> dict[str, Any]:
    """Peak of forward and gradients at 512 x 512, stage 1, each in a process of its own."""
    found: dict[str, Any] = {"stage": "512-stage1"}
    for name in ("ours", "gather", "index_select"):
        command = [sys.executable, "-m", "bench.bilevel", "--peak-of", "512-stage1", name]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
    found["gather_over_ours"] = found["gather"]["megabytes"] / found["ours"]["megabytes"]
    return found


def peak_of(stage_name: str, contender: str) -> dict[str, float]:
    """Megabytes that one call with gradients needs beyond its inputs."""
    stage = next(s for s in STAGES if s.name == stage_name)
    # Libraries and threads start on a small call.
    small = Stage("small", 1, 16, 2, 4, 1)
    for each in (small, stage):
        qkv, graph, grad = each.draw(torch.bfloat16)
        call = prepared(attends(each)[contender], qkv, graph, grad, "both")
        before = peak_gb()
        call()
    return {"megabytes": 1e3 * (peak_gb() - before), "inputs_gb": before}


def say(console: Console, row: dict[str, Any]) -> None:
    for phase in ("forward", "both"):
        x = row[phase]
        times = ", ".join(f"{n} {t:.2f}" for n, t in x["ms"].items())
        console.print(
            f"{row['stage']} {row['dtype']} {phase}: {x['over_gather']:.2f}x gather, "
            f"{x['over_best_other']:.2f}x {x['best_other']} ({times} ms)",
            highlight=False,
        )


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    raise SystemExit(main())
