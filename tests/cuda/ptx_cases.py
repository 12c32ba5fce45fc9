"""Every sm80 attention kernel on the PTX that nvcc makes of it, held to the float64 bound.

python tests/cuda/ptx_cases.py            all of them, a line each
python tests/cuda/ptx_cases.py 'd128'     those whose name matches
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

if __name__ == "__main__":
    TESTS = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(TESTS / folder) for folder in ("cuda_shim", "triton", "ptxsim")]

import torch
from kernel_cases import BRAIN, HALF, WINDOW, Case, drawn, expected
from launches import Call, attend, shape_of
from permattn.core import QuantSpec
from permattn.testing import assert_within
from quantised_cases import QuantCase, check, in_float64
from simulated import Simulator

DIMS = (64, 96, 128, 256)
DTYPES = {"bf16": BRAIN, "f16": HALF}
PAIRS = (
    ("none", "none"),
    *(("int8", pv) for pv in ("none", "int8", "int4", "fp8")),
    *(("int4", pv) for pv in ("none", "int4")),
)
# 8.0 has no FP8; its products are the same instruction from 8.9 on.
ARCH = {"fp8": 89}


@dataclass(frozen=True)
class Kernel:
    """One kernel of the family, by what its instantiation is named by.

    Args:
        rows: of a tile of queries: 64 or 128.
        dtype: of results; kernels that quantise P V have one for both.
    """

    qk: str
    pv: str
    dim: int
    rows: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.qk}-{self.pv}-d{self.dim}-r{self.rows}-{self.dtype}"

    @property
    def arch(self) -> int:
        return ARCH.get(self.pv, 80)

    def case(self) -> Case:
        """Two tiles of queries whose last one is ragged, in orders of their own, with holes."""
        plan = drawn(
            *(self.rows + 2, 90),
            density=0.8,
            permuted=True,
            holes=3,
            band=WINDOW,
            block_q=self.rows,
            block_kv=64 if self.pv != "none" else 48,
        )
        # A row in a hundred may be off where P is rounded to a few steps.
        facts: dict[str, Any] = {
            "heads": 1 if self.pv == "none" else 2,
            "dtype": DTYPES[self.dtype],
        }
        facts |= {"dim": self.dim, "dim_v": self.dim}
        if self.qk == "none":
            return Case(str(self), plan, **facts)
        spec = QuantSpec(self.qk, self.pv, 32, 64 if self.pv != "none" else 16)
        return QuantCase(str(self), plan, **facts, spec=spec)


def kernels(shim: ModuleType) -> Iterator[Kernel]:
    """All that launches can choose: shapes are tried, and the choice says what they get."""
    for qk, pv in PAIRS:
        for dim in DIMS:
            for rows in (64, 128):
                for dtype in DTYPES if pv == "none" else ("bf16",):
                    kernel = Kernel(qk, pv, dim, rows, dtype)
                    shape = shape_of(shim, _call(kernel), _call(kernel).plan.parts)
                    if shim.why_not(shape) is not None:
                        continue
                    chosen = shim.select_config(shape)
                    if (chosen.dim, chosen.block_m) == (dim, rows):
                        yield kernel


def _call(kernel: Kernel, **options: Any) -> Call:
    case = kernel.case()
    if isinstance(case, QuantCase):
        args = case.arguments()
        return Call(args.q, args.k, args.v, args.plan, args.scale, kernel.arch, **options)
    plan = case.plan()
    q, k, v, *_ = case.inputs(plan)
    return Call(q, k, v, plan, case.scale, kernel.arch, **options)


def check_kernel(shim: ModuleType, kernel: Kernel, **options: Any) -> Simulator:
    """Runs a kernel's case on its PTX; an error where a number is outside of its bound."""
    simulator = Simulator(arch=kernel.arch, options=options)
    found = attend(shim, _call(kernel, run=simulator))
    case = kernel.case()
    if not isinstance(case, QuantCase):
        plan = case.plan()
        plain, exact = expected(plan, case.inputs(plan), case.scale)
        for name, value in zip(("out", "lse"), found, strict=True):
            assert_within(value, plain[name], exact[name], f"{kernel} {name}")
        return simulator
    args = case.arguments()
    if kernel.pv != "none":
        check(found, args, str(kernel))
        return simulator
    # P is rounded to 16 bits, and the sum of a row adds what it was rounded to.
    out, lse = found
    want, want_lse = in_float64(args)
    eps, seen = torch.finfo(args.v.dtype).eps, torch.isfinite(want_lse)
    assert torch.equal(seen, torch.isfinite(lse))
    assert float((out.double() - want).abs().max()) <= 2 * eps * float(args.v.float().abs().max())
    assert float(torch.where(seen, lse.double() - want_lse, 0.0).abs().max()) <= eps
    return simulator


def main() -> int:
    """Prints what failed; its count is the status."""
    import build

    torch.set_num_threads(1)
    shim, faults = build.module(), 0
    for kernel in kernels(shim):
        if not re.search(sys.argv[1] if len(sys.argv) > 1 else "", str(kernel)):
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
