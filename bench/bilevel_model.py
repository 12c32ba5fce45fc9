"""A whole BiFormer-T, with our attention and with the released gather in its place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from permattn.models.vision import attention as modules
from permattn.models.vision import biformer_tiny
from torch import Tensor

from bench.bilevel_baselines import Stage, gather
from bench.clock import Timing, measure

SIZE = 224


def model(
    timing: Timing,
    size: int = SIZE,
    batch: int = 8,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    **options: Any,
) -> dict[str, Any]:
    """Milliseconds of inference and of a training step, and the gain, in float32 and bf16.

    Raises:
        AssertionError: both attentions differ by more than rounding.
    """
    runs = []
    for dtype in dtypes:
        name = "fp32" if dtype == torch.float32 else "bf16 autocast"
        for train in (False, True):
            title = f"{'training step' if train else 'inference'}, batch {batch}, {name}"
            runs.append(_compare(title, batch, dtype, train, timing, size, options))
    return {"runs": runs}


def _compare(
    title: str,
    batch: int,
    dtype: torch.dtype,
    train: bool,
    timing: Timing,
    size: int,
    options: dict[str, Any],
) -> dict[str, Any]:
    torch.manual_seed(0)
    net = biformer_tiny(num_classes=10, **options).train(train)
    images = torch.randn(batch, 3, size, size)
    target = torch.arange(batch) % 10

    def infer() -> Tensor:
        with torch.no_grad():
            return net(images)

    def step() -> Tensor:
        net.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(images), target)
        loss.backward()
        return loss.detach()

    def call(with_gather: bool) -> Tensor:
        half = torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32)
        with released() if with_gather else contextlib.nullcontext(), half:
            return step() if train else infer()

    if dtype == torch.float32 and not train:
        # Half precision may route differently where two regions are nearly alike.
        torch.testing.assert_close(call(False), call(True), atol=1e-3, rtol=1e-3)
    calls: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: call(False),
        "gather": lambda: call(True),
    }
    ms = {name: s.median for name, s in measure(calls, timing).items()}
    return {"title": title, **ms, "gain": ms["gather"] / ms["ours"]}


@contextlib.contextmanager
def released() -> Iterator[None]:
    """While it lasts, modules route and attend as the released code does."""
    with (
        mock.patch.object(modules, "route_regions", _route),
        mock.patch.object(modules, "attend_routed", _attend),
    ):
        yield


def _route(
    q: Tensor, k: Tensor, *, region_size: tuple[int, int], topk: int, scale: float, **_: Any
) -> tuple[Tensor, Tensor]:
    def means(x: Tensor) -> Tensor:
        h, w = region_size
        x = x.detach().flatten(3).unflatten(2, (-1, w)).unflatten(1, (-1, h))
        return x.mean((2, 4)).flatten(1, 2)

    values, graph = (means(q) * scale @ means(k).transpose(-1, -2)).topk(topk, -1)
    return graph, values


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    graph: Tensor,
    *,
    region_size: tuple[int, int],
    scale: float,
    **_: Any,
) -> Tensor:
    batch, height, width, heads, dim = q.shape
    stage = Stage("", batch, height, heads, height // region_size[0], graph.shape[-1], dim, width)
    assert abs(stage.scale - scale) < 1e-9
    packed = torch.stack((q, k, v), 3).flatten(3)
    return gather(packed, graph, stage).unflatten(-1, (heads, dim))
