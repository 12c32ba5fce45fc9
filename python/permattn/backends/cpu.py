"""Native C++ kernels: AMX, AVX-512, AVX2 or portable vectors, chosen at run time.

The shared library is loaded on the first question, never by an import.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from torch import Tensor

from permattn.core.packing import pack_plan
from permattn.core.plan import AttnPlan
from permattn.core.probe import Masses, ProbeArgs, ProbeProblem, empty_masses
from permattn.core.problem import BwdArgs, FwdArgs, Problem, empty_out

NAME = "cpu"
MAX_HEAD_DIM = 256
# csrc/cpu/kernels.h: kTileLanes.
MAX_PROBE_ROWS = 128
# The numbers of csrc/common/dispatch.h.
ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx_bf16")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PACKAGE = Path(__file__).resolve().parents[1]


@functools.cache
def _load() -> str | None:
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


def _why_unusable() -> str | None:
    """`_load` as torch.compile may ask it: a fact about this process, not something to trace."""
    return _load()


# The mark that torch.compiler.assume_constant_result sets, without its import of torch._dynamo,
# which takes a second and imports triton.
_why_unusable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def isa() -> str:
    """The instruction set that kernels use on this machine.

    Raises:
        RuntimeError: there is no native library; says why.
    """
    return ISAS[_best_isa()]


def available_isas() -> tuple[str, ...]:
    """Every instruction set that runs here, slowest first; empty without a native library."""
    if _load() is not None:
        return ()
    return ISAS[: _best_isa() + 1]


@functools.cache
def _best_isa() -> int:
    reason = _load()
    if reason is not None:
        raise RuntimeError(reason)
    return torch.ops.permattn_native.cpu_best_isa()


def why_not(problem: Problem) -> str | None:
    if problem.device_type != "cpu":
        return f"runs on cpu tensors, got {problem.device_type}"
    if problem.dtype not in _DTYPES:
        return f"takes float32, bfloat16 and float16, got {problem.dtype}"
    if max(problem.head_dim, problem.head_dim_v) > MAX_HEAD_DIM:
        return f"takes head dims to {MAX_HEAD_DIM}, got {problem.head_dim}, {problem.head_dim_v}"
    if problem.quant.is_quantised:
        return "does not quantise"
    return _why_unusable()


def why_not_probe(problem: ProbeProblem) -> str | None:
    if problem.device_type != "cpu":
        return f"runs on cpu tensors, got {problem.device_type}"
    if problem.dtype not in _DTYPES:
        return f"takes float32, bfloat16 and float16, got {problem.dtype}"
    if problem.head_dim > MAX_HEAD_DIM:
        return f"takes head dims to {MAX_HEAD_DIM}, got {problem.head_dim}"
    if problem.num_rows > MAX_PROBE_ROWS:
        return f"probes with at most {MAX_PROBE_ROWS} rows, got {problem.num_rows}"
    return _why_unusable()


def probe(args: ProbeArgs, *, isa: str | None = None) -> Masses:
    """See `Backend.probe`. Deterministic, whatever the number of threads."""
    _load()
    lse, column, square, diagonal = empty_masses(args.q, args.num_coordinates)
    if args.lse is not None:
        lse.copy_(args.lse)
    order, skip = (None if x is None else x.contiguous() for x in (args.order, args.skip))
    torch.ops.permattn_native.cpu_probe.default(
        *(_rows(args.q), args.k, args.first_position.contiguous()),
        *(args.first_coordinate.contiguous(), args.key_range.contiguous(), order, skip),
        *(args.lse is not None, lse, column, square, diagonal.zero_(), _isa_number(isa)),
    )
    return lse, column, square, diagonal


def forward(args: FwdArgs, *, isa: str | None = None) -> tuple[Tensor, Tensor]:
    """See `Backend.forward`. `isa` forces one of `available_isas()`, for tests."""

    _load()
    q, k, v = args.q, args.k, args.v
    out = empty_out(q, v)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    tensors, ints = _plan(args.plan)
    op = torch.ops.permattn_native.cpu_forward.default
    op(q, k, v, out, lse, tensors, ints, args.scale, _isa_number(isa))
    return out, lse


def backward(args: BwdArgs, *, isa: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """See `Backend.backward`. Deterministic: every sum has one order. Products are in float32."""
    _load()
    q, k, v = args.q, args.k, args.v
    tensors, ints = _plan(args.plan)
    transposed = []
    for part in args.plan.parts:
        index = part.index.transpose(part.num_kv_blocks)
        transposed += [index.kv_indices, index.row_offsets, index.kv_num_full]
    dq, dk, dv = (x.new_zeros(x.shape, dtype=torch.float32) for x in (q, k, v))
    op = torch.ops.permattn_native.cpu_backward.default
    op(
        *(q, k, v, _rows(args.out), args.lse.contiguous(), _rows(args.dout)),
        *(args.dlse.contiguous(), dq, dk, dv),
        *(tensors, [_rows(x) for x in transposed], ints, args.scale, _isa_number(isa)),
    )
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def _plan(plan: AttnPlan) -> tuple[list[Tensor], list[int]]:

    tensors, ints = pack_plan(plan)
    return [_rows(x) for x in tensors], ints


def _rows(x: Tensor) -> Tensor:
    """x with a last stride of 1."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _isa_number(isa: str | None) -> int:
    return -1 if isa is None else ISAS.index(isa)
