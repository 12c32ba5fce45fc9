"""Compiles what the launchers launch, for any architecture, without a GPU; reads the machine code.

A stand-in driver names the architecture, and every launch becomes a compilation by Triton's own
launch
path: same arguments, same specialisation, same options as on a GPU. Run as a program (see `main`),
    in a
process of its own, since the driver and the interpreter are settled once per process.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Line information would put paths into the binary; fusion's default differs between versions.
os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from launch_cases import CASES, Case
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# Bytes of shared memory that one block may use.
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
ARCHITECTURES = tuple(SHARED_LIMIT)


class StandInDriver:
    """Answers what the launch path asks of a CUDA driver."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_case(case: Case, arch: int) -> list[dict[str, Any]]:
    """One row per launch of the case: kernel, registers, stack, shared memory, matrix opcodes."""
    triton.runtime.driver.set_active(StandInDriver(arch))
    compiled = []
    original = JITFunction.run

    def run(self, *args, grid, warmup, **options):
        kernel = original(self, *args, grid=grid, warmup=True, **options)
        compiled.append((self.fn.__name__, kernel))
        return kernel

    JITFunction.run = run
    try:
        case.launch()
    finally:
        JITFunction.run = original
    return [
        {"case": case.name, "arch": arch, "kernel": name, **read_machine_code(kernel)}
        for name, kernel in compiled
        if name in case.kernels
    ]


def read_machine_code(kernel: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(kernel.asm["cubin"])
        f.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", f.name)
        listing = _tool("nvdisasm", "-c", f.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    opcodes = collections.Counter(
        re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", listing, re.M)
    )
    return {
        "warps": kernel.metadata.num_warps,
        "registers": registers,
        "stack": stack,
        "spills": opcodes["LDL"] + opcodes["STL"],
        "shared": kernel.metadata.shared,
        "matrix": {x: n for x, n in sorted(opcodes.items()) if "MMA" in x},
        "async_copies": opcodes["LDGSTS"],
    }


def _tool(name: str, *args: str) -> str:
    done = subprocess.run([TOOLS / name, *args], capture_output=True, text=True, check=True)
    return done.stdout


def main() -> None:
    """Prints one JSON row per line for the wanted architectures and cases."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--case", default="", help="regular expression on case names")
    parser.add_argument("--share", default="0/1", help="i/n: every n-th job, from the i-th")
    args = parser.parse_args()
    torch.set_num_threads(1)
    jobs = [(c, a) for c in CASES for a in args.arch if re.search(args.case, c.name)]
    first, step = map(int, args.share.split("/"))
    for case, arch in jobs[first::step]:
        for row in compile_case(case, arch):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    sys.exit(main())
