"""The device, the native library and the tools that a run of the GPU suite finds."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import subprocess
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu_record import ROOT

# Where toolkits put programs that PATH may not name.
_TOOLKITS = (
    "/usr/local/cuda/bin",
    "/usr/local/cuda/compute-sanitizer",
    "/opt/nvidia/nsight-compute",
)
CLOCKS = "clocks.sm,clocks.mem,temperature.gpu,power.draw"
LIBRARY, REPORT = "_native.so", "_native_build.json"


@dataclass(frozen=True)
class Found:
    """A native library in a folder of its own, or why there is none."""

    folder: Path | None
    sha256: str = ""
    why_not: str = ""

    @property
    def sources(self) -> str:
        """Whether it was built from the csrc of this tree: "same", "other" or "unknown"."""
        report = None if self.folder is None else self.folder / REPORT
        if report is None or not report.exists():
            return "unknown"
        built = json.loads(report.read_text(encoding="utf-8")).get("sources")
        return "unknown" if built is None else "same" if built == sources_sha256() else "other"


def sources_sha256(root: Path = ROOT) -> str:
    """Of every source of the library, as setup.py writes it into the report of a build."""
    csrc, made = root / "csrc", hashlib.sha256()
    for path in sorted(p for p in csrc.rglob("*") if p.is_file()):
        made.update(path.relative_to(csrc).as_posix().encode() + b"\0" + path.read_bytes())
    return made.hexdigest()


def find_library(
    library: Path | None, wheel: Path | None, scratch: Path, *, dist: bool = True
) -> Found:
    """What --library or --wheel names; else the newest wheel of dist/, else the tree's own.

    Args:
        scratch: an empty folder for it.
        dist: whether wheels of dist/ count.

    Raises:
        FileNotFoundError: what is named is not there, or a wheel holds no library.
    """
    if library is not None:
        return _alone(library, scratch)
    wheels = sorted((ROOT / "dist").glob("*.whl"), key=lambda p: p.stat().st_mtime)
    if wheel is not None or (dist and wheels):
        return _from_wheel(wheel or wheels[-1], scratch)
    built = ROOT / "python" / "permattn" / LIBRARY
    if built.exists():
        return _alone(built, scratch)
    return Found(None, why_not="no native library is at hand: neither dist/*.whl nor " + LIBRARY)


def _alone(library: Path, folder: Path) -> Found:
    if not library.exists():
        raise FileNotFoundError(f"--library: no such file: {library}")
    (folder / LIBRARY).symlink_to(library.resolve())
    report = library.parent / REPORT
    if report.exists():
        shutil.copy(report, folder / REPORT)
    return Found(folder, sha256_of(library))


def _from_wheel(wheel: Path, folder: Path) -> Found:
    if not wheel.exists():
        raise FileNotFoundError(f"--wheel: no such file: {wheel}")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        if f"permattn/{LIBRARY}" not in names:
            raise FileNotFoundError(f"--wheel: {wheel.name} holds no permattn/{LIBRARY}")
        for name in (LIBRARY, REPORT):
            if f"permattn/{name}" in names:
                (folder / name).write_bytes(archive.read(f"permattn/{name}"))
    return Found(folder, sha256_of(folder / LIBRARY))


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def use_library(folder: Path | None) -> None:
    """Makes this process load the library of that folder, and no other."""
    from permattn.core import native

    if folder is not None:
        native.PACKAGE = folder


def describe(rehearsal: bool) -> dict[str, Any]:
    """Facts of the record about the device and the versions."""
    import torch

    facts = {
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "cuda_runtime": torch.version.cuda or "none",
    }
    if rehearsal:
        return {**facts, "device": "rehearsal", "cc": [0, 0], "driver": "none"}
    device = torch.cuda.get_device_properties(0)
    cc = [device.major, device.minor]
    return {**facts, "device": device.name, "cc": cc, "driver": smi("driver_version")}


def _version(name: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"


def smi(query: str) -> str:
    """One line of nvidia-smi, or why there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "nvidia-smi not found"
    command = [program, f"--query-gpu={query}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return "nvidia-smi did not answer"
    return done.stdout.strip() or done.stderr.strip()


def tool(name: str) -> str | None:
    """A program of PATH or of a toolkit."""
    found = shutil.which(name)
    if found is not None:
        return found
    for folder in map(Path, _TOOLKITS):
        if (folder / name).is_file():
            return str(folder / name)
        versions = sorted(folder.glob(f"*/{name}"), key=lambda p: _numbers(p.parent.name))
        if versions:
            return str(versions[-1])
    return None


def _numbers(name: str) -> list[int]:
    return [int(x) for x in re.findall(r"\d+", name)]
