"""`apply_paro(pipe, plan)`: PAROAttention inside an unmodified diffusers pipeline."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from permattn.api import check_backend
from permattn.core import QuantSpec
from permattn.models.diffusion.applied import Applied, ApplyOptions, OnMismatch
from permattn.models.diffusion.facts import ModelFacts, describe
from permattn.models.diffusion.pipes import transformers_in
from permattn.models.diffusion.watch import Observation
from permattn.paro_file import load_paro
from permattn.patterns.paro import ParoPlan

PlanOrPath = ParoPlan | str | os.PathLike[str]


def apply_paro(
    pipe_or_transformer: Any,
    plan: PlanOrPath | Mapping[str, PlanOrPath],
    *,
    quant: QuantSpec | str | None = None,
    backend: str = "auto",
    dense_first_steps: int = 0,
    dense_layers: Iterable[int] = (),
    match_steps: bool = True,
    on_mismatch: OnMismatch = "raise",
) -> ParoHandle:
    """Makes the self-attention of a diffusers pipeline reordered and block-sparse, in place.

    Source: PAROAttention (arXiv 2506.16054). Every step and layer is sparse, as in the paper;
    `dense_first_steps` and `dense_layers` leave some dense.

    Args:
        pipe_or_transformer: a pipeline, or its transformer: Wan, CogVideoX, HunyuanVideo, FLUX.1,
            LTX-Video or Qwen-Image.
        plan: what `permattn.paro.calibrate` made, or the path of its file. For a pipeline with two
            transformers (Wan 2.2): {"transformer": plan, "transformer_2": plan}.
        quant: numerics, or a name such as "int8+int8" (`QuantSpec.named`); None = nothing is
            quantised.
        backend: see `permattn.sparse_attention`.
        dense_first_steps: that many steps of a run stay dense.
        dense_layers: layers that stay dense.
        match_steps: refuse another number of steps than the plan was calibrated for, where it is
            known; False = masks are chosen by noise level, whatever the number of steps.
        on_mismatch: "raise" = an error where the plan does not fit the model or a call; "dense" =
            one warning, and torch's own attention.

    Returns: the handle; also a context manager that restores the pipeline at its end.

    Raises:
        FileNotFoundError: a path that does not exist.
        TypeError: something else than a pipeline, a transformer or a plan.
        ValueError: an unsupported transformer or attention processor, a transformer that permattn
            is in already, a plan or an option that does not fit. Grid and number of steps are
            known at the first call, which raises then.
    """
    models, scheduler = transformers_in(pipe_or_transformer)
    plans = _plans_of(plan, tuple(models))
    if quant is None or isinstance(quant, str):
        quant = QuantSpec.named(quant or "none")
    layers = tuple(dense_layers)
    _check_options(quant, dense_first_steps, match_steps, on_mismatch)
    check_backend(backend)
    facts = {name: describe(pipe_or_transformer, component=name) for name in plans}
    for name, one in plans.items():
        quant.check_blocks(*one.block)
        _check_layers(layers, facts[name])
    options = ApplyOptions(
        quant, backend, dense_first_steps, frozenset(layers), match_steps, on_mismatch
    )
    applied: dict[str, Applied] = {}
    try:
        for name, one in plans.items():
            applied[name] = Applied(models[name], facts[name], one, options, scheduler)
    except Exception:
        for each in applied.values():
            each.remove()
        raise
    return ParoHandle(applied)


class ParoHandle:
    """A pipeline with sparse attention. Made by `apply_paro`."""

    def __init__(self, applied: dict[str, Applied]) -> None:
        self._applied = applied

    @property
    def plans(self) -> dict[str, ParoPlan]:
        """Plans by the name of their transformer."""
        return {name: each.plan for name, each in self._applied.items()}

    @property
    def plan(self) -> ParoPlan:
        """The plan, or the first of several."""
        return next(iter(self._applied.values())).plan

    @property
    def stats(self) -> dict[str, Any]:
        """Self-attention calls so far.

        Returns: {"sparse": n, "dense": {reason: n}}, all transformers together.
        """
        dense: dict[str, int] = {}
        for each in self._applied.values():
            for reason, calls in each.dense.items():
                dense[reason] = dense.get(reason, 0) + calls
        return {"sparse": sum(each.sparse for each in self._applied.values()), "dense": dense}

    @property
    def on_attention(self) -> Callable[[Observation], None] | None:
        """Set to a function to see every self-attention call right before it runs.

        It is not called under context parallelism, where a call holds a part of the tokens.
        """
        return next(iter(self._applied.values())).on_attention

    @on_attention.setter
    def on_attention(self, callback: Callable[[Observation], None] | None) -> None:
        for each in self._applied.values():
            each.on_attention = callback

    def remove(self) -> None:
        """Restores processors and hooks; keeps what diffusers changed meanwhile. Idempotent."""
        for each in self._applied.values():
            each.remove()

    def __enter__(self) -> ParoHandle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def _plans_of(
    plan: PlanOrPath | Mapping[str, PlanOrPath], components: tuple[str, ...]
) -> dict[str, ParoPlan]:
    if not isinstance(plan, Mapping):
        if len(components) > 1:
            wanted = ", ".join(f'"{name}": plan' for name in components)
            raise ValueError(
                f"plan: this pipeline has {len(components)} transformers; say which plan serves "
                f"which: {{{wanted}}}"
            )
        return {components[0]: _loaded(plan)}
    strangers = sorted(set(plan) - set(components))
    if strangers or not plan:
        raise ValueError(f"plan: wants names out of {list(components)}, got {list(plan)}")
    return {name: _loaded(one) for name, one in plan.items()}


def _loaded(plan: PlanOrPath) -> ParoPlan:
    if isinstance(plan, ParoPlan):
        return plan
    if not isinstance(plan, (str, os.PathLike)):
        raise TypeError(f"plan: wants a ParoPlan or a path, got {type(plan).__name__}")
    return load_paro(plan)


def _check_options(
    quant: QuantSpec, dense_first_steps: int, match_steps: bool, on_mismatch: str
) -> None:
    if not isinstance(quant, QuantSpec):
        raise TypeError(f"quant: wants a QuantSpec, a name or None, got {type(quant).__name__}")
    if isinstance(dense_first_steps, bool) or not isinstance(dense_first_steps, int):
        raise TypeError(f"dense_first_steps: wants an integer, got {dense_first_steps!r}")
    if dense_first_steps < 0:
        raise ValueError(f"dense_first_steps: wants >= 0, got {dense_first_steps}")
    if not isinstance(match_steps, bool):
        raise TypeError(f"match_steps: wants True or False, got {match_steps!r}")
    if on_mismatch not in ("raise", "dense"):
        raise ValueError(f"on_mismatch: wants 'raise' or 'dense', got {on_mismatch!r}")


def _check_layers(layers: tuple[int, ...], facts: ModelFacts) -> None:
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise TypeError(f"dense_layers: wants integers, got {layer!r}")
        if not 0 <= layer < facts.num_layers:
            raise ValueError(
                f"dense_layers: wants numbers from 0 to {facts.num_layers - 1}, got {layer}"
            )
