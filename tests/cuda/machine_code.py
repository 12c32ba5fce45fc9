"""What a kernel compiled to: registers, stack, spills and instructions, read off its machine code.

The tools that take it apart come with Triton.
"""

from __future__ import annotations

import collections
import importlib.util
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# What a thread may have.
REGISTER_LIMIT = 255
# Copies into shared memory, by opcode: gathering ones and bulk ones.
COPY_OPCODES = ("LDGSTS", "UTMALDG", "UBLKCP")
# The instruction of a warp that multiplies numbers of a format.
MMA_OPCODE = {"16": "HMMA", "int8": "IMMA", "int4": "IMMA", "fp8": "QMMA"}

Row = dict[str, Any]


def tools() -> Path | None:
    """The folder of cuobjdump and nvdisasm; None where Triton is not installed."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "backends/nvidia/bin"
    return folder if (folder / "nvdisasm").exists() else None


def rows_of_cubin(folder: Path, cubin: Path) -> list[Row]:
    """One row per kernel of a cubin."""
    usage = _run([folder / "cuobjdump", "--dump-resource-usage", cubin])
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)"
    resources = {m[0]: tuple(map(int, m[1:])) for m in re.findall(pattern, usage)}
    opcodes: dict[str, collections.Counter[str]] = {}
    current: collections.Counter[str] = collections.Counter()
    for line in _run([folder / "nvdisasm", "-c", cubin]).splitlines():
        section = re.match(r"\s*\.section\s+\.text\.([^,\s]+)", line)
        if section:
            current = opcodes.setdefault(section[1], collections.Counter())
        found = re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", line)
        if found:
            current[found[1]] += 1
    names = _run(["c++filt", *resources]).splitlines() if resources else []
    return [
        {
            "kernel": short_name(name),
            "registers": registers,
            "stack": stack,
            "spills": opcodes[symbol]["LDL"] + opcodes[symbol]["STL"],
            "static_shared": shared,
            "matrix": {op: n for op, n in sorted(opcodes[symbol].items()) if "MMA" in op},
            "copies": {op: opcodes[symbol][op] for op in COPY_OPCODES if opcodes[symbol][op]},
        }
        for name, (symbol, (registers, stack, shared)) in zip(names, resources.items(), strict=True)
    ]


def short_name(demangled: str) -> str:
    """A kernel's name and template arguments, without result, parameters and namespaces."""
    name = re.sub(r"^void ", "", demangled)
    depth, end = 0, len(name)
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            end = i
            break
    return name[:end].replace("permattn::", "")


def _run(command: Iterable[object]) -> str:
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True, check=True)
    return done.stdout
