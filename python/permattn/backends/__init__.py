"""Backends compete: each says why it cannot run a problem; a named one never falls back.

A backend is a module in this folder with `NAME`, `why_not`, `forward`, `backward`, `prepare`,
`why_not_probe` and `probe`. What a backend may offer beside has a protocol of its own: block
masses, attention from region to region. Modules import nothing heavy at the top: kernels are
imported inside functions.
"""

from __future__ import annotations

from typing import Protocol, cast

from torch import Tensor

from permattn.backends import cpu, cuda, reference, triton
from permattn.core.block_mass import BlockMassArgs, BlockMassProblem, Blocks
from permattn.core.prepare import PrepareArgs, Prepared
from permattn.core.probe import Masses, ProbeArgs, ProbeProblem
from permattn.core.problem import BwdArgs, FwdArgs, Problem
from permattn.core.regions import (
    RegionArgs,
    RegionBwdArgs,
    RegionGradients,
    RegionProblem,
    RouteArgs,
    RouteProblem,
)


class Backend(Protocol):
    """What every module of this folder offers."""

    NAME: str

    def why_not(self, problem: Problem) -> str | None:
        """None when the problem can be run; else one line that says what stands in the way."""

    def forward(self, args: FwdArgs) -> tuple[Tensor, Tensor]:
        """out [B, Hq, Sq, Dv] as `core.problem.empty_out` lays it out, and lse [B, Hq, Sq]."""

    def backward(self, args: BwdArgs) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv in the shapes and dtypes of q, k, v."""

    def prepare(self, args: PrepareArgs) -> Prepared:
        """Rows transformed, permuted and quantised; `core.quant.quantise` to the last bit."""

    def why_not_probe(self, problem: ProbeProblem) -> str | None:
        """As `why_not`, of a probe."""

    def probe(self, args: ProbeArgs) -> Masses:
        """lse, column, square and diagonal of `core.probe.ProbeMass`; nothing of size R x Skv."""


class BlockMassBackend(Protocol):
    """What a module of this folder may offer beside: a backend for calibration."""

    def why_not_block_mass(self, problem: BlockMassProblem) -> str | None:
        """As `Backend.why_not`, of a measurement."""

    def block_mass(self, args: BlockMassArgs) -> Blocks:
        """sums, maxima and small of `core.block_mass.BlockMass`; nothing of size Sq x Skv."""


class RegionBackend(Protocol):
    """What a module of this folder may offer beside: attention from region to region, routing."""

    def why_not_regions(self, problem: RegionProblem) -> str | None:
        """As `Backend.why_not`, of attention from region to region."""

    def attend_regions(self, args: RegionArgs) -> tuple[Tensor, Tensor]:
        """out as `core.regions.empty_region_out` lays it out, and lse [B, M, T, H, W]."""

    def attend_regions_backward(self, args: RegionBwdArgs) -> RegionGradients:
        """dq, dk, dv and dweights; regions that nobody looks at get zeros."""

    def why_not_route(self, problem: RouteProblem) -> str | None:
        """As `Backend.why_not`, of a routing."""

    def route(self, args: RouteArgs) -> tuple[Tensor, Tensor]:
        """graph int32 [B, Rq, topk] and its affinities float32 (float64) [B, Rq, topk]."""


AnyProblem = Problem | ProbeProblem | BlockMassProblem | RegionProblem | RouteProblem

BACKENDS: dict[str, Backend] = {m.NAME: m for m in (cuda, triton, cpu, reference)}
AUTO_ORDER: tuple[str, ...] = ("cuda", "triton", "cpu", "reference")


def reasons(problem: AnyProblem) -> dict[str, str | None]:
    """Why each backend cannot run the problem; None where it can."""
    return {name: _why_not(name, problem) for name in AUTO_ORDER}


def _why_not(name: str, problem: AnyProblem) -> str | None:
    if isinstance(problem, ProbeProblem):
        return BACKENDS[name].why_not_probe(problem)
    if isinstance(problem, BlockMassProblem):
        if not hasattr(BACKENDS[name], "why_not_block_mass"):
            return "does not measure block masses"
        return measures_blocks(name).why_not_block_mass(problem)
    if isinstance(problem, RegionProblem | RouteProblem):
        if not hasattr(BACKENDS[name], "why_not_regions"):
            return "does not attend from region to region"
        if isinstance(problem, RouteProblem):
            return attends_regions(name).why_not_route(problem)
        return attends_regions(name).why_not_regions(problem)
    return BACKENDS[name].why_not(problem)


def attends_regions(name: str) -> RegionBackend:
    """A backend that `resolve` named for a `RegionProblem` or a `RouteProblem`."""
    return cast(RegionBackend, BACKENDS[name])


def measures_blocks(name: str) -> BlockMassBackend:
    """A backend that `resolve` named for a `BlockMassProblem`."""
    return cast(BlockMassBackend, BACKENDS[name])


def resolve(problem: AnyProblem, backend: str) -> str:
    """The backend that will run.

    Args:
        backend: a name, which never falls back, or "auto": the first of AUTO_ORDER that can.

    Raises:
        ValueError: no backend of that name.
        NotImplementedError: the named one, or none at all, can run it; lists every reason.
    """
    if backend == "auto":
        for name in AUTO_ORDER:
            if _why_not(name, problem) is None:
                return name
        listed = "; ".join(f"{name}: {why}" for name, why in reasons(problem).items())
        raise NotImplementedError(f"no backend can run this problem. {listed}")
    if backend not in BACKENDS:
        raise ValueError(f"backend: wants one of {['auto', *AUTO_ORDER]}, got {backend!r}")
    why = _why_not(backend, problem)
    if why is not None:
        raise NotImplementedError(f"backend {backend!r} cannot run this problem: {why}")
    return backend
