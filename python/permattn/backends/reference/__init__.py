"""The judge: plain torch, tiled over query blocks, float32 or float64 inside. Any device."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from permattn.backends.reference.block_mass import block_mass
from permattn.backends.reference.plain import backward, forward_plain
from permattn.backends.reference.prepare import prepare
from permattn.backends.reference.probing import probe
from permattn.backends.reference.quantised import forward_quantised
from permattn.backends.reference.regions import (
    attend_regions,
    attend_regions_backward,
    route,
    why_not_regions,
    why_not_route,
)
from permattn.backends.reference.tiles import token_is_visible
from permattn.core.block_mass import BlockMassProblem
from permattn.core.probe import ProbeProblem
from permattn.core.problem import FwdArgs, Problem

__all__ = [
    "NAME",
    "attend_regions",
    "attend_regions_backward",
    "backward",
    "block_mass",
    "forward",
    "prepare",
    "probe",
    "route",
    "token_is_visible",
    "why_not",
    "why_not_block_mass",
    "why_not_probe",
    "why_not_regions",
    "why_not_route",
]

NAME = "reference"


def why_not(problem: Problem) -> str | None:
    if not problem.dtype.is_floating_point:
        return f"needs a floating dtype, got {problem.dtype}"
    if problem.quant.is_quantised and problem.needs_grad:
        return "quantised attention has no gradients"
    return None


def forward(args: FwdArgs) -> tuple[Tensor, Tensor]:
    if args.plan.quant.is_quantised:
        return forward_quantised(args)
    if args.prologue is None:
        return forward_plain(args)
    transforms = (args.prologue.q, args.prologue.k)
    q, k = (x if t is None else t(x) for x, t in zip((args.q, args.k), transforms, strict=True))
    out, lse = forward_plain(replace(args, q=q, k=k, v=args.v.to(q.dtype), prologue=None))
    return out.to(args.q.dtype), lse


def why_not_probe(problem: ProbeProblem) -> str | None:
    if not problem.dtype.is_floating_point:
        return f"needs a floating dtype, got {problem.dtype}"
    return None


def why_not_block_mass(problem: BlockMassProblem) -> str | None:
    if not problem.dtype.is_floating_point:
        return f"needs a floating dtype, got {problem.dtype}"
    return None
