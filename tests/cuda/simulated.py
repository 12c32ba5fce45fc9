"""Kernels for sm_90a: what nvcc makes of them, run by the simulator of tests/ptxsim."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import ptxsim
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
FAMILY = ROOT / "csrc" / "cuda" / "sm90"
MADE = ROOT / "build" / "ptx"
# Where an operator makes tensors of its own, whose places nobody tells.
ANYWHERE = ptxsim.Region("memory of this process", 4096, (1 << 47) - 8192)


def nvcc() -> str | None:
    usual = "/usr/local/cuda/bin/nvcc"
    return shutil.which("nvcc") or (usual if os.path.exists(usual) else None)


def why_not() -> str | None:
    """What is missing to compile kernels; None where nothing is."""
    return None if nvcc() else "nvcc is not installed"


@functools.cache
def sources() -> dict[str, Path]:
    """Files of instantiations by the name that a launch records."""
    found = {}
    for path in sorted((FAMILY / "instantiations").glob("*.cu")):
        made = re.search(r"INSTANTIATE\((.*?)\)", path.read_text(encoding="utf-8"))
        assert made is not None, path
        found["_".join(re.split(r",\s*", made[1]))] = path
    return found


@functools.cache
def _state_of_headers() -> bytes:
    folders = [ROOT / "csrc" / "common", ROOT / "csrc" / "cuda"]
    files = sorted(p for f in folders for p in f.rglob("*") if p.suffix in (".h", ".cuh"))
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).digest()


@functools.cache
def ptx_of(kernel: str) -> str:
    """PTX of a kernel, kept from run to run while its sources stay as they are."""
    source = sources()[kernel]
    state = hashlib.sha256(_state_of_headers() + source.read_bytes()).hexdigest()[:16]
    made = MADE / f"{source.stem}-{state}.ptx"
    if not made.exists():
        MADE.mkdir(parents=True, exist_ok=True)
        part = made.with_suffix(f".{os.getpid()}")
        options = ["-std=c++20", "-O3", "-arch=sm_90a", "-lineinfo", "-ptx"]
        command = [nvcc(), *options, "-o", part, source]
        subprocess.run([str(x) for x in command], check=True)
        part.rename(made)
    return made.read_text(encoding="utf-8")


@dataclass
class Simulator:
    """Runs launches as `launches.run_here` does, and remembers which.

    Args:
        processors: of the device that launches are made for: blocks at most.
        options: of `ptxsim.launch`.
        ran: lines of PTX.
    """

    processors: int = 2
    options: dict = field(default_factory=dict)
    kernels: list[str] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    ran: set[str] = field(default_factory=set)

    def __call__(self, shim, args, config, tensors: list[Tensor]) -> None:
        places = {x.untyped_storage().data_ptr(): x for x in tensors if x.numel()}
        with self.taking_launches(shim, list(places.values())):
            shim.attend(args, config)

    @contextlib.contextmanager
    def taking_launches(self, shim, memory: list) -> Iterator[None]:
        """Launches inside are run at once; kernels may touch `memory`."""

        def run(kernel: str, blocks: int, threads: int, shared_bytes: int, parameters) -> None:
            self.kernels.append(kernel)
            self.blocks.append(blocks)
            ptx = ptx_of(kernel)
            facts = (ptx, None, blocks, threads, shared_bytes, parameters, memory)
            report = ptxsim.launch(*facts, **self.options)
            lines = ptx.splitlines()
            self.ran |= {lines[n - 1] for n in report.lines}

        shim.set_processors(self.processors)
        shim.run_launches_with(run)
        try:
            yield
        finally:
            shim.run_launches_with(None)

    def executed(self, opcode: str) -> bool:
        """Whether an instruction that begins so ran in any launch."""
        return any(opcode in line for line in self.ran)
