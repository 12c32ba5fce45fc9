"""Makes the vision models known to timm and to transformers, by name."""

from __future__ import annotations

from importlib import import_module


def register_timm() -> None:
    """After this, `timm.create_model("permattn_biformer_tiny")` and its kin work.

    The same as importing `permattn.models.vision.timm_models`; a second call does nothing.

    Raises:
        ImportError: timm is not installed.
    """
    _register("permattn.models.vision.timm_models", "timm >= 1.0.20", "timm")


def register_transformers() -> None:
    """After this, transformers' Auto classes know the model type "permattn_biformer".

    The same as importing `permattn.models.vision.transformers_models`; a second call does nothing.

    Raises:
        ImportError: transformers is not installed.
    """
    _register("permattn.models.vision.transformers_models", "transformers >= 5.20", "transformers")


def _register(module: str, wants: str, extra: str) -> None:
    try:
        import_module(module)
    except ImportError as e:
        raise ImportError(f"needs {wants} (pip install 'permattn[{extra}]'): {e}") from e
