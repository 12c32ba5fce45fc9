"""Kernels in groups that share their sources: what a run on hardware vouches for, and until when.

A group's hash is that of its files. A record holds the hashes of its run; where one differs from
that of the tree, the kernel has changed since.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Folders whose every file belongs to a group.
COVERED = ("csrc/cuda", "triton_kernels")
SOURCES = frozenset({".py", ".h", ".cpp", ".inl", ".cu", ".cuh"})

_CUDA = ("csrc/cuda/primitives/*", "csrc/common/host_device.h", "csrc/binding/cuda_common.h")
_CUDA_ATTENTION = (
    *_CUDA,
    *("csrc/cuda/*.h", "csrc/cuda/*.cpp", "csrc/cuda/device/*", "csrc/binding/cuda_attend.cpp"),
    *("csrc/common/params.h", "csrc/common/quant.h", "csrc/common/token_rule.h"),
)
_TRITON = tuple(f"triton_kernels/{x}.py" for x in ("__init__", "config", "launch", "token_rule"))


@dataclass(frozen=True)
class Group:
    """Kernels of common sources.

    Args:
        globs: below the root of the tree.
        proofs: sections of the GPU suite, by their key; all of them have to pass.
    """

    name: str
    globs: tuple[str, ...]
    proofs: tuple[str, ...]

    def files(self, root: Path = ROOT) -> list[Path]:
        found = {p for glob in self.globs for p in root.glob(glob) if p.suffix in SOURCES}
        return sorted(found)

    def sha256(self, root: Path = ROOT) -> str:
        """Of names and contents; the first 16 digits."""
        made = hashlib.sha256()
        for path in self.files(root):
            made.update(path.relative_to(root).as_posix().encode() + b"\0")
            made.update(hashlib.sha256(path.read_bytes()).digest())
        return made.hexdigest()[:16]


GROUPS = (
    Group(
        "CUDA C++ attention, wgmma (sm90)",
        (*_CUDA_ATTENTION, "csrc/cuda/sm90/**/*"),
        ("cuda attention sm90", "cuda quantised sm90"),
    ),
    Group(
        "CUDA C++ attention, mma.sync (sm80)",
        (*_CUDA_ATTENTION, "csrc/cuda/sm80/**/*"),
        ("cuda attention sm80", "cuda quantised sm80"),
    ),
    Group(
        "CUDA C++ rows made ready",
        (
            *_CUDA,
            *("csrc/cuda/permute/**/*", "csrc/binding/cuda_prepare.cpp"),
            *("csrc/common/quant.h", "csrc/common/params.h"),
        ),
        ("cuda rows",),
    ),
    Group(
        "CUDA C++ lists of blocks",
        (
            *_CUDA,
            *("csrc/cuda/index/**/*", "csrc/binding/cuda_index.cpp"),
            *("csrc/cuda/permute/row_reader.cuh", "csrc/cuda/permute/warp.cuh"),
        ),
        ("cuda lists",),
    ),
    Group(
        "Triton forward",
        (*_TRITON, "triton_kernels/fwd.py", "triton_kernels/launch_forward.py"),
        ("triton attention",),
    ),
    Group(
        "Triton backward",
        (*_TRITON, "triton_kernels/bwd*.py"),
        ("triton gradients", "triton test suite"),
    ),
    Group(
        "Triton quantised, rows made ready",
        (
            *(*_TRITON, "triton_kernels/launch_forward.py"),
            *(f"triton_kernels/{x}.py" for x in ("quantised", "prepare", "rounding")),
        ),
        ("triton quantised", "triton rows"),
    ),
    Group(
        "Triton probe, block masses",
        (*_TRITON, "triton_kernels/probe.py", "triton_kernels/block_mass.py"),
        ("triton test suite",),
    ),
    Group(
        "Triton regions, routing",
        (*_TRITON, "triton_kernels/regions_*.py", "triton_kernels/route.py"),
        ("triton regions", "triton test suite"),
    ),
)


def hashes(root: Path = ROOT) -> dict[str, str]:
    """Group -> hash of its sources now."""
    return {group.name: group.sha256(root) for group in GROUPS}


def uncovered(root: Path = ROOT) -> list[str]:
    """Sources of the covered folders that no group names."""
    known = {path for group in GROUPS for path in group.files(root)}
    every = {
        path
        for folder in COVERED
        for path in (root / folder).rglob("*")
        if path.is_file() and path.suffix in SOURCES
    }
    return sorted(path.relative_to(root).as_posix() for path in every - known)
