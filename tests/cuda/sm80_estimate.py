"""docs/numerics.md's table of what bounds the kernels for mma.sync: csrc/cuda/sm80/estimate.h."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from marked_pages import replaced, table

PAGE, MARK = Path("docs/numerics.md"), "sm80 estimate"
# (Q K^T, P V, head dim, rows of a tile): the kernels for blocks of 128 queries where there are any.
KERNELS = (
    *(("none", "none", dim, 128) for dim in (64, 96, 128)),
    ("none", "none", 256, 64),
    *(("int8", "none", dim, 128) for dim in (64, 96, 128)),
    *(("int8", pv, dim, 64) for pv in ("int8", "int4", "fp8") for dim in (64, 128)),
    *(("int4", "int4", dim, 64) for dim in (64, 128)),
)
DEVICES = (80, 86, 89, 120)
UNITS = ("products", "shared", "exponentials", "floats")


def multiplies(capability: int, qk: str, pv: str) -> bool:
    """Whether a device has products of both formats."""
    if "int4" in (qk, pv) and capability >= 90:
        return False
    return pv != "fp8" or capability in (89, 120)


def block(shim: ModuleType) -> str:
    """The table, as docs has it."""
    head = ["Q K^T", "P V", "head dim", "tile", "device", *UNITS, "share", "bound by"]
    rows = []
    for qk, pv, dim, queries in KERNELS:
        last: list[object] = []
        for device in DEVICES:
            if not multiplies(device, qk, pv):
                continue
            formats = getattr(shim.Format, qk), getattr(shim.Format, pv)
            found = shim.sm80_tile_cycles(device, *formats, dim, queries)
            by = next(unit for unit in UNITS if found[unit] == found["bound"])
            share = f"{100 * found['products'] / found['bound']:.0f} %"
            numbers = [*(found[unit] for unit in UNITS), share, by]
            name = f"{device // 10}.{device % 10}"
            if rows and numbers == last:
                rows[-1][4] += f", {name}"
                continue
            words = ["16 bit" if x == "none" else x for x in (qk, pv)]
            rows.append([*words, dim, f"{queries} x {found['keys']}", name, *numbers])
            last = numbers
    return table(head, rows)


def write(root: Path, shim: ModuleType) -> None:
    page = root / PAGE
    text = replaced(page.read_text(encoding="utf-8"), MARK, block(shim))
    page.write_text(text, encoding="utf-8")
