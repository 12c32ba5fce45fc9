"""The kernels of mma.sync on the PTX that nvcc makes of them, held to the bounds of their numbers.

python tests/cuda/ptx_cases.py              all of them, a line each
python tests/cuda/ptx_cases.py int8-fp8     those whose name matches
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

if __name__ == "__main__":
    TESTS = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(TESTS / folder) for folder in ("cuda_shim", "triton", "ptxsim")]

import torch
from launches import attend
from simulated import Simulator
from test_every_kernel import Kernel, for_mma


def check_kernel(shim: ModuleType, kernel: Kernel, **options: Any) -> str:
    """Runs a kernel's case on PTX; its symbol. An error where a number is outside of its bound.

    Args:
        options: of `ptxsim.launch`.
    """
    # 8.0 has no FP8; products of nibbles are native up to 8.9.
    simulator = Simulator(arch=89 if kernel.pv == "fp8" else 80, options=options)
    case, call = kernel.call(89, run=simulator)
    kernel.check(case, call, attend(shim, call))
    (symbol,) = simulator.kernels
    return symbol


def main() -> int:
    """Prints what failed; its count is the status."""
    import build

    torch.set_num_threads(1)
    shim, faults, wanted = build.module(), 0, sys.argv[1] if len(sys.argv) > 1 else ""
    for kernel in for_mma():
        if not re.search(wanted, str(kernel)):
            continue
        start, fault = time.perf_counter(), "right"
        try:
            check_kernel(shim, kernel)
        except Exception as error:
            fault, faults = f"{type(error).__name__}: {error}", faults + 1
        print(f"{kernel!s:28} {time.perf_counter() - start:5.2f} s  {fault}", flush=True)
    return faults


if __name__ == "__main__":
    sys.exit(main())
