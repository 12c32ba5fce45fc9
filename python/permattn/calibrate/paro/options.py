"""What a PARO calibration measures, and how it turns that into masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from permattn.core.axis_order import AXIS_ORDERS

Metric = Literal["mass", "paper"]
Scope = Literal["model", "layer", "head", "coverage"]
Bins = Literal["half_shared", "per_step", "shared"] | int

METRICS: tuple[Metric, ...] = get_args(Metric)
SCOPES: tuple[Scope, ...] = get_args(Scope)
BIN_RULES = ("half_shared", "per_step", "shared")
MIN_BLOCK = 16


@dataclass(frozen=True, eq=False)
class MeasureOptions:
    """What is measured.

    Source: PAROAttention (arXiv 2506.16054), section 3.1. Unpublished there, and options here:
    alpha (0.5), how samples are averaged (terms are averaged over prompts, steps, cond and uncond
    before orders are compared), and the sign of the paper's sparse term, which rewards dense maps
    as printed and is mended ("paper" below).

    Args:
        density: share of blocks at which orders are compared.
        metric: how orders are compared. "mass": the attention mass lost at `density`, and the
            incoherence of blocks weighted by their mass. "paper": the share of blocks that are not
            sparse (at least `sparse_share` of their entries below eps), and the mean incoherence.
        alpha: weight of the first term; 1 - alpha that of the second.
        eps, sparse_share: of "paper"; the paper's examples. eps means another thing at every
            length, so it may need to scale with 1 / tokens.
        block: (block_q, block_kv), slots; calibration and kernel have the same blocks.
        sampled_steps: steps that are measured: their numbers, or how many, evenly spread. None:
            with "half_shared" every step of the first half and every fourth of the second, with
            "per_step" all, else 8.
        bins: which sampled steps share a mask. "half_shared": a bin per step of the first half and
            one for the second; "per_step"; "shared"; or a number of bins of alike many steps.
        order_steps: how many of the sampled steps orders are chosen from.
        order_stride: orders are compared on every so-manieth query block, of 16 blocks at least.
        orders: the candidates, numbers of `AXIS_ORDERS`; None = all that differ on the grid.
        native_cells: see `permattn.plan_paro`; makes the order of the tokens a candidate.
        seed: of the noise, where a prompt does not bring a generator or latents.
        backend: see `permattn.sparse_attention`.
    """

    density: float = 0.3
    metric: Metric = "mass"
    alpha: float = 0.5
    eps: float = 1e-3
    sparse_share: float = 0.9
    block: tuple[int, int] = (64, 64)
    sampled_steps: int | Sequence[int] | None = None
    bins: Bins = "half_shared"
    order_steps: int = 4
    order_stride: int = 8
    orders: tuple[int, ...] | None = None
    native_cells: Tensor | None = None
    seed: int = 0
    backend: str = "auto"

    def __post_init__(self) -> None:
        check_density(self.density)
        if self.metric not in METRICS:
            raise ValueError(f"metric: wants one of {METRICS}, got {self.metric!r}")
        _check_share("alpha", self.alpha)
        _check_share("sparse_share", self.sparse_share)
        if not 0.0 < self.eps < 1.0:
            raise ValueError(f"eps: wants a number between 0 and 1, got {self.eps}")
        check_block(self.block)
        _check_bins(self.bins)
        steps = self.sampled_steps
        if steps is not None:
            numbers = [steps] if isinstance(steps, int) else list(steps)
            least = 1 if isinstance(steps, int) else 0
            if not numbers or any(type(n) is not int or n < least for n in numbers):
                raise ValueError(f"sampled_steps: wants a count or numbers of steps, got {steps!r}")
        orders = self.orders
        if orders is not None and (not orders or not set(orders) <= set(range(len(AXIS_ORDERS)))):
            raise ValueError(
                f"orders: wants numbers below {len(AXIS_ORDERS)}, at least one, got {orders}"
            )
        for name in ("order_steps", "order_stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: wants at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class SelectOptions:
    """How sums become masks.

    Source: PAROAttention (arXiv 2506.16054), section 3.2. Unpublished there, and options here: the
    scope of the threshold, and when a head counts as empty. Density counts all vision blocks, those
    that rules force too: the diagonal, and the last row and column where the last block is not
    whole (the public code forces both always).

    Args:
        density: share of the vision blocks that masks keep; with "coverage" the most of any head.
        scope: what shares one threshold. "model": all heads, layers and bins; "layer": the heads
            of a layer in a bin; "head": one head in a bin; "coverage": every head keeps the fewest
            blocks that hold `coverage` of its vision mass.
        coverage: of scope "coverage".
        empty_below: heads whose vision queries put a smaller share of their mass on vision keys
            see text alone; 0.01 is a good number, 0 = none. Without joint text no head is empty.
        min_recall: a plan with a layer of a smaller mean recall is refused.
    """

    density: float = 0.3
    scope: Scope = "model"
    coverage: float = 0.95
    empty_below: float = 0.0
    min_recall: float = 0.0

    def __post_init__(self) -> None:
        check_density(self.density)
        if self.scope not in SCOPES:
            raise ValueError(f"scope: wants one of {SCOPES}, got {self.scope!r}")
        if not 0.0 < self.coverage <= 1.0:
            raise ValueError(f"coverage: wants a share in (0, 1], got {self.coverage}")
        _check_share("empty_below", self.empty_below)
        _check_share("min_recall", self.min_recall)


def check_density(density: float) -> None:
    """Raises ValueError unless 0 < density <= 1."""
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density: wants a share in (0, 1], got {density}")


def check_block(block: tuple[int, int]) -> None:
    """Raises ValueError for blocks that no kernel is fast on."""
    if len(block) != 2 or any(type(n) is not int or n < MIN_BLOCK for n in block):
        raise ValueError(f"block: wants two sizes of at least {MIN_BLOCK}, got {block}")


def _check_share(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: wants a share in [0, 1], got {value}")


def _check_bins(bins: Bins) -> None:
    known = bins in BIN_RULES if isinstance(bins, str) else type(bins) is int and bins >= 1
    if not known:
        raise ValueError(f"bins: wants one of {BIN_RULES} or a number >= 1, got {bins!r}")
