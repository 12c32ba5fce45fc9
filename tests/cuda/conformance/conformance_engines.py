"""What answers probes without a device: the stand-in for CUDA, and the simulator of PTX."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from conformance_probes import Array, Box, Probe

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
MADE = ROOT / "build" / "conformance"
ARCHS = {"warp": "sm_89", "hopper": "sm_90a"}


def nvcc() -> str | None:
    usual = "/usr/local/cuda/bin/nvcc"
    found = os.environ.get("CUDACXX") or shutil.which("nvcc")
    return found or (usual if os.path.exists(usual) else None)


def _state(*sources: Path) -> str:
    folders = (ROOT / "csrc" / "cuda" / "primitives", ROOT / "csrc" / "common")
    headers = [p for folder in folders for p in sorted(folder.iterdir())]
    made = hashlib.sha256()
    for path in (*headers, ROOT / "csrc" / "cuda" / "tensor_map.h", *sources):
        made.update(path.read_bytes())
    return made.hexdigest()[:16]


def _built(target: Path, command: list[str]) -> Path:
    """Makes a file once per state of its sources; others may be making it, too."""
    if not target.exists():
        MADE.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{os.getpid()}-{target.name}")
        done = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
        part.rename(target)
    return target


@functools.cache
def ptx_of(source: str, arch: str) -> str | None:
    """PTX of warp.cu or hopper.cu; None where it was not made before and there is no nvcc."""
    path = HERE / f"{source}.cu"
    target = MADE / f"{source}-{arch}-{_state(path, HERE / 'warp.cuh')}.ptx"
    compiler = nvcc()
    if not target.exists() and compiler is None:
        return None
    flags = ["-std=c++20", "-O3", f"-arch={arch}", "-ptx", f"-I{ROOT / 'csrc'}"]
    _built(target, [str(compiler), *flags, str(path)])
    return target.read_text(encoding="utf-8")


def simulated(probe: Probe) -> Array:
    """The answer of tests/ptxsim."""
    folder = str(ROOT / "tests" / "ptxsim")
    if folder not in sys.path:
        sys.path.append(folder)
    import ptxsim

    ptx = ptx_of(probe.source, ARCHS[probe.source])
    assert ptx is not None
    out = np.zeros(probe.words, np.uint32)
    given = [
        ptxsim.TensorMap.of(x.tensor, x.box, x.row_bytes) if isinstance(x, Box) else x
        for x in probe.inputs
    ]
    memory = [
        ptxsim.Region.of(x.tensor if isinstance(x, Box) else x, f"input {i}", read_only=True)
        for i, x in enumerate(probe.inputs)
    ]
    facts = (1, probe.threads, probe.shared_bytes, [*given, out])
    ptxsim.launch(ptx, probe.name, *facts, [*memory, ptxsim.Region.of(out, "out")])
    return out


@functools.cache
def _library() -> ctypes.CDLL:
    source = HERE / "on_cpu.cpp"
    shim = ROOT / "tests" / "cuda_shim"
    sources = [source, HERE / "warp.cu", HERE / "warp.cuh", *sorted(shim.glob("*.h"))]
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", f"-I{shim}"]
    target = MADE / f"on_cpu-{_state(*sources)}.so"
    made = ctypes.CDLL(str(_built(target, ["g++", *flags, str(source)])))
    made.run_kernel.restype = ctypes.c_char_p
    made.run_kernel.argtypes = [
        *(ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64),
        *(ctypes.c_void_p, ctypes.c_void_p),
    ]
    return made


def on_cpu(probe: Probe) -> Array:
    """The answer of tests/cuda_shim."""
    library = _library()
    (given,) = probe.inputs
    assert not isinstance(given, Box)
    out = np.zeros(probe.words, np.uint32)
    kernel = ctypes.cast(getattr(library, probe.name), ctypes.c_void_p)
    facts = (probe.threads, probe.shared_bytes, given.ctypes.data, out.ctypes.data)
    if why := library.run_kernel(kernel, *facts):
        raise RuntimeError(why.decode())
    return out
