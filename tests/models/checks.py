"""Patched against unpatched: the comparisons that every test of this folder makes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from permattn.models import Handle, patch
from torch import Tensor

from .exact import plan_everything
from .tiny import Case

# float32, two layers, logits of order 0.1: rounding alone stays below 1e-6.
BOUND = 1e-5

GREEDY = {
    # A random model would emit placeholders, which transformers refuses, or end early.
    "suppress_tokens": [2, 3, 4, 5, 6, 7, 8, 9],
    "max_new_tokens": 5,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
}


@dataclass
class Recorder:
    """`plan_everything`, and what it was asked: (rows, Sq, Skv) per call."""

    calls: list[tuple] = field(default_factory=list)

    def __call__(self, q, k, rows, heads, **pads):
        self.calls.append((rows, q.shape[2], k.shape[2]))
        return plan_everything(q, k, rows, heads, **pads)

    @property
    def passes(self) -> list[tuple]:
        """Calls of the first layer: one per pass."""
        return self.calls[::2]


def patched(
    model: Any, recorder: Recorder | None = None, *, backend: str = "auto", **config: Any
) -> Handle:
    """Patched so that everything is kept and every prefill is sparse."""
    planner = recorder or Recorder()
    return patch(model, {"min_q_len": 2, **config}, backend=backend, planner=planner)


def generate(case: Case, **options: Any) -> Any:
    with torch.no_grad():
        return case.model.generate(**case.inputs, **{**GREEDY, **options})


def logits(case: Case, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return case.model(**{**case.inputs, **inputs}).logits


def assert_same_generation(got: Any, want: Any) -> None:
    assert torch.equal(got.sequences, want.sequences)
    assert len(got.logits) == len(want.logits)
    for a, b in zip(got.logits, want.logits, strict=True):
        assert (a - b).abs().max().item() <= BOUND


def assert_same_logits(case: Case, got: Tensor, want: Tensor) -> None:
    """Equal at every token that is not padding."""
    assert (got - want)[case.real].abs().max().item() <= BOUND
