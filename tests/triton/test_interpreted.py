"""Runs the kernels on the CPU: every suite of interp_cases, in a process where Triton interprets.

By hand: TRITON_INTERPRET=1 OPENBLAS_NUM_THREADS=1 python -m pytest tests/triton/interp_cases
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interp_cases"
SUITES = sorted(p.stem for p in FOLDER.glob("test_*.py"))
TIME_LIMIT = 600
_spec = importlib.util.find_spec("triton")
pytestmark = pytest.mark.skipif(
    _spec is None or _spec.origin is None, reason="triton is not installed"
)


def start(suite: str) -> subprocess.Popen[str]:
    # numpy's threads only get in each other's way on tiles of this size: four times slower.
    env = {**os.environ, "TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    return subprocess.Popen(
        [*command, str(FOLDER / f"{suite}.py")],
        env=env,
        cwd=FOLDER,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[str, subprocess.Popen[str]]]:
    running = {suite: start(suite) for suite in SUITES}
    yield running
    for process in running.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("suite", SUITES, ids=str)
def test_suite_passes_in_the_interpreter(processes, suite):
    output, _ = processes[suite].communicate(timeout=TIME_LIMIT)
    print(output)
    assert processes[suite].returncode == 0, f"{suite}:\n{output}"
    assert " passed" in output
    assert "skipped" not in output
