"""Tile choice: one pure function from the facts of a problem to the shape of a kernel.

Patterns never see these numbers: a block of a pattern is packed into tiles of any size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kernel = Literal["fwd", "dq", "dkdv"]


@dataclass(frozen=True)
class Config:
    """The shape of one kernel.

    Args:
        block_m: rows that stay (queries; keys in dkdv).
        block_n: columns that stream past (keys; queries in dkdv).
        num_warps, num_stages: Triton's launch options.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# (kernel, bytes per element, padded head dim) -> config for wide pattern blocks. Chosen so that no
# architecture spills and the smallest shared memory (99 KB of sm_86, 89 and 120) holds them.
_TABLE: dict[tuple[Kernel, int, int], Config] = {
    ("fwd", 2, 64): Config(128, 64, 4, 3),
    ("fwd", 2, 128): Config(128, 64, 8, 2),
    ("fwd", 2, 256): Config(64, 32, 4, 2),
    ("fwd", 4, 64): Config(32, 32, 4, 1),
    ("fwd", 4, 128): Config(32, 32, 4, 1),
    ("fwd", 4, 256): Config(16, 16, 4, 1),
    ("dq", 2, 64): Config(64, 64, 4, 2),
    ("dq", 2, 128): Config(64, 32, 4, 2),
    ("dq", 2, 256): Config(32, 32, 8, 1),
    ("dq", 4, 64): Config(32, 32, 4, 1),
    ("dq", 4, 128): Config(16, 16, 4, 1),
    ("dq", 4, 256): Config(16, 16, 4, 1),
    ("dkdv", 2, 64): Config(64, 64, 4, 2),
    ("dkdv", 2, 128): Config(64, 32, 8, 2),
    ("dkdv", 2, 256): Config(32, 32, 8, 1),
    ("dkdv", 4, 64): Config(32, 32, 4, 1),
    ("dkdv", 4, 128): Config(16, 16, 4, 1),
    ("dkdv", 4, 256): Config(16, 16, 4, 1),
}
MAX_HEAD_DIM = 256
MIN_TILE = 16


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def padded_head_dim(head_dim: int) -> int:
    """The tile width of a head dim: a power of two that a matrix instruction can take."""
    return max(MIN_TILE, next_power_of_2(head_dim))


def select_config(
    kernel: Kernel, *, element_size: int, head_dim: int, head_dim_v: int, unit: int
) -> Config:
    """Tiles, warps and stages of a kernel.

    Args:
        kernel: "fwd", "dq" or "dkdv".
        element_size: bytes per element of q, k and v: 2 or 4.
        head_dim, head_dim_v: D and Dv, 1..256.
        unit: slots of the staying side that share one list (block_q; block_kv in dkdv): a tile is
            never larger than the power of two that holds it.

    Returns: a Config whose block_m is a power of two >= 16, the least a matrix instruction takes.
    """
    if element_size not in (2, 4) or not 1 <= max(head_dim, head_dim_v) <= MAX_HEAD_DIM:
        raise ValueError(
            f"select_config: wants 2 or 4 bytes and head dims up to {MAX_HEAD_DIM}, "
            f"got {element_size} bytes, D = {head_dim}, Dv = {head_dim_v}"
        )
    width = max(64, padded_head_dim(max(head_dim, head_dim_v)))
    wide = _TABLE[kernel, element_size, width]
    block_m = min(wide.block_m, max(MIN_TILE, next_power_of_2(unit)))
    # With few rows the warps split the columns, which costs more than it gives.
    num_warps = wide.num_warps if block_m == wide.block_m else min(wide.num_warps, 4)
    return Config(block_m, wide.block_n, num_warps, wide.num_stages)
