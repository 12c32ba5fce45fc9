"""docs/machine_code.md: the table of machine code for people."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from machine_code import Row

PAGE = Path("docs/machine_code.md")
ARCHS = ("80", "86", "89", "90a", "120a")
DOTTED = {"80": "8.0", "86": "8.6", "89": "8.9", "90a": "9.0a", "120a": "12.0a"}
NAME = re.compile(r"(?P<space>\w+)::(?P<kernel>\w+?)(?:_kernel)?(?:<(?P<arguments>.*)>)?$")
HEAD = """\
# Machine code of the CUDA kernels

Generated from `tests/cuda/machine_code.json` by `python tests/cuda/machine_code_table.py --write
LIBRARY`; do not edit. What nvcc {release} made of every kernel of the wheel: registers of a thread,
bytes of shared memory of a block, matrix instructions. No kernel has a stack, and none spills; the
tests hold the table to that, to the limits of every device, and to the instructions below. Where
the tests build CUDA kernels, these are compared with the table, and a few are compiled afresh for
the other devices. An empty cell: the device has no such product, and the backend refuses it. None
of this is a measurement.
"""


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def arguments_of(row: Row) -> list[str]:
    found = NAME.match(row["kernel"])
    assert found is not None, row["kernel"]
    return [word for word in (found["arguments"] or "").split(", ") if word]


def by_kernel(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """Kernel -> device -> row."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row["kernel"], {})[row["arch"]] = row
    return found


def words(names: Iterable[str]) -> list[str]:
    """Dtypes and formats as the tables print them; a kernel that writes every dtype has none."""
    return ["16 bit" if name == "none" else "any" if name == "float32" else name for name in names]


def sm80_tables(rows: list[Row]) -> str:
    kernels = by_kernel(row for row in rows if row["kernel"].startswith("sm80::"))
    lines = []
    kinds: dict[tuple[str, ...], set[str]] = {}
    for devices in kernels.values():
        first = next(iter(devices.values()))
        dtype, qk, pv, dim, queries = arguments_of(first)
        cells = [devices[a]["registers"] if devices[a]["matrix"] else "" for a in ARCHS]
        numbers = [dim, queries, first["threads"], first["dynamic_shared"]]
        lines.append([*words([qk, pv, dtype]), *numbers, *cells])
        for arch in ARCHS:
            if devices[arch]["matrix"]:
                instructions = ", ".join(f"`{name}`" for name in devices[arch]["matrix"])
                kind = (*words([qk, pv]), dtype if pv == "none" else "any", instructions)
                kinds.setdefault(kind, set()).add(arch)
    head = ["Q K^T", "P V", "dtype", "head dim", "queries", "threads", "shared"]
    used = [
        [qk, pv, dtype, ", ".join(DOTTED[a] for a in ARCHS if a in archs), instructions]
        for (qk, pv, dtype, instructions), archs in kinds.items()
    ]
    return (
        "## Attention by mma.sync (`csrc/cuda/sm80`)\n\n"
        + table(["Q K^T", "P V", "dtype", "devices", "matrix instructions"], used)
        + "\nRegisters by device:\n\n"
        + table([*head, *(DOTTED[a] for a in ARCHS)], lines)
    )


def sm90_table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        if row["kernel"].startswith("sm90::"):
            dtype, qk, pv, dim, keys = arguments_of(row)
            matrix = ", ".join(f"{count} `{name}`" for name, count in row["matrix"].items())
            numbers = [dim, keys, row["registers"], row["dynamic_shared"]]
            lines.append([*words([qk, pv, dtype]), *numbers, matrix])
    head = ["Q K^T", "P V", "dtype", "head dim", "keys", "registers", "shared"]
    return (
        "## Attention by wgmma (`csrc/cuda/sm90`), 9.0a\n\n"
        "Of three warpgroups, 384 threads. Registers are those at the launch; the one that feeds\n"
        "then gives some to the two that multiply (`sm90/shape.h`).\n\n"
        + table([*head, "matrix instructions in the code"], lines)
    )


def others_table(rows: list[Row]) -> str:
    lines = []
    for kernel, devices in by_kernel(rows).items():
        if kernel.startswith(("sm80::", "sm90::")):
            continue
        first = next(iter(devices.values()))
        cells = [devices[a]["registers"] for a in ARCHS]
        lines.append([f"`{kernel}`", first["threads"], first["dynamic_shared"], *cells])
    return (
        "## Rows and lists (`csrc/cuda/permute`, `csrc/cuda/index`)\n\n"
        "Threads and shared memory: the most that a launch asks for.\n\n"
        + table(["kernel", "threads", "shared", *(DOTTED[a] for a in ARCHS)], lines)
    )


def page(release: str, rows: list[Row]) -> str:
    parts = [HEAD.format(release=release), sm80_tables(rows), sm90_table(rows), others_table(rows)]
    return "\n".join(parts)


def write(root: Path, release: str, rows: list[Row]) -> None:
    (root / PAGE).write_text(page(release, rows), encoding="utf-8")
