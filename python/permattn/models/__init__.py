"""Adapters to model libraries, one model family per file. Nothing heavy loads before it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from permattn.models.config import PrefillConfig
    from permattn.models.handle import Handle, patch, unpatch

__all__ = ["Handle", "PrefillConfig", "patch", "unpatch"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        if name == "PrefillConfig":
            from permattn.models import config as module
        else:
            from permattn.models import handle as module  # type: ignore[no-redef]
    except ImportError as e:
        raise ImportError(
            f"permattn.{name} needs transformers >= 5.20 and pydantic >= 2.8 "
            f"(pip install 'permattn[transformers]'): {e}"
        ) from e
    return getattr(module, name)
