"""Pipelines and the transformers in them."""

from __future__ import annotations

from typing import Any

from torch import nn

COMPONENTS = ("transformer", "transformer_2")


def transformers_in(pipe_or_transformer: Any) -> tuple[dict[str, nn.Module], Any]:
    """The transformers of a pipeline by name, and its scheduler (None for a bare transformer).

    Raises:
        TypeError: neither a pipeline with a transformer nor a module.
    """
    if isinstance(pipe_or_transformer, nn.Module):
        return {"transformer": _unwrapped(pipe_or_transformer)}, None
    found = {name: getattr(pipe_or_transformer, name, None) for name in COMPONENTS}
    there = {name: _unwrapped(m) for name, m in found.items() if isinstance(m, nn.Module)}
    if not there:
        raise TypeError(
            "pipe_or_transformer: wants a diffusers pipeline with a transformer, or a "
            f"transformer, got {type(pipe_or_transformer).__name__}"
        )
    return there, getattr(pipe_or_transformer, "scheduler", None)


def transformer_of(pipe_or_transformer: Any, component: str) -> tuple[nn.Module, Any]:
    """One transformer, and the pipeline's scheduler.

    Raises:
        TypeError: see `transformers_in`.
        ValueError: a pipeline without that component.
    """
    there, scheduler = transformers_in(pipe_or_transformer)
    if isinstance(pipe_or_transformer, nn.Module):
        component = "transformer"
    if component not in there:
        raise ValueError(f"component: wants one of {sorted(there)}, got {component!r}")
    return there[component], scheduler


def _unwrapped(model: nn.Module) -> nn.Module:
    """The transformer below torch.compile's wrapper."""
    while hasattr(model, "_orig_mod"):
        model = model._orig_mod  # type: ignore[assignment]
    return model
