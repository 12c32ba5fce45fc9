"""PTX of CUDA C++ sources, by nvcc where there is one."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KERNELS = Path(__file__).resolve().parent / "kernels"


@functools.cache
def nvcc() -> str | None:
    """The compiler: that of CUDACXX, of PATH, or of the usual place."""
    return (
        os.environ.get("CUDACXX")
        or shutil.which("nvcc")
        or shutil.which("/usr/local/cuda/bin/nvcc")
    )


def why_not() -> str | None:
    return None if nvcc() else "no nvcc (set CUDACXX, or put it on PATH)"


@functools.cache
def ptx_of(source: Path, arch: str) -> str:
    """PTX with line information; the sources of the library can be included."""
    compiler = nvcc()
    assert compiler is not None
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "out.ptx"
        command = [compiler, "-std=c++20", "-O3", f"-arch={arch}", "-lineinfo", "-ptx"]
        command += [f"-I{ROOT / 'csrc'}", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
        return target.read_text(encoding="utf-8")
