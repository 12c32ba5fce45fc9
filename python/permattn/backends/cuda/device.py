"""What the native library holds of CUDA, and what this process and its devices can run of it."""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

import torch

from permattn.core.native import build_report, load

NAME = "cuda"
DTYPES = (torch.bfloat16, torch.float16)
LEAST_CAPABILITY = 80
# Machine code for this capability and newer ones runs on exactly one.
FIRST_EXACT = 90
# Settled once, here: a look-up inside why_not would break fullgraph compilation. The path of the
# kernels as they are compiled for CPU tensors, for tests.
SHIM = os.environ.get("PERMATTN_CUDA_SHIM") or None
# The compute capability that kernels on CPU tensors play; tests set it.
shim_capability = LEAST_CAPABILITY


class Holds(NamedTuple):
    """CUDA code of the native library.

    Args:
        archs: compute capabilities (major * 10 + minor) with machine code, ascending.
        ptx: that of the PTX, which drivers compile for newer devices; 0 = none.
        version: CUDA's, as major * 1000 + minor * 10; 0 = none.
    """

    archs: tuple[int, ...]
    ptx: int
    version: int


def takes(device_type: str) -> bool:
    return device_type == "cuda" or (SHIM is not None and device_type == "cpu")


@functools.cache
def load_kernels() -> str | None:
    """Loads the operators once; None, or one line saying why there are none."""
    why = load()
    if why is not None:
        return why
    if SHIM is not None:
        try:
            torch.ops.load_library(SHIM)
        except OSError as e:
            return f"PERMATTN_CUDA_SHIM does not load: {e}"
        return None
    if holds().version == 0:
        reason = build_report().get("cuda", {}).get("reason", "install permattn again to see why")
        return f"the native library has no CUDA kernels: {reason}"
    return None


def need_kernels() -> None:
    """Raises RuntimeError where there are none."""
    why = load_kernels()
    if why is not None:
        raise RuntimeError(f"backend 'cuda': {why}")


@functools.cache
def holds() -> Holds:
    """Only after `load`."""
    ops = torch.ops.permattn_native
    return Holds(tuple(ops.cuda_archs()), ops.cuda_ptx_arch(), ops.cuda_version())


def capability() -> int:
    """Compute capability of the current device as major * 10 + minor."""
    if SHIM is not None:
        return shim_capability
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def driver_problem() -> str | None:
    """What keeps the library from this machine's devices."""
    return torch.ops.permattn_native.cuda_driver_problem() or None


def why_no_code(device: int, held: Holds) -> str | None:
    """Whether code for `held` runs on a device of that capability; None where it does."""
    if device < LEAST_CAPABILITY:
        return f"needs compute capability 8.0 or newer, got {dotted(device)}"
    if device in held.archs:
        return None
    same_family = [a for a in held.archs if a // 10 == device // 10 and a <= device]
    if device < FIRST_EXACT and same_family:
        return None
    # Devices of 9.0 want kernels of their own, which are never PTX.
    if device != FIRST_EXACT and held.ptx and held.ptx <= device:
        return None
    built = ", ".join(dotted(a) for a in held.archs)
    return (
        f"the native library has no code for compute capability {dotted(device)}, only for {built} "
        "(PERMATTN_CUDA_ARCHS at build)"
    )


def dotted(arch: int) -> str:
    return f"{arch // 10}.{arch % 10}"


def why_not_here(device_type: str) -> str | None:
    """Why nothing runs in this process; None where something does."""
    why = load_kernels()
    if why is not None or device_type == "cpu":
        return why
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) was built without CUDA"
    problem = driver_problem()
    if problem is not None:
        return f"no usable CUDA device: {problem}"
    return why_no_code(capability(), holds())


def why_no_kernel(*shape: int) -> str | None:
    """The kernels' own answer for a shape (csrc/cuda/config.h: Shape) without its capability."""
    return torch.ops.permattn_native.cuda_why_not([capability(), *shape]) or None


# Facts about this process, not something to trace: the mark that
# torch.compiler.assume_constant_result sets, without its import of torch._dynamo, which takes a
# second and imports triton.
why_not_here._dynamo_marked_constant = True  # type: ignore[attr-defined]
why_no_kernel._dynamo_marked_constant = True  # type: ignore[attr-defined]


def describe() -> dict[str, Any]:
    """What was built and what stands in the way here, for people; asks no device."""
    why = load()
    held = Holds((), 0, 0) if why is not None else holds()
    return {
        "version": f"{held.version // 1000}.{held.version % 1000 // 10}" if held.version else None,
        "archs": [dotted(a) for a in held.archs],
        "ptx": dotted(held.ptx) if held.ptx else None,
        "why_not": load_kernels() or (None if SHIM is not None else _machine_problem()),
    }


def _machine_problem() -> str | None:
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) was built without CUDA"
    return driver_problem()
