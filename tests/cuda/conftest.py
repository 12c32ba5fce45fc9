"""Kernels in CUDA C++, run on the CPU by the stand-in of tests/cuda_shim."""

import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / folder) for folder in ("cuda_shim", "triton", "cuda", "ptxsim")]

import build  # noqa: E402


@pytest.fixture(scope="session")
def shim():
    """The kernels as a Python module."""
    why = build.why_not()
    if why is not None:
        pytest.skip(why)
    return build.module()


@pytest.fixture(autouse=True)
def default_options(request):
    """Every test begins with the same schedule."""
    yield
    if "shim" in request.fixturenames and build.why_not() is None:
        build.module().set_options(1, False)
