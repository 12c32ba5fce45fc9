"""What a result was measured on: enough to repeat it, nothing that names a person's machine."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path

import permattn
import torch

ROOT = Path(__file__).resolve().parents[1]


def describe(threads: int) -> dict[str, object]:
    """Device, CPU, instruction set, threads and versions."""
    return {
        "device": "cpu",
        "cpu": cpu_model(),
        "isa": isa(),
        "cores": os.cpu_count(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "permattn": permattn.__version__,
    }


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        facts = {}
        for line in info.read_text().split("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            facts[key.strip()] = value.strip()
        if "model name" in facts:
            return f"{facts['model name']} (family {facts['cpu family']}, model {facts['model']})"
    return platform.processor() or platform.machine()


def isa() -> str:
    """The instruction set that the native kernels use; torch's own where there are none."""
    from permattn.backends import cpu

    chosen = getattr(cpu, "isa", None)
    try:
        return str(chosen()) if chosen is not None else torch.backends.cpu.get_cpu_capability()
    except (RuntimeError, OSError):
        return torch.backends.cpu.get_cpu_capability()


def threads_text(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


def commit() -> tuple[str, bool]:
    """(commit, whether the tree differs from it); ("unknown", True) outside a checkout."""
    if not (ROOT / ".git").exists():
        return "unknown", True
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        # Results and the documents made from them change by measuring; they are not the code.
        return head, bool(_git("status", "--porcelain", "--", ".", ":!bench/results", ":!docs"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown", True


def utc_now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()
