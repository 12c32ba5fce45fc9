"""Kernels in groups that share their sources: what a run on hardware vouches for, and until when.

A group's hash is that of its files. A record holds the hashes of its run; where one differs from
that of the tree, the kernel has changed since.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Folders whose every file belongs to a group.
COVERED = ("csrc/cuda", "triton_kernels")
SOURCES = frozenset({".py", ".h", ".cpp", ".inl", ".cu", ".cuh"})

_INCLUDE = re.compile(r'^\s*#\s*include "([^"]+)"', re.MULTILINE)
_IMPORT = re.compile(r"permattn\.triton_kernels(?:\.(\w+)|\s+import\s+(\w+))")


@dataclass(frozen=True)
class Group:
    """Kernels of common sources.

    Args:
        globs: below the root of the tree; what these files include or import counts, too.
        proofs: sections of the GPU suite, by their key; all of them have to pass.
    """

    name: str
    globs: tuple[str, ...]
    proofs: tuple[str, ...]

    @property
    def is_native(self) -> bool:
        """Whether the native library holds them: compiled before, maybe from other sources."""
        return any(glob.startswith("csrc/") for glob in self.globs)

    def files(self, root: Path = ROOT) -> list[Path]:
        """Those of the globs, and everything that they reach."""
        open_ = [p for glob in self.globs for p in root.glob(glob) if p.suffix in SOURCES]
        found: set[Path] = set()
        while open_:
            path = open_.pop()
            if path not in found:
                found.add(path)
                open_ += needed_by(path, root)
        return sorted(found)

    def sha256(self, root: Path = ROOT) -> str:
        """Of names and contents; the first 16 digits."""
        made = hashlib.sha256()
        for path in self.files(root):
            made.update(path.relative_to(root).as_posix().encode() + b"\0")
            made.update(hashlib.sha256(path.read_bytes()).digest())
        return made.hexdigest()[:16]


def needed_by(path: Path, root: Path) -> list[Path]:
    """Files of the tree that a source includes, or the kernel modules that it imports."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        names = {a or b for a, b in _IMPORT.findall(text)} - {""}
        found = [root / "triton_kernels" / f"{name}.py" for name in names]
    else:
        places = (path.parent, root / "csrc")
        found = [folder / name for name in _INCLUDE.findall(text) for folder in places]
    return [Path(os.path.normpath(p)) for p in found if p.is_file()]


GROUPS = (
    Group(
        "CUDA C++ attention, wgmma (sm90)",
        (
            "csrc/cuda/sm90/**/*",
            "csrc/cuda/*",
            "csrc/cuda/device/*",
            "csrc/binding/cuda_attend.cpp",
        ),
        ("cuda attention sm90", "cuda poison sm90", "cuda quantised sm90"),
    ),
    Group(
        "CUDA C++ attention, mma.sync (sm80)",
        ("csrc/cuda/sm80/**/*", "csrc/cuda/*", "csrc/binding/cuda_attend.cpp"),
        ("cuda attention sm80", "cuda poison sm80", "cuda quantised sm80"),
    ),
    Group(
        "CUDA C++ rows made ready",
        ("csrc/cuda/permute/**/*", "csrc/binding/cuda_prepare.cpp"),
        ("cuda rows",),
    ),
    Group("CUDA C++ lists of blocks", ("csrc/cuda/index/[!p]*",), ("cuda lists",)),
    Group("CUDA C++ probe", ("csrc/cuda/index/probe*",), ("cuda probe",)),
    Group(
        "Triton forward",
        ("triton_kernels/fwd.py", "triton_kernels/launch*.py", "triton_kernels/__init__.py"),
        ("triton attention", "triton poison"),
    ),
    Group(
        "Triton backward",
        ("triton_kernels/bwd*.py", "triton_kernels/launch.py"),
        ("triton gradients", "triton test suite"),
    ),
    Group(
        "Triton quantised, rows made ready",
        tuple(f"triton_kernels/{x}.py" for x in ("quantised", "prepare", "launch_forward")),
        ("triton quantised", "triton rows"),
    ),
    Group(
        "Triton probe, block masses",
        ("triton_kernels/probe.py", "triton_kernels/block_mass.py"),
        ("triton probe", "triton test suite"),
    ),
    Group(
        "Triton regions, routing",
        ("triton_kernels/regions_*.py", "triton_kernels/route.py"),
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
