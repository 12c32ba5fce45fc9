"""What this process and its devices can run of Triton."""

from __future__ import annotations

import contextlib
import importlib.util
import os

import torch
from torch import Tensor

NAME = "triton"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Both are settled once, here: a look-up inside why_not would break fullgraph compilation. Triton
# itself reads the variable when it is imported; under it, kernels run on CPU tensors, for tests.
_SPEC = importlib.util.find_spec("triton")
# A folder of that name on the path, without code, has no origin.
_INSTALLED = _SPEC is not None and _SPEC.origin is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_no_kernels(device_type: str, dtype: torch.dtype) -> str | None:
    if not _INSTALLED:
        return "triton is not installed (pip install 'permattn[triton]')"
    if device_type != "cuda" and not (INTERPRETED and device_type == "cpu"):
        return f"needs a CUDA device, got {device_type}"
    if dtype not in DTYPES:
        return f"computes in bfloat16, float16 or float32, got {dtype}"
    return None


def why_not_this_device(device_type: str) -> str | None:
    if device_type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        if major < 8:
            return f"needs compute capability 8.0 or newer, got {major}.{minor}"
    return None


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
