"""Build script: maps the two source roots and builds the one native library.

The library stands on LibTorch's stable ABI and uses no CPython symbol, so one py3-none wheel serves
every Python and every torch from 2.11 on, with CUDA or without. torch is looked up for its headers
and never imported. What cannot be built is left out: without a compiler there is no library,
without nvcc it has no CUDA kernels. The install goes on, prints what that costs, and
`permattn/_native_build.json` says what is in and why the rest is not. A setting that makes no sense
ends it before any work.

Environment:
    CXX: the compiler, one program (default: g++, then clang++).
    CUDACXX: nvcc (default: that of CUDA_HOME, of PATH, then /usr/local/cuda/bin/nvcc).
    PERMATTN_CUDA_ARCHS: compute capabilities to compile kernels for (default: "80 86 89 90a 120a").
        The newest without a letter also goes in as PTX, for devices that are not listed. Empty: no
        CUDA. "90" and "120" mean "90a" and "120a".
    PERMATTN_REQUIRE_CUDA: 1 makes a library without CUDA kernels, or without some of those that
        PERMATTN_CUDA_ARCHS names, an error (for wheels).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
# The oldest torch whose symbols may be used: 2.11.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
DEFAULT_CUDA_ARCHS = "80 86 89 90a 120a"
# Kernels that only one compute capability can run; all others are compiled for every one.
ONLY_FOR = {"sm90": "90a"}
# The first release with C++20.
LEAST_NVCC = (12, 0)
NO_REQUIRED_CUDA = "PERMATTN_REQUIRE_CUDA=1 and CUDA kernels cannot be built"
# A kernel that spills is a fault of ours.
NVCC_FLAGS = ("-std=c++20", "-O3", "-Xptxas", "-warn-spills,-Werror")


class NotBuilt(Exception):
    """Why there is no native library, or no CUDA in it."""


class Refused(SystemExit):
    """Ends the build: a setting that makes no sense, or something required that cannot be had."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"permattn: {reason}")


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler and what it is asked for."""

    path: str
    version: tuple[int, int]
    archs: tuple[str, ...]  # "80", "90a", ...
    left_out: tuple[str, ...] = ()  # asked for, but newer than the compiler

    @cached_property
    def home(self) -> Path:
        """The toolkit's folder. What is on PATH may be a script that calls another nvcc."""
        command = [self.path, "--dryrun", "-c", "-x", "cu", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True).stderr
        top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
        return Path(top[1] if top else Path(self.path).resolve().parents[1]).resolve()

    @property
    def ptx(self) -> str | None:
        """The capability whose PTX goes in: letters stand for exactly one device, PTX for many."""
        plain = [a for a in self.archs if a.isdigit()]
        return plain[-1] if plain else None

    def archs_of(self, source: Path) -> tuple[str, ...]:
        only = ONLY_FOR.get(source.relative_to(CSRC / "cuda").parts[0])
        return self.archs if only is None else tuple(a for a in self.archs if a == only)

    def codes_of(self, source: Path) -> list[str]:
        """-gencode arguments of a source; none where nothing that is asked for can run it."""
        archs = self.archs_of(source)
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        if self.ptx in archs:
            codes.append(f"-gencode=arch=compute_{self.ptx},code=compute_{self.ptx}")
        return codes

    def definitions(self) -> list[str]:
        """What the binding is told."""
        numbers = ",".join(re.sub(r"\D", "", a) for a in self.archs)
        found = ["-DPERMATTN_CUDA", f"-DPERMATTN_CUDA_ARCHS={numbers}"]
        if self.ptx is not None:
            found.append(f"-DPERMATTN_CUDA_PTX={self.ptx}")
        if any(
            p.is_relative_to(CSRC / "cuda" / "sm90") and self.codes_of(p) for p in cuda_sources()
        ):
            found.append("-DPERMATTN_CUDA_SM90")
        return found

    def library_folder(self) -> Path:
        """Where the static runtime lies: toolkits and pip's packages differ."""
        names = ("lib64", "lib", f"targets/{platform.machine()}-linux/lib")
        for folder in (self.home / name for name in names):
            if (folder / "libcudart_static.a").exists():
                return folder
        raise NotBuilt(f"no libcudart_static.a below {self.home}")


