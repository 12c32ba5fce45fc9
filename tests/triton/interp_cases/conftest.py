"""Runs kernels on CPU tensors; only in the process that tests/triton/test_interpreted.py starts."""

import os
import sys
from pathlib import Path

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]

if INTERPRETED:
    sys.path[:0] = [str(Path(__file__).parents[i]) for i in (1, 2)]
    import interpreter
    import torch

    torch.set_num_threads(1)

    @pytest.fixture
    def checker():
        """The memory checker of the interpreter."""
        return interpreter.CHECKER

    @pytest.fixture(autouse=True)
    def poisoned_memory():
        """Every `torch.empty` is full of NaN, so that what a kernel forgets to write is seen."""
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield
        torch.use_deterministic_algorithms(False)
