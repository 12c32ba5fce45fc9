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
import itertools
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
from launch_cases import CASES, EVERY, AnyCase, Case, MassCase, ProbeCase, QuantCase, RegionCase
from permattn.core.quant import QuantSpec
from permattn.triton_kernels import launch
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


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


def launched(case: AnyCase, arch: int) -> list[tuple[str, list[int], Any]]:
    """(name, tile, compiled kernel) of every launch of a case that compiles to something new."""
    triton.runtime.driver.set_active(StandInDriver(arch))
    launch.capability_of = lambda device: arch
    compiled: list[tuple[str, list[int], Any]] = []
    original = JITFunction.run

    def run(self, *args, grid, warmup, **options):
        kernel = original(self, *args, grid=grid, warmup=True, **options)
        if not any(kernel is known for *_, known in compiled):
            tile = [options.get(name, 0) for name in ("BLOCK_M", "BLOCK_N")]
            compiled.append((self.fn.__name__, tile, kernel))
        return kernel

    JITFunction.run = run
    try:
        case.launch()
    finally:
        JITFunction.run = original
    return compiled


def compile_case(case: AnyCase, arch: int) -> list[dict[str, Any]]:
    """One row per kernel of the case: tile, registers, stack, shared memory, matrix opcodes."""
    return [
        {
            "case": case.name,
            "arch": arch,
            "kernel": name,
            "number": number,
            "tile": tile,
            **read_machine_code(kernel),
        }
        for number, (name, tile, kernel) in enumerate(launched(case, arch))
    ]


def kernels_of_lengths(lengths: list[int]) -> dict[str, int]:
    """How many different kernels one case compiles to over all lengths, by name."""
    kernels = collections.defaultdict(set)
    ways = ("fwd", "bwd", "probe", "quant", "mass", "region-fwd", "region-bwd", "region-route")
    for length, way in itertools.product(lengths, ways):
        case: AnyCase
        if way == "probe":
            case = ProbeCase("order", 64, torch.bfloat16, 64, (90,), length)
        elif way == "quant":
            spec = QuantSpec("int8", "int8", smooth_k=True)
            case = QuantCase("dense", spec, "pairs", torch.bfloat16, 64, (90,), length)
        elif way.startswith("region-"):
            # A map has as many tokens as the square.
            side = 1 + length % 32
            facts = ((2, 2), "plain", torch.bfloat16, 32, (90,), side)
            case = RegionCase(way.removeprefix("region-"), *facts)
        elif way == "mass":
            case = MassCase(64, torch.bfloat16, 64, (90,), length)
        else:
            case = Case(way, "dense", torch.bfloat16, 64, 64, (90,), length)
        for name, _, kernel in launched(case, 90):
            kernels[name].add(id(kernel))
    return {name: len(found) for name, found in kernels.items()}


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
    parser.add_argument("--arch", type=int, nargs="+", default=EVERY)
    parser.add_argument("--case", default="", help="regular expression on case names")
    parser.add_argument("--share", default="0/1", help="i/n: every n-th job, from the i-th")
    parser.add_argument("--lengths", type=int, nargs="+", help="count kernels over lengths instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.lengths:
        print(json.dumps(kernels_of_lengths(args.lengths)))
        return
    named = [c for c in CASES if re.search(args.case, c.name)]
    jobs = [(c, a) for c in named for a in c.archs if a in args.arch]
    first, step = map(int, args.share.split("/"))
    for case, arch in jobs[first::step]:
        for row in compile_case(case, arch):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    sys.exit(main())