def cxx_sources(nvcc: Nvcc | None) -> list[Path]:
    """Every .cpp of the library; CMakeLists.txt globs the same folders."""
    found = [p for folder in ("binding", "cpu", "cuda") for p in (CSRC / folder).rglob("*.cpp")]
    # binding/cuda_*.cpp launch kernels.
    return sorted(p for p in found if nvcc or not p.name.startswith("cuda_"))


def cuda_sources() -> list[Path]:
    return sorted((CSRC / "cuda").rglob("*.cu"))


def sources_sha256() -> str:
    """Of every source of the library: by it `make gpu` knows what it runs."""
    made = hashlib.sha256()
    for path in sorted(p for p in CSRC.rglob("*") if p.is_file()):
        made.update(path.relative_to(CSRC).as_posix().encode() + b"\0" + path.read_bytes())
    return made.hexdigest()


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
    given = os.environ.get("CXX")
    for name in [given] if given else ["g++", "clang++"]:
        if shutil.which(name):
            return name
    if given:
        raise NotBuilt(f"CXX: wants one program that exists, got {given!r}")
    raise NotBuilt("no C++ compiler found (install g++ or clang++, or set CXX)")


def arch_number(arch: str) -> int:
    return int(re.sub(r"\D", "", arch) or 0)


def is_cuda_required() -> bool:
    given = os.environ.get("PERMATTN_REQUIRE_CUDA", "")
    if given not in ("", "0", "1"):
        raise Refused(f"PERMATTN_REQUIRE_CUDA: wants 0 or 1, got {given!r}")
    return given == "1"


def wanted_archs() -> list[str]:
    """PERMATTN_CUDA_ARCHS, ascending: code for 9.0 and newer is for exactly one capability.

    Raises:
        Refused: some word of it names no compute capability.
    """
    given = os.environ.get("PERMATTN_CUDA_ARCHS", DEFAULT_CUDA_ARCHS)
    words = set(given.replace(",", " ").replace(";", " ").split())
    for word in sorted(words):
        if not re.fullmatch(r"8\d|(9\d|1\d\d)a?", word):
            raise Refused(
                "PERMATTN_CUDA_ARCHS: wants compute capabilities from 8.0 on without their dot, "
                f"e.g. '80 90a', got {word!r}"
            )
    full = {w if arch_number(w) < 90 or w.endswith("a") else w + "a" for w in words}
    return sorted(full, key=lambda a: (arch_number(a), a))


def nvcc_path() -> str:
    given = os.environ.get("CUDACXX")
    home = os.environ.get("CUDA_HOME")
    names = [f"{home}/bin/nvcc"] if home else []
    for name in [given] if given else [*names, "nvcc", "/usr/local/cuda/bin/nvcc"]:
        found = shutil.which(name)
        if found is not None:
            return found
    if given:
        raise NotBuilt(f"CUDACXX: wants one program that exists, got {given!r}")
    raise NotBuilt("nvcc was not found (set CUDACXX or CUDA_HOME, or put it on PATH)")


def find_nvcc() -> Nvcc:
    """The CUDA compiler.

    Raises:
        NotBuilt: there is none, it is too old, or nobody wants it.
    """
    wanted = wanted_archs()
    if not wanted:
        raise NotBuilt("PERMATTN_CUDA_ARCHS is empty")
    if sys.platform != "linux":
        raise NotBuilt("CUDA kernels are built on Linux only")
    found = nvcc_path()
    release = re.search(r"release (\d+)\.(\d+)", output_of([found, "--version"]))
    if release is None:
        raise NotBuilt(f"{found} --version names no release")
    version = (int(release[1]), int(release[2]))
    if version < LEAST_NVCC:
        raise NotBuilt(f"nvcc {version[0]}.{version[1]} is too old (needs {LEAST_NVCC[0]}.0)")
    known = set(re.findall(r"sm_(\d+)", output_of([found, "--list-gpu-code"])))
    archs = tuple(a for a in wanted if str(arch_number(a)) in known)
    if not archs:
        raise NotBuilt(f"nvcc {version[0]}.{version[1]} knows none of {' '.join(wanted)}")
    return Nvcc(found, version, archs, tuple(a for a in wanted if a not in archs))


