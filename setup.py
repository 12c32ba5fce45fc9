"""Build script: maps the two source roots and builds the one native library.

The library stands on LibTorch's stable ABI and uses no CPython symbol, so one py3-none wheel serves
every Python. torch is looked up for its headers and never imported. Where it cannot be built (no
compiler, no torch, Windows), the install goes on and `permattn/_native_build.json` says why.

Environment:
    CXX: the compiler (default: g++, then clang++).
    PERMATTN_CUDA_ARCHS: e.g. "80 90a 120a"; empty switches CUDA off. Used where csrc/cuda has
        sources and nvcc is found.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
# The oldest torch whose symbols may be used: 2.11.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
DEFAULT_CUDA_ARCHS = "80 86 89 90a 100a 120a"


class NotBuilt(Exception):
    """Why there is no native library."""


def cxx_sources() -> list[Path]:
    """Every .cpp of the library; CMakeLists.txt globs the same folders."""
    return sorted(p for folder in ("binding", "cpu") for p in (CSRC / folder).rglob("*.cpp"))


def cuda_sources() -> list[Path]:
    # Kernels that no operator calls are not shipped.
    if not (CSRC / "binding" / "cuda.cpp").exists():
        return []
    return sorted((CSRC / "cuda").rglob("*.cu"))


def compile_flags() -> list[str]:
    return (CSRC / "compile_flags.txt").read_text().split()


def find_torch() -> Path:
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise NotBuilt(
            "torch was not in the build environment (pip install --no-build-isolation finds it)"
        )
    return Path(spec.origin).parent


def find_compiler() -> str:
    if sys.platform == "win32":
        raise NotBuilt("Windows is not supported (needs GCC or Clang)")
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++")):
        if shutil.which(name):
            return name
    raise NotBuilt("no C++ compiler found (g++ or clang++)")


def find_nvcc() -> str | None:
    if not os.environ.get("PERMATTN_CUDA_ARCHS", DEFAULT_CUDA_ARCHS).split():
        return None
    for name in ("nvcc", "/usr/local/cuda/bin/nvcc"):
        found = shutil.which(name)
        if found and cuda_sources():
            return found
    return None


def run(command: list[str]) -> None:
    print(" ".join(command), flush=True)
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    sys.stderr.write(done.stderr)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        raise NotBuilt(f"{command[0]} failed: {(errors or ['see the build log'])[0]}")


def compile_commands(torch: Path, objects: Path, compiler: str) -> dict[Path, list[str]]:
    """Object file -> the command that makes it."""
    include = ["-isystem", str(torch / "include")]
    commands = {}
    nvcc = find_nvcc()
    for source in cxx_sources():
        target = objects / (source.relative_to(CSRC).as_posix().replace("/", "_") + ".o")
        cuda = ["-DPERMATTN_CUDA"] if nvcc else []
        commands[target] = [
            *(compiler, *compile_flags(), STABLE_ABI, *cuda, *include),
            *("-c", str(source), "-o", str(target)),
        ]
    if nvcc:
        archs = os.environ.get("PERMATTN_CUDA_ARCHS", DEFAULT_CUDA_ARCHS).split()
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        for source in cuda_sources():
            target = objects / (source.relative_to(CSRC).as_posix().replace("/", "_") + ".o")
            commands[target] = [
                *(nvcc, "-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", *codes),
                *("-DUSE_CUDA", STABLE_ABI, "-I", str(torch / "include")),
                *("-c", str(source), "-o", str(target)),
            ]
    return commands


def link_command(torch: Path, objects: list[Path], compiler: str, library: Path) -> list[str]:
    command = [compiler, "-shared", *map(str, objects), "-o", str(library), f"-L{torch / 'lib'}"]
    if sys.platform == "darwin":
        return [*command, "-ltorch", "-ltorch_cpu"]
    # The umbrella libtorch stays NEEDED: with a CUDA build of torch it brings the CUDA symbols.
    command += ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-Wl,--as-needed"]
    nvcc = find_nvcc()
    if nvcc:
        home = Path(nvcc).resolve().parents[1]
        command += [f"-L{home / 'lib64'}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    return command


class BuildNative(build_ext):
    """Builds permattn/_native.so, or records why not."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        try:
            report = {"built": True, **self.build_library(library)}
        except NotBuilt as reason:
            print(f"permattn: native library not built: {reason}", flush=True)
            library.unlink(missing_ok=True)
            report = {"built": False, "reason": str(reason)}
        folders = {library.parent}
        if self.inplace or self.editable_mode:
            folders = {ROOT / "python" / "permattn"}
            if not report["built"]:
                (ROOT / "python" / "permattn" / "_native.so").unlink(missing_ok=True)
        for folder in folders:
            (folder / "_native_build.json").write_text(json.dumps(report, indent=1) + "\n")

    def build_library(self, library: Path) -> dict[str, str]:
        compiler, torch = find_compiler(), find_torch()
        objects = Path(self.build_temp)
        objects.mkdir(parents=True, exist_ok=True)
        commands = compile_commands(torch, objects, compiler)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, commands.values()))
        run(link_command(torch, list(commands), compiler, library))
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
        return {"compiler": version.splitlines()[0], "machine": platform.machine()}


class PlatformWheel(bdist_wheel):
    """No CPython symbol is used: py3-none, any Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    # A folder of data is a package to setuptools.
    packages=[*find_packages("python"), "permattn.triton_kernels", "permattn.models.configs"],
    package_dir={"": "python", "permattn.triton_kernels": "triton_kernels"},
    package_data={"permattn.models.configs": ["*.json"]},
    ext_modules=[Extension("permattn._native", sources=[], py_limited_api=True, optional=True)],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
