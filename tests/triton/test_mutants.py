"""Broken kernels must be noticed: a few mutants here, all of them with tests/triton/mutants.py."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

_spec = importlib.util.find_spec("triton")
pytestmark = pytest.mark.skipif(
    _spec is None or _spec.origin is None, reason="triton is not installed"
)
TIME_LIMIT = 600


def test_mutants_of_the_kernels_are_caught():
    command = [sys.executable, str(Path(__file__).parent / "mutants.py"), "--fast"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "runs, 0 wrong" in done.stdout