def output_of(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as e:
        raise NotBuilt(f"{command[0]} does not run: {e}") from None
    if done.returncode != 0:
        raise NotBuilt(f"{' '.join(command)} failed: {first_error(done.stderr)}")
    return done.stdout


def first_error(text: str) -> str:
    lines = text.splitlines()
    # ptxas calls a spill a warning, and stops.
    for word in ("error", "pill"):
        for line in lines:
            if word in line:
                return line.strip()
    return "see the build log"


def run(command: Sequence[str]) -> None:
    print(" ".join(command), flush=True)
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    sys.stderr.write(done.stderr)
    if done.returncode != 0:
        raise NotBuilt(f"{command[0]} failed: {first_error(done.stderr)}")


def run_all(commands: Sequence[Sequence[str]]) -> None:
    """As many at a time as there are cores; the first failure ends it."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pending = [pool.submit(run, command) for command in commands]
        try:
            for each in pending:
                each.result()
        except NotBuilt:
            pool.shutdown(cancel_futures=True)
            raise


def object_of(source: Path, objects: Path) -> Path:
    return objects / (source.relative_to(CSRC).as_posix().replace("/", "_") + ".o")


def cxx_commands(
    torch: Path, objects: Path, compiler: str, nvcc: Nvcc | None
) -> dict[Path, list[str]]:
    """Object file -> the command that makes it."""
    # Errors name the line that raised them: without folders of the building machine.
    include = [f"-ffile-prefix-map={ROOT}/=", f"-ffile-prefix-map={torch.parent}/="]
    include += ["-isystem", str(torch / "include")]
    if nvcc:
        include += ["-isystem", str(nvcc.home / "include"), *nvcc.definitions()]
    commands = {}
    for source in cxx_sources(nvcc):
        target = object_of(source, objects)
        commands[target] = [
            *(compiler, *compile_flags(), STABLE_ABI, *include),
            *("-c", str(source), "-o", str(target)),
        ]
    return commands


def cuda_commands(objects: Path, compiler: str, nvcc: Nvcc) -> dict[Path, list[str]]:
    """Likewise; sources that no wanted device can run are left out."""
    commands = {}
    for source in cuda_sources():
        codes = nvcc.codes_of(source)
        if not codes:
            continue
        target = object_of(source, objects)
        commands[target] = [
            *(nvcc.path, *NVCC_FLAGS, "-ccbin", compiler),
            *("-Xcompiler", "-fPIC,-fvisibility=hidden", *codes),
            *("-c", str(source), "-o", str(target)),
        ]
    return commands


def link_command(
    torch: Path, objects: Sequence[Path], compiler: str, library: Path, nvcc: Nvcc | None
) -> list[str]:
    command = [compiler, "-shared", *map(str, objects), "-o", str(library), f"-L{torch / 'lib'}"]
    if sys.platform == "darwin":
        return [*command, "-ltorch", "-ltorch_cpu"]
    # The umbrella libtorch stays NEEDED: with a CUDA build of torch it brings the CUDA symbols.
    command += ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-Wl,--as-needed", "-Wl,-z,defs"]
    if nvcc:
        # Its symbols stay inside: torch may bring another runtime.
        command += [f"-L{nvcc.library_folder()}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        command += ["-Wl,--exclude-libs,libcudart_static.a"]
    return command


def build_library(library: Path, objects: Path) -> dict[str, Any]:
    """Builds the library, with CUDA kernels where that works; says what is in it.

    Raises:
        NotBuilt: there is no library.
        Refused: CUDA kernels are required, and something is missing.
    """
    begin = time.monotonic()
    is_required, _ = is_cuda_required(), wanted_archs()
    compiler, torch = find_compiler(), find_torch()
    objects.mkdir(parents=True, exist_ok=True)
    nvcc: Nvcc | None = None
    cuda_objects: list[Path] = []
    try:
        nvcc, cuda_objects, cuda = build_cuda(objects, compiler)
    except NotBuilt as reason:
        if is_required:
            raise Refused(f"{NO_REQUIRED_CUDA}: {reason}") from None
        cuda = {"built": False, "reason": str(reason)}
    commands = cxx_commands(torch, objects, compiler, nvcc)
    run_all(list(commands.values()))
    run(link_command(torch, [*commands, *cuda_objects], compiler, library, nvcc))
    return {
        "built": True,
        "compiler": output_of([compiler, "--version"]).splitlines()[0],
        "machine": platform.machine(),
        "seconds": round(time.monotonic() - begin, 1),
        "bytes": library.stat().st_size,
        "cuda": cuda,
    }


def build_cuda(objects: Path, compiler: str) -> tuple[Nvcc, list[Path], dict[str, Any]]:
    """The kernels' object files, and what they are for."""
    begin = time.monotonic()
    nvcc = find_nvcc()
    if nvcc.left_out and is_cuda_required():
        raise NotBuilt(
            f"nvcc {nvcc.version[0]}.{nvcc.version[1]} does not know {' '.join(nvcc.left_out)} "
            "(take a newer one, or leave them out of PERMATTN_CUDA_ARCHS)"
        )
    nvcc.library_folder()
    commands = cuda_commands(objects, compiler, nvcc)
    if not commands:
        raise NotBuilt("there are no CUDA sources")
    # Longest first, by the only sign there is.
    run_all(sorted(commands.values(), key=lambda c: -len(c)))
    report: dict[str, Any] = {
        "built": True,
        "version": f"{nvcc.version[0]}.{nvcc.version[1]}",
        "archs": list(nvcc.archs),
        "ptx": nvcc.ptx,
        "left_out": list(nvcc.left_out),
        "seconds": round(time.monotonic() - begin, 1),
    }
    return nvcc, list(commands), report


def summary(report: dict[str, Any]) -> list[str]:
    """What was built, and what the rest costs, for people."""
    if not report["built"]:
        return [
            f"no native library: {report['reason']}",
            "the cpu and cuda backends will say so; triton and reference still work",
        ]
    size = f"{report['bytes'] / 2**20:.1f} MiB"
    lines = [f"native library: {size} in {report['seconds']} s, {report['compiler']}"]
    cuda = report["cuda"]
    if not cuda["built"]:
        return [
            *lines,
            f"no CUDA kernels: {cuda['reason']}",
            "the cuda backend will say so; on CUDA devices triton runs in its place",
        ]
    ptx = f", PTX {cuda['ptx']}" if cuda["ptx"] else ""
    lines.append(
        f"CUDA kernels: CUDA {cuda['version']} for {' '.join(cuda['archs'])}{ptx}, "
        f"in {cuda['seconds']} s"
    )
    if cuda["left_out"]:
        lines.append(f"left out, newer than this nvcc: {' '.join(cuda['left_out'])}")
    return lines


def build_tag(version: str) -> str:
    """Of a wheel with kernels of that CUDA: "13cu"."""
    return f"{version.split('.')[0]}cu"


class BuildNative(build_ext):
    """Builds permattn/_native.so, or records why not."""

    report: dict[str, Any]

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        try:
            report = build_library(library, Path(self.build_temp))
        except NotBuilt as reason:
            if is_cuda_required():
                raise Refused(f"{NO_REQUIRED_CUDA}: {reason}") from None
            library.unlink(missing_ok=True)
            report = {"built": False, "reason": str(reason)}
        self.report = report
        for line in summary(report):
            print(f"permattn: {line}", flush=True)
        folders = {library.parent}
        if self.inplace or self.editable_mode:
            folders = {ROOT / "python" / "permattn"}
            if not report["built"]:
                (ROOT / "python" / "permattn" / "_native.so").unlink(missing_ok=True)
        report["sources"] = sources_sha256()
        for folder in folders:
            (folder / "_native_build.json").write_text(json.dumps(report, indent=1) + "\n")


class PlatformWheel(bdist_wheel):
    """No CPython symbol is used: py3-none, any Python. The build tag is CUDA's major version."""

    def run_command(self, command: str) -> None:
        super().run_command(command)
        if command != "build" or self.build_number is not None:
            return
        # Only now it is known what went in; the wheel's name is made later.
        report = self.get_finalized_command("build_ext").report
        if report["built"] and report["cuda"]["built"]:
            self.build_number = build_tag(report["cuda"]["version"])

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    setup(
        # A folder of data is a package to setuptools.
        packages=[*find_packages("python"), "permattn.triton_kernels", "permattn.models.configs"],
        package_dir={"": "python", "permattn.triton_kernels": "triton_kernels"},
        package_data={"permattn.models.configs": ["*.json"]},
        ext_modules=[Extension("permattn._native", sources=[], py_limited_api=True, optional=True)],
        cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
    )
