"""Calibration of a diffusers pipeline: runs it dense on one or two prompts."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from permattn.calibrate.paro.measure import Measurement, OnProgress, Seen, measure_runs
from permattn.calibrate.paro.options import MeasureOptions, SelectOptions
from permattn.patterns.paro import ParoPlan

Prompt = str | Mapping[str, Any]


def calibrate(
    pipe: Any,
    prompts: Sequence[Prompt],
    *,
    density: float = 0.3,
    measuring: MeasureOptions | None = None,
    selection: SelectOptions | None = None,
    component: str = "transformer",
    resume: Path | str | None = None,
    on_progress: OnProgress | None = None,
    **call_kwargs: Any,
) -> ParoPlan:
    """Finds the axis order and the block masks of every head of a diffusers pipeline.

    Source: PAROAttention (arXiv 2506.16054), section 3; see `MeasureOptions`, `SelectOptions` and
    docs/calibrate.md for what the paper leaves open. One or two prompts are enough.

    Args:
        pipe: a diffusers pipeline, or anything that is called like one.
        prompts: texts, or mappings of call arguments (`prompt_embeds`, `latents`, ...).
        density: share of the vision blocks that is computed; replaces that of the options.
        measuring, selection: everything else; None = the defaults.
        component: which transformer of a pipeline with several (Wan 2.2: "transformer_2").
        resume: a folder that keeps what is measured; the same call goes on there after any end.
        on_progress: called with a stage ("orders", "masks") and its share in [0, 1].
        call_kwargs: arguments of the pipeline (steps, height, width, frames, guidance).

    Returns: the plan, for `permattn.paro.save` and `permattn.apply_paro`.

    Raises:
        ValueError: options, prompts or a model that do not fit; a plan that keeps too little.
        ImportError: diffusers is missing.

    Invariants: two calls give the same plan. Memory grows with the square of the *blocks*.
    """
    selection = replace(selection or SelectOptions(), density=density)
    measuring = replace(measuring or MeasureOptions(), density=density)
    found = measure(
        *(pipe, prompts, measuring),
        component=component,
        resume=resume,
        on_progress=on_progress,
        **call_kwargs,
    )
    return found.plan(selection)


def measure(
    pipe: Any,
    prompts: Sequence[Prompt],
    options: MeasureOptions = MeasureOptions(),
    *,
    component: str = "transformer",
    resume: Path | str | None = None,
    on_progress: OnProgress | None = None,
    **call_kwargs: Any,
) -> Measurement:
    """The measuring part of `calibrate`: plans of several densities come from one measurement.

    Args and raises: see `calibrate`.
    """
    from permattn.models.diffusion import describe, observe

    calls = check_prompts(prompts, call_kwargs)

    def run(number: int, on_seen: Callable[[Seen], None]) -> None:
        with observe(pipe, on_seen, component=component), torch.no_grad():
            call_pipe(pipe, calls[number], options.seed + number)

    return measure_runs(
        run,
        len(calls),
        describe(pipe, component=component),
        options,
        resume=None if resume is None else Path(resume),
        identity={"component": component, "calls": [_facts(call) for call in calls]},
        on_progress=on_progress or (lambda stage, done: None),
    )


def check_prompts(
    prompts: Sequence[Prompt], call_kwargs: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The arguments of every call.

    Raises:
        ValueError: no prompts.
        TypeError: something else than texts and mappings.
    """
    if isinstance(prompts, (str, Mapping)):
        raise TypeError(f"prompts: wants a list, got a single {type(prompts).__name__}")
    calls = []
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, (str, Mapping)):
            raise TypeError(
                f"prompts[{i}]: wants a text or a mapping of call arguments, got "
                f"{type(prompt).__name__}"
            )
        own = {"prompt": prompt} if isinstance(prompt, str) else dict(prompt)
        calls.append({**call_kwargs, **own})
    if not calls:
        raise ValueError("prompts: wants at least one, got none")
    return calls


def call_pipe(pipe: Any, call: Mapping[str, Any], seed: int) -> Any:
    """Runs a pipeline, with noise that is the same every time, and without decoding."""
    known = inspect.signature(type(pipe).__call__).parameters
    own: dict[str, Any] = {}
    if "output_type" in known:
        own["output_type"] = "latent"
    if "generator" in known and call.get("latents") is None:
        own["generator"] = torch.Generator("cpu").manual_seed(seed)
    return pipe(**{**own, **call})


def _facts(value: Any) -> Any:
    """JSON values that tell arguments apart."""
    if isinstance(value, Tensor):
        # As bytes: numpy has no bfloat16.
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return [str(value.dtype), list(value.shape), hashlib.sha256(data).hexdigest()[:16]]
    if isinstance(value, Mapping):
        return {str(name): _facts(x) for name, x in sorted(value.items())}
    if isinstance(value, (list, tuple)):
        return [_facts(x) for x in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return type(value).__name__
