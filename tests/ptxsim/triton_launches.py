"""Runs what the Triton backend launches: compiled ahead of time, executed as PTX on CPU tensors.

A stand-in driver names the architecture; every launch is compiled on Triton's own launch path, as
on a GPU, and then simulated at once, so that a whole forward or backward runs on its PTX.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ptxsim
import torch
import triton
from permattn.backends.triton import device
from permattn.triton_kernels import launch as launcher
from triton.runtime.jit import JITFunction

# Shared cases, and the stand-in driver.
TRITON_TESTS = Path(__file__).resolve().parents[1] / "triton"
sys.path[:0] = [str(TRITON_TESTS / "aot"), str(TRITON_TESTS), str(TRITON_TESTS / "interp_cases")]
# Errors name lines of the kernels.
os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "0")


@dataclass
class Executed:
    """One simulated launch."""

    name: str
    ptx: str
    grid: tuple[int, ...]
    warps: int
    shared: int
    report: ptxsim.Report
    seconds: float


@dataclass
class Simulator:
    """Settings of the launches, and what was launched.

    Args:
        edit: changes the PTX of a kernel (name, text) before it runs.
        options: see `ptxsim.Options`.
    """

    arch: int
    edit: Callable[[str, str], str] = lambda name, ptx: ptx
    options: dict[str, Any] = field(default_factory=dict)
    executed: list[Executed] = field(default_factory=list)

    def run(self, kernel: Any, fn: JITFunction, grid: Any, arguments: dict[str, Any]) -> None:
        grid = tuple(grid(arguments) if callable(grid) else grid)
        types = kernel.src.signature
        params, memory = [], []
        for name, value in arguments.items():
            for leaf in _leaves(types[name], value):
                params.append(leaf)
                if isinstance(leaf, torch.Tensor):
                    memory.append(ptxsim.Region.of(leaf, name))
        ptx = self.edit(fn.__name__, kernel.asm["ptx"])
        facts = (grid, 32 * kernel.metadata.num_warps, kernel.metadata.shared)
        start = time.perf_counter()
        report = ptxsim.launch(ptx, kernel.metadata.name, *facts, params, memory, **self.options)
        seconds = time.perf_counter() - start
        warps = kernel.metadata.num_warps
        self.executed.append(
            Executed(fn.__name__, ptx, grid, warps, kernel.metadata.shared, report, seconds)
        )


def _leaves(kind: Any, value: Any) -> Iterator[Any]:
    """What of an argument is passed: constants are not, tuples are passed one by one."""
    if isinstance(kind, tuple):
        for one, part in zip(kind, value, strict=True):
            yield from _leaves(one, part)
    elif kind != "constexpr":
        yield value


@contextlib.contextmanager
def simulated(arch: int, **settings: Any) -> Iterator[Simulator]:
    """Inside, launches of Triton kernels run on the simulator."""
    from compile_launches import StandInDriver

    simulator = Simulator(arch, **settings)
    triton.runtime.driver.set_active(StandInDriver(arch))
    capability, original = launcher.capability_of, JITFunction.run

    def run(self, *args, grid, warmup, **options):
        kernel = original(self, *args, grid=grid, warmup=True, **options)
        given = {**dict(zip(self.arg_names, args, strict=False)), **options}
        simulator.run(kernel, self, grid, {n: given[n] for n in self.arg_names})
        return kernel

    # The backend takes tensors on the CPU where kernels run on them.
    interpreted, device.INTERPRETED = device.INTERPRETED, True
    launcher.capability_of = lambda device: arch
    JITFunction.run = run
    try:
        yield simulator
    finally:
        launcher.capability_of, JITFunction.run = capability, original
        device.INTERPRETED = interpreted
