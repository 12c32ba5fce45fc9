"""Adapters to diffusers, one model family per file. Nothing heavy loads before it is used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from permattn.models.diffusion.facts import ModelFacts, describe
    from permattn.models.diffusion.handle import ParoHandle, apply_paro
    from permattn.models.diffusion.watch import Observation, observe

__all__ = ["ModelFacts", "Observation", "ParoHandle", "apply_paro", "describe", "observe"]

_HOMES = {
    "ModelFacts": "facts",
    "Observation": "watch",
    "ParoHandle": "handle",
    "apply_paro": "handle",
    "describe": "facts",
    "observe": "watch",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    except ImportError as e:
        raise ImportError(
            f"permattn.{name} needs diffusers 0.42 (pip install 'permattn[diffusers]'): {e}"
        ) from e
    return getattr(module, name)
