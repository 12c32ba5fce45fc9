"""The library as it was built: what it wants of the machine that loads it."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from permattn.core import native

LIBRARY = native.PACKAGE / "_native.so"
pytestmark = [
    pytest.mark.skipif(not LIBRARY.exists(), reason="no native library"),
    pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf"),
]
# The C interface that torch keeps, and nothing of its C++.
STABLE = re.compile(r"(aoti_torch|torch)_[a-z0-9_]+$")
# CUDA builds of torch have it, others do not: unresolved, it is null.
WEAK = {"aoti_torch_get_current_cuda_stream"}
SYSTEM = re.compile(
    r"(libstdc\+\+|libm|libgcc_s|libc|libdl|librt|libpthread|ld-linux-.*)\.so\.\d+$"
)


def readelf(*options: str) -> list[str]:
    done = subprocess.run(
        ["readelf", "-W", *options, str(LIBRARY)], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def unresolved():
    """(name without version, whether weak) of every symbol that others must have."""
    rows = [line.split() for line in readelf("--dyn-syms") if " UND " in line]
    return [(row[7].partition("@")[0], row[4] == "WEAK") for row in rows if len(row) > 7]


def test_needed_libraries_are_torchs_and_the_systems():
    """No CUDA runtime and no driver: the library loads where neither is."""
    needed = [m[1] for line in readelf("-d") if (m := re.search(r"NEEDED.*\[(.+)\]", line))]
    assert {"libtorch.so", "libtorch_cpu.so"} <= set(needed)
    others = set(needed) - {"libtorch.so", "libtorch_cpu.so"}
    assert not [name for name in others if not SYSTEM.match(name)]


def test_no_folder_of_the_building_machine_is_searched():
    assert not [line for line in readelf("-d") if re.search(r"RPATH|RUNPATH", line)]


def test_messages_name_no_folder_of_the_building_machine():
    """A check that fails names its line of the source."""
    library = LIBRARY.read_bytes()
    assert b"\0csrc/binding/cpu.cpp\0" in library
    # By absolute path: what begins a string and ends in a source.
    assert not re.findall(rb"\0(/[\w./+-]+\.(?:cpp|cuh?|h|hpp))\0", library)


def test_torch_symbols_are_those_of_the_stable_interface(unresolved):
    of_torch = [name for name, _ in unresolved if "torch" in name or "c10" in name]
    assert len(of_torch) > 20
    assert not [name for name in of_torch if not STABLE.match(name)]
    assert not [
        name for name, _ in unresolved if name.startswith(("Py", "_Py", "_ZN2at", "_ZN3c10"))
    ]


def test_cuda_symbols_of_others_are_weak(unresolved):
    of_cuda = {name for name, _ in unresolved if re.match(r"_*cu(da)?[A-Z]|cu[a-z]+[A-Z]", name)}
    assert not of_cuda
    assert {name for name, is_weak in unresolved if is_weak and "torch" in name} <= WEAK


def test_the_runtime_that_is_linked_in_stays_inside():
    """Another CUDA runtime in the process must not find this one's symbols."""
    shown = [
        row for row in map(str.split, readelf("--dyn-syms")) if len(row) > 7 and row[6] != "UND"
    ]
    names = [row[7] for row in shown]
    assert not [name for name in names if re.match(r"_*cuda|cu[A-Z]|_ZN8permattn", name)]
