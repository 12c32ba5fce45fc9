"""Builds the kernels for the CPU, once per state of the sources, and imports them."""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "cuda_shim"
NAME = "permattn_cuda_shim"


def why_not() -> str | None:
    """What is missing to build the module; None where nothing is."""
    if os.uname().machine != "x86_64":
        return "fibers switch stacks in x86-64 assembly"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    missing = [name for name in ("cmake", "ninja") if tool(name) is None]
    return f"{missing[0]} is not installed" if missing else None


def tool(name: str) -> str | None:
    """A program of this environment, or of the machine."""
    here = str(Path(sys.executable).parent)
    return shutil.which(name, path=here) or shutil.which(name)


@functools.cache
def module() -> ModuleType:
    """The module, built if need be. Processes that want it at the same time wait for one build."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _build()
    path = FOLDER / (NAME + sysconfig.get_config_var("EXT_SUFFIX"))
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def _build() -> None:
    import pybind11
    import torch

    cmake, ninja = tool("cmake"), tool("ninja")
    assert cmake is not None and ninja is not None
    configure = [cmake, "-S", str(ROOT / "tests" / "cuda_shim"), "-B", str(FOLDER), "-G", "Ninja"]
    options = {
        "CMAKE_MAKE_PROGRAM": ninja,
        "CMAKE_PREFIX_PATH": pybind11.get_cmake_dir(),
        "PYBIND11_FINDPYTHON": "ON",
        "Python_EXECUTABLE": sys.executable,
        "PERMATTN_TORCH": str(Path(torch.__file__).parent),
    }
    _run([*configure, *(f"-D{k}={v}" for k, v in options.items())])
    _run([cmake, "--build", str(FOLDER)])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
