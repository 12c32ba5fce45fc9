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
from triton_launches import simulated


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """(suite/name, check) of all shared cases."""
    import kernel_cases
    import quantised_cases
    import region_cases

    for suite, module in (
        ("attention", kernel_cases),
        ("quantised", quantised_cases),
        ("regions", region_cases),
    ):
        for case in module.CASES:
            yield f"{suite}/{case.name}", lambda m=module, c=case: m.check_case(c)


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
