"""A run of the GPU suite without a GPU: every section, tiny, so that the suite cannot rot.

The CUDA kernels run on CPU tensors, as tests/cuda_shim compiles them; the cpu backend stands in for
Triton. What it writes is marked and proves nothing about hardware.
"""

from __future__ import annotations

import importlib
import os
import sys
import sysconfig
from pathlib import Path

import torch

from bench import gpu_bilevel, gpu_prefill
from bench.gpu_record import ROOT
from bench.gpu_suite import Suite


def environment() -> dict[str, str]:
    """What the worker has to know before it imports permattn: where the kernels for the CPU are."""
    found = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    if os.environ.get("PERMATTN_CUDA_SHIM"):
        return found
    folder = ROOT / "tests" / "cuda_shim"
    if not folder.exists():
        return found
    sys.path.insert(0, str(folder))
    build = importlib.import_module("build")
    if build.why_not() is None:
        build.module()
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        found["PERMATTN_CUDA_SHIM"] = str(Path(build.FOLDER) / f"{build.NAME}{suffix}")
    return found


def prepare(suite: Suite) -> None:
    """Turns the suite, and the modules with a device of their own, to the CPU."""
    from permattn.core import native

    suite.rehearsal, suite.device = True, torch.device("cpu")
    suite.stand_ins = {"triton": "reference" if native.load() else "cpu"}
    gpu_bilevel.DEVICE = gpu_prefill.DEVICE = suite.device
    gpu_prefill.BUDGET_MS = 0.0
