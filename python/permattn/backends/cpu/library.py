"""The native library: loaded on the first question, never by an import."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

NAME = "cpu"
# The numbers of csrc/common/dispatch.h.
ISAS = ("portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx_bf16")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PACKAGE = Path(__file__).resolve().parents[2]


@functools.cache
def load() -> str | None:
    """Loads the library once; None, or one line saying why it cannot be used."""
    library = _PACKAGE / "_native.so"
    if not library.exists():
        report = _PACKAGE / "_native_build.json"
        if report.exists():
            reason = json.loads(report.read_text()).get("reason", "unknown reason")
            return f"native library was not built: {reason}"
        return "native library was not built: install permattn to build it"
    try:
        torch.ops.load_library(str(library))
    except OSError as e:
        return f"native library does not load: {e}"
    return None


def why_unusable() -> str | None:
    """`load` as torch.compile may ask it: a fact about this process, not something to trace."""
    return load()


# The mark that torch.compiler.assume_constant_result sets, without its import of torch._dynamo,
# which takes a second and imports triton.
why_unusable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def isa() -> str:
    """The instruction set that kernels use on this machine.

    Raises:
        RuntimeError: there is no native library; says why.
    """
    return ISAS[_best_isa()]


def available_isas() -> tuple[str, ...]:
    """Every instruction set that runs here, slowest first; empty without a native library."""
    if load() is not None:
        return ()
    return ISAS[: _best_isa() + 1]


@functools.cache
def _best_isa() -> int:
    reason = load()
    if reason is not None:
        raise RuntimeError(reason)
    return torch.ops.permattn_native.cpu_best_isa()


def isa_number(isa: str | None) -> int:
    """The number of an instruction set; -1 = the best one here."""
    return -1 if isa is None else ISAS.index(isa)
