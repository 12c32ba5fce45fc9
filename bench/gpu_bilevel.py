"""Bi-level routing attention on a GPU: right, with gradients, and beside what torch offers.

What another contender cannot do here (no memory, no compiler) is recorded, not fatal; a wrong or
failing result of our own is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from permattn import route_regions
from permattn.testing import float64_bound
from torch import Tensor

from bench.bilevel import prepared
from bench.bilevel_baselines import STAGES, Attend, Stage, attends, gather, ours
from bench.bilevel_pages import TARGETS
from bench.gpu_prefill import milliseconds

DEVICE = torch.device("cuda")
# A detector's image of 800 x 1344: maps padded so that 16 x 16 regions divide them.
DETECTION = (
    Stage("detection-stage1", 1, 208, 2, 16, 1, columns=336),
    Stage("detection-stage2", 1, 112, 4, 16, 4, columns=176),
    Stage("detection-stage3", 1, 64, 8, 16, 16, columns=96),
)
CHECKED = (
    Stage("small-1", 2, 28, 2, 7, 4),
    Stage("small-2", 2, 14, 8, 7, 16),
    Stage("small-3", 1, 48, 2, 3, 1, head_dim=64),
)
# Over the time in which q, k and v are read once and the result is written once.
TRAFFIC_GOAL = 1.5


def correctness(backend: str) -> list[dict[str, Any]]:
    """Results and gradients of small stages against float64, in every dtype.

    Raises:
        AssertionError: more than twice as far from float64 as the gather in the same dtype.
    """
    found, wrong = [], []
    for stage in CHECKED:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for phase in ("forward", "both"):
                qkv, graph, grad = stage.draw(dtype)
                released, mine_of = partial(gather, stage=stage), _ours(stage, backend)
                exact = prepared(released, qkv.double(), graph, grad.double(), phase)()
                qkv, graph, grad = (x.to(DEVICE) for x in (qkv, graph, grad))
                plain = prepared(released, qkv, graph, grad, phase)()
                run = prepared(mine_of, qkv, graph, grad, phase)
                mine = run()
                qkv, graph, grad = (x.cpu() for x in (qkv, graph, grad))
                error = float64_bound(mine.cpu(), plain.cpu(), exact)
                name = f"{stage.name} {dtype} {phase}"
                found.append({"case": name, "error": error.ours, "bound": error.bound})
                if not error.ok or not torch.equal(mine, run()):
                    wrong.append(name)
    if wrong:
        raise AssertionError(f"{len(wrong)} of {len(found)} are wrong or differ: {wrong}")
    return found


def timing(
    backend: str, stages: Sequence[Stage] = (*STAGES, *DETECTION), *, compiled: bool = True
) -> dict[str, Any]:
    """Every stage at 224 (batch 16) and 512 (batch 2), and a detector's, in bf16.

    Returns: `stages`, milliseconds of each contender forward and with gradients, of routing, and of
    the compulsory traffic at the bandwidth that a copy reaches; `ratios` with what was aimed at.
    """
    bandwidth = copy_bandwidth()
    rows = [_stage(stage, backend, bandwidth, compiled) for stage in stages]
    return {"bandwidth": bandwidth, "stages": rows, "ratios": ratios(rows)}


def _stage(stage: Stage, backend: str, bandwidth: float, compiled: bool) -> dict[str, Any]:
    qkv, graph, grad = (x.to(DEVICE) for x in stage.draw(torch.bfloat16))
    row: dict[str, Any] = {"stage": stage.name, "title": str(stage)}
    for phase in ("forward", "both"):
        row[phase] = {
            name: _recorded(name, attend, qkv, graph, grad, phase)
            for name, attend in _contenders(stage, backend, compiled).items()
        }
    q, k, _ = qkv.unflatten(-1, (3, stage.heads, -1)).unbind(3)
    sides = (stage.regions, stage.regions)
    row["routing"] = milliseconds(
        lambda: route_regions(q, k, sides, topk=stage.topk, backend=backend)
    )
    tokens = stage.batch * stage.height * stage.width
    row["traffic"] = 1e3 * 4 * 2 * tokens * stage.channels / bandwidth
    return row


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What was aimed at: name -> value, target, at_most."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        mine = row["forward"]["ours"]["ms"]
        found[f"{row['stage']}: forward over compulsory traffic"] = {
            "value": mine / row["traffic"],
            "target": TRAFFIC_GOAL,
            "at_most": True,
        }
        for phase, target in TARGETS.items():
            times = row[phase]
            if "ms" in times["gather"]:
                found[f"{row['stage']}: {phase} over gather"] = {
                    "value": times["gather"]["ms"] / times["ours"]["ms"],
                    "target": target,
                    "at_most": False,
                }
    return found


def copy_bandwidth(size: int = 1 << 29) -> float:
    """Bytes per second that a copy of `size` bytes reads and writes."""
    source = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2e3 * size / milliseconds(lambda: target.copy_(source))


def _ours(stage: Stage, backend: str) -> Attend:
    return lambda qkv, graph: ours(qkv, graph, stage, backend)


def _contenders(stage: Stage, backend: str, compiled: bool) -> dict[str, Attend]:
    made: dict[str, Attend] = {"ours": _ours(stage, backend)}
    # As in bench.bilevel: many shapes would reach torch's limit of recompilations.
    torch._dynamo.reset()
    for name, attend in attends(stage).items():
        if name == "ours":
            continue
        made[name] = attend
        if compiled:
            made[f"{name}, compiled"] = torch.compile(attend, dynamic=False)
    return made


def _recorded(
    name: str, attend: Attend, qkv: Tensor, graph: Tensor, grad: Tensor, phase: str
) -> dict[str, Any]:
    """Milliseconds; what another contender cannot do is a row of the table."""
    try:
        return {"ms": milliseconds(prepared(attend, qkv, graph, grad, phase))}
    except Exception as error:
        if name == "ours":
            raise
        return {"why_not": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"}
