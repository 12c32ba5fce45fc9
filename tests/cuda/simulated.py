"""CUDA C++ kernels as nvcc compiles them, run by the simulator of tests/ptxsim."""

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
CUDA = ROOT / "csrc" / "cuda"
FAMILY = CUDA / "sm90"
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
    folders = [ROOT / "csrc" / "common", CUDA]
    files = sorted(p for f in folders for p in f.rglob("*") if p.suffix in (".h", ".cuh"))
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).digest()


# Where kernels are that are named by their symbols: headers with templates, and whole sources.
TEMPLATES = {"sm80::": "sm80/kernel.cuh", "permute::": "permute/instantiate.cuh"}
SOURCES = {
    "index::probe_": "index/probe.cu",
    "index::": "index/index.cu",
    "cuda::finish_kernel": "sm80/finish.cu",
    "cuda::join_runs_kernel": "permute/instantiations/join_runs.cu",
}


def source_of(symbol: str) -> Path:
    """A file that makes the kernel of a symbol, and of templates no other one."""
    named = subprocess.run(["c++filt", symbol], check=True, capture_output=True, text=True)
    name = named.stdout.strip()
    inside = name.removeprefix("void ").removeprefix("permattn::")
    for start, source in SOURCES.items():
        if inside.startswith(start):
            return CUDA / source
    header = next(h for start, h in TEMPLATES.items() if inside.startswith(start))
    head, parameter = name.removesuffix(")").rsplit("(", 1)
    text = f'#include "cuda/{header}"\n'
    text += f"template PERMATTN_GLOBAL {head}(const __grid_constant__ {parameter});\n"
    made = MADE / f"kernel_{hashlib.sha256(text.encode()).hexdigest()[:16]}.cu"
    if not made.exists():
        MADE.mkdir(parents=True, exist_ok=True)
        part = made.with_suffix(f".{os.getpid()}")
        part.write_text(text, encoding="utf-8")
        part.rename(made)
    return made


@functools.cache
def ptx_of(kernel: str, arch: int = 80) -> str:
    """PTX of a kernel, kept from run to run while its sources stay as they are.

    Args:
        kernel: as a launch records it: an instantiation for sm_90a, or a symbol.
        arch: what a kernel with a symbol is compiled for.
    """
    has_symbol = kernel.startswith("_Z")
    source = source_of(kernel) if has_symbol else sources()[kernel]
    target = f"sm_{arch}" if has_symbol else "sm_90a"
    state = hashlib.sha256(_state_of_headers() + source.read_bytes() + target.encode())
    made = MADE / f"{source.stem}-{state.hexdigest()[:16]}.ptx"
    if not made.exists():
        MADE.mkdir(parents=True, exist_ok=True)
        part = made.with_suffix(f".{os.getpid()}")
        options = ["-std=c++20", "-O3", f"-arch={target}", "-lineinfo", "-ptx"]
        options.append(f"-I{ROOT / 'csrc'}")
        command = [nvcc(), *options, "-o", part, source]
        subprocess.run([str(x) for x in command], check=True)
        part.rename(made)
    return made.read_text(encoding="utf-8")


@dataclass
class Simulator:
    """Runs launches as `launches.run_here` does, and remembers which.

    Args:
        processors: of the device that launches are made for: blocks at most.
        arch: what kernels are compiled for that are not sm_90a's alone; None: they run as ever.
        options: of `ptxsim.launch`.
        ran: lines of PTX.
    """

    processors: int = 2
    arch: int | None = None
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
            ptx = ptx_of(kernel, self.arch or 90)
            entry = kernel if kernel.startswith("_Z") else None
            facts = (ptx, entry, blocks, threads, shared_bytes, parameters, memory)
            report = ptxsim.launch(*facts, **self.options)
            lines = ptx.splitlines()
            self.ran |= {lines[n - 1] for n in report.lines}

        shim.set_processors(self.processors)
        shim.run_launches_with(run)
        shim.set_recording(self.arch is not None, self.arch is None)
        try:
            yield
        finally:
            shim.set_recording(False, True)
            shim.run_launches_with(None)

    def executed(self, opcode: str) -> bool:
        """Whether an instruction that begins so ran in any launch."""
        return any(opcode in line for line in self.ran)
