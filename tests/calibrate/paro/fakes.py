"""A model without a network: heads that aggregate locally, and runs over falling noise levels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from permattn.core import TokenGrid
from permattn.core.axis_order import AXIS_ORDERS
from torch import Tensor

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class FakeFacts:
    """As `permattn.models.diffusion.ModelFacts`."""

    num_layers: int = 2
    num_heads: int = 3
    head_dim: int = 32
    text: Any = "none"
    model_class: str = "FakeTransformer"
    scheduler: str = "FakeScheduler"
    fingerprint: str = "f"


@dataclass(frozen=True, eq=False)
class FakeCall:
    """As `permattn.models.diffusion.Observation`."""

    layer: int
    q: Tensor
    k: Tensor
    grid: TokenGrid
    num_tokens: int
    sigma: float
    num_steps: int | None
    text_visible: Tensor | None = None


def coordinates(grid: Grid) -> Tensor:
    """float32 [N, 3] in raster order."""
    axes = [torch.arange(size, dtype=torch.float32) for size in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)


def local_head(grid: Grid, widths: tuple[float, float, float], seed: int, dim: int = 64) -> Tensor:
    """q = k [N, dim] whose softmax falls like a bell over the distance, in widths per axis.

    Random Fourier features: the product of two codes is about exp(-d^2 / 2), so scores are PEAK
    times that, d being the distance measured in widths.
    """
    generator = torch.Generator().manual_seed(seed)
    frequency = torch.randn(3, dim // 2, generator=generator) / torch.tensor(widths)[:, None]
    angle = coordinates(grid) @ frequency
    code = torch.cat((angle.cos(), angle.sin()), -1) / (dim // 2) ** 0.5
    return code * (PEAK * dim**0.5) ** 0.5


PEAK = 14.0


def widths_of(grid: Grid, order: int) -> tuple[float, float, float]:
    """Narrow along the outer axis of an order, wide along the inner one."""
    outer, middle, inner = ("FHW".index(axis) for axis in AXIS_ORDERS[order])
    found = [0.0, 0.0, 0.0]
    found[outer], found[middle], found[inner] = 1.5, 3.0, 1e3
    return found[0], found[1], found[2]


@dataclass
class FakeModel:
    """Runs prompts over noise levels; more noise, less attention to place.

    Args:
        facts: sizes.
        grid: of the tokens.
        text: joint text tokens, before the grid.
        guided: two calls a step, cond and uncond.
        stop_at: raises KeyboardInterrupt at that call of a run.
    """

    facts: FakeFacts = FakeFacts()
    grid: Grid = (4, 8, 8)
    text: int = 0
    num_steps: int = 4
    guided: bool = False
    stop_at: int | None = None
    states_steps: bool = True

    def __post_init__(self) -> None:
        self.runs = 0

    def run(self, number: int, on_seen: Callable[[Any], None]) -> None:
        self.runs += 1
        calls = 0
        for step in range(self.num_steps):
            sigma = 1.0 - step / self.num_steps
            for guidance in range(1 + self.guided):
                for layer in range(self.facts.num_layers):
                    if calls == self.stop_at:
                        raise KeyboardInterrupt
                    calls += 1
                    q = self.rows(number, layer, sigma, guidance)
                    start, n = self.text, math.prod(self.grid)
                    on_seen(
                        FakeCall(
                            *(layer, q, q, TokenGrid(start, *self.grid), n + self.text, sigma),
                            self.num_steps if self.states_steps else None,
                        )
                    )

    def rows(self, number: int, layer: int, sigma: float, guidance: int) -> Tensor:
        """[1, H, S, D]; head h of layer l aggregates along order (h + 3 l) % 6."""
        generator = torch.Generator().manual_seed(1000 * number + 10 * layer + guidance)
        heads = []
        for head in range(self.facts.num_heads):
            order = (head + 3 * layer) % 6
            code = local_head(self.grid, widths_of(self.grid, order), 7, self.facts.head_dim)
            noise = 0.3 * sigma * torch.randn(code.shape, generator=generator)
            text = 0.5 * torch.randn(self.text, code.shape[1], generator=generator)
            heads.append(torch.cat((text, code + noise)))
        return torch.stack(heads)[None]
