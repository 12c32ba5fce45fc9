"""Layers and a model small enough to search in seconds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from permattn.calibrate import Sample
from permattn.calibrate.layer import Exact, LayerInput
from permattn.cli.demo.circuits import Grid, Sizes
from permattn.cli.demo.subject import Subject, constructed_subject
from permattn.cli.demo.video import Clip
from permattn.core import TokenGrid

SIZES = Sizes(
    mlp=128, layers=2, heads=4, kv_heads=2, vocab=256, vision_hidden=64, vision_depth=1, num_spots=2
)
GRID = Grid(24, 6, 10)


def planted_layer(frames: int = 12, gap: int = 0, seed: int = 0) -> LayerInput:
    """Four heads over a video of 8 x 16 tokens: local, sink, same place in every frame, spread."""
    torch.manual_seed(seed)
    size = 8 * 16
    starts = tuple(70 + i * (size + gap) for i in range(frames))
    n = starts[-1] + size + 74
    q, k, v = torch.randn(1, 4, n, 64), torch.randn(1, 2, n, 64), torch.randn(1, 2, n, 64)
    q, k = 0.3 * q, 0.3 * k
    where = torch.arange(n)
    # Head 0 and its key head: near tokens. Head 1: the first token.
    turn = where[:, None] * torch.logspace(-3.5, -0.5, 16)
    near = torch.cat((turn.cos(), turn.sin()), -1)
    q[0, 0, :, :32], k[0, 0, :, :32] = 3.0 * near, 3.0 * near
    q[0, 1, :, 63], k[0, 0, 0, 63] = 9.0, 9.0
    # Head 2: tokens a whole number of frames apart.
    turn = 2 * torch.pi * where[:, None] / (size + gap) * torch.arange(1, 17)
    place = torch.cat((turn.cos(), turn.sin()), -1)
    q[0, 2, :, :32], k[0, 1, :, :32] = 3.0 * place, 3.0 * place
    q[0, 3, :, :32] = 0.0
    return LayerInput(q, k, v, ((TokenGrid(starts[0], frames, 8, 16, starts),),))


@pytest.fixture(scope="session")
def layer() -> LayerInput:
    return planted_layer()


@pytest.fixture(scope="session")
def exact(layer: LayerInput) -> Exact:
    return Exact.of(layer)


def small_subject(model_type: str = "qwen2_5_vl", grid: Grid = GRID) -> Subject:
    """A constructed model at its smallest, and its prompt of about 1,500 tokens."""
    generator = np.random.default_rng(0)
    # Slowly changing noise: neighbouring frames look alike.
    frames = generator.integers(0, 256, (2 * grid.frames, grid.height * 28, grid.width * 28, 3))
    frames = ((frames + np.roll(frames, 1, 0)) // 2).astype(np.uint8)
    clip = Clip(frames, 0.5, "none", (grid.width * 28, grid.height * 28), len(frames))
    return constructed_subject(
        clip,
        grid,
        device=torch.device("cpu"),
        dtype=torch.float32,
        sizes=SIZES,
        model_type=model_type,
    )


@pytest.fixture(scope="session")
def make_subject() -> Callable[..., Subject]:
    """`small_subject`, for other classes and sizes."""
    return small_subject


@pytest.fixture(scope="session")
def subject() -> Subject:
    """The demo's constructed model at its smallest, and its prompt of about 1,500 tokens."""
    return small_subject()


@pytest.fixture(scope="session")
def sample(subject) -> Sample:
    return Sample(subject.inputs)
