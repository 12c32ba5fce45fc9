"""docs/numerics.md's table of what bounds the kernels for sm_90a: csrc/cuda/sm90/estimate.h."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import main_loop
from machine_code import Row
from marked_pages import replaced, table

PAGE, MARK = Path("docs/numerics.md"), "sm90 estimate"
# (Q K^T, P V) and head dims that there are kernels for.
KERNELS = tuple(
    (qk, pv, dim)
    for qk, pv in (("none", "none"), ("int8", "none"), ("int8", "int8"), ("int8", "fp8"))
    for dim in (64, 96, 128, 256)
    if dim <= 128 or qk == "none"
)
# Blocks of the pattern, and tiles that a step copies: blocks of 64 queries come in pairs, whose
# lists may be alike or have nothing in common.
PATTERNS = (("128", 128, 1), ("64, lists alike", 64, 1), ("64, lists apart", 64, 2))
UNITS = ("products", "shared", "instructions", "l2", "alone")


def keys_of_tile(shim: ModuleType, qk: str, pv: str, dim: int, block: int) -> int:
    """As the tile choice says for a pattern of square blocks."""
    formats = {"qk": getattr(shim.Format, qk), "pv": getattr(shim.Format, pv)}
    facts = {"unit": block, "block_kv": block, "q_rows": 64, "kv_rows": 64}
    shape = shim.Shape(
        capability=90, dtype=shim.Dtype.bfloat16, head_dim=dim, head_dim_v=dim, **formats, **facts
    )
    return shim.select_config(shape).block_n


def loop_of(rows: Iterable[Row], qk: str, pv: str, dim: int, keys: int) -> list[list[int]]:
    """What the main loop of a kernel for bfloat16 compiled to."""
    dtype = "bfloat16" if pv == "none" else "float32"
    name = f"sm90::attention_kernel<{dtype}, {qk}, {pv}, {dim}, {keys}>"
    (loop,) = (row["loop"] for row in rows if row["kernel"] == name)
    return loop


def step(
    shim: ModuleType, rows: Iterable[Row], qk: str, pv: str, dim: int, block: int, tiles: int
) -> dict[str, Any]:
    """Cycles of a step by unit, and what follows from them.

    Returns:
        The units' cycles and their `bound`; `keys` of a tile; `by`, the unit that bounds the step;
        `beside`, the share of the loop's special functions that run while P V may be under way.
    """
    keys = keys_of_tile(shim, qk, pv, dim, block)
    formats = getattr(shim.Format, qk), getattr(shim.Format, pv)
    loop = loop_of(rows, qk, pv, dim, keys)
    cycles = shim.sm90_step_cycles(*formats, dim, keys, tiles, loop)
    by = next(unit for unit in UNITS if cycles[unit] == cycles["bound"])
    special = [span[main_loop.PIPES.index("special")] for span in loop]
    return {**cycles, "keys": keys, "by": by, "beside": special[1] / sum(special)}


def block(shim: ModuleType, rows: list[Row]) -> str:
    """The table, as docs has it."""
    head = ["Q K^T", "P V", "head dim", "blocks", "keys", *UNITS, "share", "bound by", "beside"]
    lines: list[list[object]] = []
    for qk, pv, dim in KERNELS:
        same = keys_of_tile(shim, qk, pv, dim, 128) == keys_of_tile(shim, qk, pv, dim, 64)
        for name, block_size, tiles in PATTERNS[1:] if same else PATTERNS:
            if same and tiles == 1:
                name = "128; 64, lists alike"
            found = step(shim, rows, qk, pv, dim, block_size, tiles)
            share = f"{100 * found['products'] / found['bound']:.0f} %"
            last = [share, found["by"], f"{100 * found['beside']:.0f} %"]
            words = ["16 bit" if x == "none" else x for x in (qk, pv)]
            cells = [*words, dim, name, found["keys"], *(found[u] for u in UNITS)]
            lines.append([*cells, *last])
    return table(head, lines)


def write(root: Path, shim: ModuleType, rows: list[Row]) -> None:
    page = root / PAGE
    text = replaced(page.read_text(encoding="utf-8"), MARK, block(shim, rows))
    page.write_text(text, encoding="utf-8")
