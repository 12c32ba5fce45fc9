"""Backends compete: each says why it cannot run a problem; a named one never falls back.

A backend is a module in this folder with `NAME`, `why_not`, `forward`, `backward`, `prepare`,
`why_not_probe` and `probe`; one that can also measure block masses has `why_not_block_mass` and
`block_mass`. Modules import nothing heavy at the top: kernels are imported inside functions.
"""

from __future__ import annotations

from typing import Protocol, cast

from torch import Tensor

from permattn.backends import cpu, reference, triton
from permattn.core.block_mass import BlockMassArgs, BlockMassProblem, Blocks
from permattn.core.prepare import PrepareArgs, Prepared
from permattn.core.probe import Masses, ProbeArgs, ProbeProblem
from permattn.core.problem import BwdArgs, FwdArgs, Problem


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


AnyProblem = Problem | ProbeProblem | BlockMassProblem

BACKENDS: dict[str, Backend] = {m.NAME: m for m in (triton, cpu, reference)}
AUTO_ORDER: tuple[str, ...] = ("triton", "cpu", "reference")


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
    return BACKENDS[name].why_not(problem)


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
