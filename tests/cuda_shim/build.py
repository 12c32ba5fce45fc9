"""Builds the kernels for the CPU, once per state of the sources: as a module, and as programs."""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
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
    """The module, built if need be."""
    import pybind11
    import torch

    options = {
        "CMAKE_PREFIX_PATH": pybind11.get_cmake_dir(),
        "PYBIND11_FINDPYTHON": "ON",
        "Python_EXECUTABLE": sys.executable,
        "PERMATTN_TORCH": str(Path(torch.__file__).parent),
    }
    _build(HERE, FOLDER, options)
    path = FOLDER / (NAME + sysconfig.get_config_var("EXT_SUFFIX"))
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@functools.cache
def why_no_program(checks: str) -> str | None:
    """What is missing to build the program that runs launches with checks; None: nothing is."""
    why = why_not()
    if why is not None:
        return why
    compiler = os.environ.get("CXX") or tool("g++") or tool("c++")
    if compiler is None:
        return "there is no C++ compiler"
    with tempfile.TemporaryDirectory() as scratch:
        # Of the checker of races only the instrumentation is the compiler's.
        flags, link = (["thread"], ["-c"]) if checks == "races" else (["address,undefined"], [])
        command = [compiler, "-x", "c++", "-", *(f"-fsanitize={f}" for f in flags), *link]
        command += ["-o", str(Path(scratch, "tried"))]
        tried = subprocess.run(command, input="int main() {}", capture_output=True, text=True)
    return f"{compiler} has no -fsanitize={flags[0]}" if tried.returncode else None


@functools.cache
def program(checks: str) -> str:
    """The program of replay/replay.cpp with checks of "memory" or of "races", built if need be."""
    folder = ROOT / "build" / f"replay_{checks}"
    _build(HERE / "replay", folder, {"PERMATTN_CHECKS": checks})
    return str(folder / "replay")


def _build(source: Path, folder: Path, options: dict[str, str]) -> None:
    """Brings a build folder up to date. Processes that want it at the same time wait for one."""
    cmake, ninja = tool("cmake"), tool("ninja")
    assert cmake is not None and ninja is not None
    folder.mkdir(parents=True, exist_ok=True)
    options = {"CMAKE_MAKE_PROGRAM": ninja, **options}
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        configure = [cmake, "-S", str(source), "-B", str(folder), "-G", "Ninja"]
        _run([*configure, *(f"-D{k}={v}" for k, v in options.items())])
        _run([cmake, "--build", str(folder)])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
