"""Runs the shared cases of the Triton backend on the PTX that its launches compile to.

python tests/ptxsim/triton_cases.py --arch 90 --case 'attention/three-parts$'

One JSON row per case: the kernels, what was wrong, seconds. In a process of its own, since Triton's
driver and interpreter are settled once per process.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import ptxsim
import torch
from permattn import sparse_attention_with_lse
from permattn.core import AttnPlan
from permattn.testing import assert_within, split_plan
from triton_launches import simulated


def check_forward(plan: AttnPlan, dim: int) -> None:
    """Output and log-sum-exp alone, of one head in float16."""
    from kernel_cases import HALF, Case, expected

    case = Case("forward", lambda: plan, heads=1, dim=dim, dim_v=dim, dtype=HALF)
    q, k, v, *_ = inputs = case.inputs(plan)
    found = sparse_attention_with_lse(q, k, v, plan, scale=case.scale, backend="triton")
    plain, exact = expected(plan, inputs, case.scale)
    for name, value in zip(("out", "lse"), found, strict=True):
        assert_within(value, plain[name], exact[name], name)


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """(suite/name, check) of all shared cases."""
    import kernel_cases
    import probe_cases
    import quantised_cases
    import region_cases
    import test_block_mass
    import test_routing

    for suite, module in (
        ("attention", kernel_cases),
        ("quantised", quantised_cases),
        ("regions", region_cases),
    ):
        for case in module.CASES:
            yield f"{suite}/{case.name}", lambda m=module, c=case: m.check_case(c)
    for probed in probe_cases.CASES:
        yield f"probe/{probed.name}", lambda c=probed: probe_cases.check_case(c, "triton")
    orders = split_plan(40, 50, heads=1, batch=1, seed=2)
    yield "forward/two-orders", lambda: check_forward(orders, 32)
    for mass in test_block_mass.CASES:
        yield f"mass/{mass}", lambda c=mass: test_block_mass.test_masses_are_the_references(c)
    for routed in test_routing.ROUTED:
        yield (
            f"routes/{routed[0]}",
            lambda c=routed: test_routing.test_routes_are_the_references(*c),
        )


def run(name: str, check: Callable[[], None], arch: int, options: dict[str, Any]) -> dict[str, Any]:
    """One row."""
    start, fault = time.perf_counter(), None
    with simulated(arch, options=options) as simulator:
        try:
            check()
        except (AssertionError, ptxsim.SimulationError) as error:
            fault = f"{type(error).__name__}: {error}"
    spent = sum(e.seconds for e in simulator.executed)
    conflicts = collections.Counter[str]()
    for e in simulator.executed:
        conflicts[e.name] += e.report.statistics.get("ldmatrix bank conflicts", 0)
    return {
        "case": name,
        "arch": arch,
        "fault": fault,
        "kernels": sorted({e.name for e in simulator.executed}),
        "steps": sum(e.report.steps for e in simulator.executed),
        "conflicts": {k: n for k, n in conflicts.items() if n},
        "seconds": round(time.perf_counter() - start, 2),
        "simulated": round(spent, 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--case", default="", help="regular expression on suite/name")
    parser.add_argument("--eager", action="store_true", help="copies land at once")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    faults = 0
    for arch in args.arch:
        for name, check in cases():
            if re.search(args.case, name):
                row = run(name, check, arch, {"eager": args.eager})
                faults += row["fault"] is not None
                print(json.dumps(row), flush=True)
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
