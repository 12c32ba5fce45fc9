"""Runs of the pipeline, dense and sparse, timed alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from permattn import apply_paro
from permattn.cli.demo_paro.latents import decode
from permattn.core import QuantSpec
from permattn.core.quant import PRECISIONS
from permattn.patterns.paro import ParoPlan

QUANTISED = {name: QuantSpec.named(name) for name in PRECISIONS}


@dataclass(frozen=True)
class Variant:
    """One way to run the model.

    Args:
        density: share of the blocks that is computed; None = torch's dense attention.
        precision: a name of QUANTISED, or the dtype of the model.
        ordered: heads read tokens in their own order; False = all in FHW.
    """

    density: float | None = None
    precision: str = ""
    ordered: bool = True

    @property
    def name(self) -> str:
        if self.density is None:
            return "dense"
        end = "" if self.ordered else ", not reordered"
        return f"{self.density:.0%} {self.precision}{end}"

    @property
    def quant(self) -> QuantSpec:
        return QUANTISED.get(self.precision, QuantSpec())


@dataclass(eq=False)
class Run:
    """What one run gave.

    Args:
        latents: at the end.
        attention_ms, step_ms: of every step. Attention: all self-attention of the model, from
            projected q, k, v to the input of the output projection, so norm and rotary embedding
            of q and k count, dense or sparse. Step: one call of the transformer.
        trail: latents at the start and after every step.
        stats: of the patched model.
    """

    variant: Variant
    latents: Tensor
    attention_ms: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    trail: list[Tensor] = field(default_factory=list)
    stats: dict[str, Any] = field(default_factory=dict)

    @property
    def frames(self) -> Tensor:
        """float32 [F, H, W, 3] in [0, 1]."""
        return decode(self.latents)

    @property
    def attention(self) -> float:
        return statistics.median(self.attention_ms)

    @property
    def step(self) -> float:
        return statistics.median(self.step_ms)


def run(
    pipe: Any,
    call: dict[str, Any],
    variant: Variant,
    plan: ParoPlan | None,
    *,
    backend: str = "auto",
    on_step: Callable[[], object] = lambda: None,
) -> Run:
    """Denoises once.

    Args:
        pipe, call: see `ConstructedWan`.
        variant: how.
        plan: for a sparse variant.
        backend: see `permattn.sparse_attention`.
        on_step: called after every step.
    """
    watch = _Stopwatch(pipe.transformer)
    trail: list[Tensor] = [call["latents"].float().cpu()]

    def after(_pipe: Any, _step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        trail.append(values["latents"].float().cpu())
        on_step()
        return {}

    patched: Any = nullcontext()
    if plan is not None:
        # The plan's calibration took fewer steps: bins are found by noise level.
        patched = apply_paro(pipe, plan, quant=variant.quant, backend=backend, match_steps=False)
    with patched as handle, watch.hooked(), torch.no_grad():
        latents = pipe(**call, callback_on_step_end=after).frames
        stats = {} if handle is None else dict(handle.stats)
    return Run(variant, latents.float().cpu(), watch.attention_ms, watch.step_ms, trail, stats)


class _Stopwatch:
    """Times self-attention and whole calls of a Wan transformer by hooks on its modules."""

    def __init__(self, transformer: Any) -> None:
        self._transformer = transformer
        self.attention_ms: list[float] = []
        self.step_ms: list[float] = []
        self._begin = self._projected = 0.0

    @contextmanager
    def hooked(self) -> Iterator[None]:
        model = self._transformer
        hooks = [
            model.register_forward_pre_hook(lambda *_: self._start_step()),
            model.register_forward_hook(lambda *_: self._end_step()),
        ]
        for block in model.blocks:
            attention = block.attn1
            for projection in (attention.to_q, attention.to_k, attention.to_v):
                hooks.append(projection.register_forward_hook(lambda *_: self._mark()))
            hooks.append(attention.to_out[0].register_forward_pre_hook(lambda *_: self._add()))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _now(self) -> float:
        if self._transformer.device.type == "cuda":
            torch.cuda.synchronize(self._transformer.device)
        return time.perf_counter()

    def _start_step(self) -> None:
        self.attention_ms.append(0.0)
        self._begin = self._now()

    def _end_step(self) -> None:
        self.step_ms.append(1000 * (self._now() - self._begin))

    def _mark(self) -> None:
        # The last of q, k and v starts the clock.
        self._projected = self._now()

    def _add(self) -> None:
        self.attention_ms[-1] += 1000 * (self._now() - self._projected)
