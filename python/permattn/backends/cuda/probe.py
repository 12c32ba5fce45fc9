"""The online probe by the CUDA C++ kernels."""

from __future__ import annotations

from dataclasses import replace

import torch

from permattn.backends.cuda import device
from permattn.backends.cuda.rows import aligned
from permattn.core.probe import Masses, ProbeArgs, ProbeProblem, empty_masses, probe_by_rows

# csrc/cuda/index/index.h: kMostProbeRows.
MAX_ROWS = 64
MAX_HEAD_DIM, HEAD_DIM_STEP = 256, 8


def why_not_probe(problem: ProbeProblem) -> str | None:
    if not device.takes(problem.device_type):
        return f"needs a CUDA device, got {problem.device_type}"
    if problem.dtype not in device.DTYPES:
        return f"probes in bfloat16 or float16, got {problem.dtype}"
    if problem.head_dim > MAX_HEAD_DIM or problem.head_dim % HEAD_DIM_STEP:
        return f"probes head dims that are multiples of 8 up to 256, got D = {problem.head_dim}"
    return device.why_not_here(problem.device_type)


def probe(args: ProbeArgs) -> Masses:
    """See `Backend.probe`. Two runs are bit-identical. No wait for the device."""
    device.need_kernels()
    return probe_by_rows(replace(args, q=aligned(args.q), k=aligned(args.k)), MAX_ROWS, _launch)


def _launch(args: ProbeArgs, all_rows: int) -> Masses:
    lse, column, square, diagonal = empty_masses(args.q, args.num_coordinates)
    if args.lse is not None:
        lse = args.lse
    torch.ops.permattn_native.cuda_probe.default(
        *(args.q, args.k, args.first_position, args.first_coordinate, args.key_range),
        *(args.order, args.skip, args.lse is not None, all_rows),
        *(lse, column, square, diagonal.zero_()),
    )
    return lse, column, square, diagonal
