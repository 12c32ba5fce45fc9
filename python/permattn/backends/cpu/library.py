"""What the native library offers on this CPU."""

from __future__ import annotations

import functools

import torch

from permattn.core.native import load

NAME = "cpu"
# The numbers of csrc/common/dispatch.h.
ISAS = ("portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx_bf16")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
