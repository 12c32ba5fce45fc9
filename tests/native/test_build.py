"""The native library as it was built, and an install that cannot build it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from permattn.backends import cpu
from permattn.core import native

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = Path(cpu.__file__).parents[2] / "_native.so"


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_an_install_with_a_compiler_has_the_library():
    assert LIBRARY.exists(), cpu.load()
    assert json.loads(LIBRARY.with_name("_native_build.json").read_text())["built"]


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
@pytest.mark.skipif(not LIBRARY.exists(), reason="no native library")
def test_the_library_uses_no_python_and_no_unstable_torch_symbol():
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", str(LIBRARY)], capture_output=True, text=True, check=True
    )
    wanted = [line.split()[-1] for line in listed.stdout.splitlines()]
    assert any("torch" in name for name in wanted)
    assert not [name for name in wanted if name.startswith(("Py", "_Py"))]
    # C++ symbols of at:: or c10:: come and go with torch's versions; the stable ABI is plain C.
    assert not [name for name in wanted if name.startswith(("_ZN2at", "_ZN3c10", "_ZNK2at"))]


def test_without_a_compiler_the_build_goes_on_and_says_why(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "PATH")}
    environment["PATH"] = str(tmp_path)
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    folder = tmp_path / "lib" / "permattn"
    assert [p.name for p in folder.iterdir()] == ["_native_build.json"]
    report = json.loads((folder / "_native_build.json").read_text())
    assert not report["built"] and "no C++ compiler" in report["reason"]


@pytest.mark.parametrize(
    ("report", "wanted"),
    [
        ({"built": False, "reason": "no C++ compiler found"}, "no C++ compiler found"),
        (None, "install permattn"),
    ],
    ids=["recorded", "never-built"],
)
def test_why_not_repeats_the_reason(tmp_path, monkeypatch, report, wanted):
    if report is not None:
        (tmp_path / "_native_build.json").write_text(json.dumps(report))
    monkeypatch.setattr(native, "PACKAGE", tmp_path)
    reason = cpu.load.__wrapped__()
    assert "was not built" in reason and wanted in reason


def test_a_library_of_another_machine_is_a_reason_not_a_crash(tmp_path, monkeypatch):
    (tmp_path / "_native.so").write_bytes(b"not a library")
    monkeypatch.setattr(native, "PACKAGE", tmp_path)
    assert "does not load" in cpu.load.__wrapped__()
