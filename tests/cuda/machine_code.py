"""What kernels compiled to: registers, stack, spills and instructions, read off their machine code.

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
# As csrc/common numbers them.
DTYPES = ("float32", "bfloat16", "float16")
FORMATS = ("none", "int8", "int4", "fp8")
INSTRUCTION = re.compile(
    r"\s*/\*(?P<at>[0-9a-f]+)\*/\s+(?P<guard>@!?U?P\w+\s+)?"
    r"(?P<opcode>[A-Z][A-Z0-9_]*)(?P<kind>(?:\.[A-Za-z0-9_]+)*)(?P<rest>[^;]*)"
)

Row = dict[str, Any]


def tools() -> Path | None:
    """The folder of cuobjdump and nvdisasm; None where Triton is not installed."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "backends/nvidia/bin"
    return folder if (folder / "nvdisasm").exists() else None


def cubins_of_library(folder: Path, library: Path, target: Path) -> list[Path]:
    """Every cubin of a library, as files NAME.sm_ARCH.cubin in `target`."""
    subprocess.run(
        [folder / "cuobjdump", "--extract-elf", "all", library.resolve()],
        cwd=target,
        check=True,
        capture_output=True,
    )
    return sorted(target.glob("*.cubin"))


def arch_of(cubin: Path) -> str:
    """Of a file NAME.sm_ARCH.cubin: "80", "90a", ..."""
    return cubin.suffixes[-2].removeprefix(".sm_")


def resources_of_cubin(folder: Path, cubin: Path) -> dict[str, Row]:
    """Symbol -> arch, kernel, registers, stack, static shared memory: what needs no disassembly."""
    usage = _run([folder / "cuobjdump", "--dump-resource-usage", cubin])
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    names = _run(["c++filt", *(symbol for symbol, *_ in found)]).splitlines() if found else []
    return {
        symbol: {
            "arch": arch_of(cubin),
            "kernel": short_name(name),
            "registers": int(registers),
            "stack": int(stack),
            "static_shared": int(shared),
        }
        for name, (symbol, registers, stack, shared) in zip(names, found, strict=True)
    }


def listings_of_cubin(folder: Path, cubin: Path) -> dict[str, list[str]]:
    """Symbol -> lines of its disassembly, labels among them."""
    listings: dict[str, list[str]] = {}
    current: list[str] = []
    for line in _run([folder / "nvdisasm", "-c", "-ndf", cubin]).splitlines():
        section = re.match(r"\s*\.section\s+\.text\.([^,\s]+)", line)
        if section:
            current = listings.setdefault(section[1], [])
        current.append(line)
    return listings


def instructions_of_listing(lines: Iterable[str]) -> Row:
    """Counts: spills, matrix instructions by their whole name, copies by opcode."""
    opcodes: collections.Counter[str] = collections.Counter()
    matrix: collections.Counter[str] = collections.Counter()
    for line in lines:
        found = INSTRUCTION.match(line)
        if found:
            opcodes[found["opcode"]] += 1
            if "MMA" in found["opcode"]:
                matrix[found["opcode"] + found["kind"]] += 1
    return {
        "spills": opcodes["LDL"] + opcodes["STL"],
        "matrix": dict(sorted(matrix.items())),
        "copies": {op: opcodes[op] for op in COPY_OPCODES if opcodes[op]},
    }


def short_name(demangled: str) -> str:
    """A kernel's name and template arguments in the words of the sources, and nothing else.

    "sm80::attention_kernel<bfloat16, int8, none, 128, 64>": those of traits are the kernel's.
    """
    name = re.sub(r"^void ", "", demangled)
    name = name.replace("(anonymous namespace)::", "").replace("permattn::", "")
    name = re.sub(r"\(Dtype\)(\d)", lambda m: DTYPES[int(m[1])], name)
    name = re.sub(r"\(Format\)(\d)", lambda m: FORMATS[int(m[1])], name)
    name = name[: name.find("(")]
    return re.sub(r"<\w+::\w*Traits<(.*)> >$", r"<\1>", name)


def _run(command: Iterable[object]) -> str:
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True, check=True)
    return done.stdout
