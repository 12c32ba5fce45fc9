"""Model families, one file each.

A file names its `MODEL_TYPES` and makes a `Family` from a config. Adding a family is adding a file:
`family_of` finds it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from permattn.models.layout import Family


@lru_cache(maxsize=1)
def known_families() -> dict[str, Callable[[Any], Family]]:
    """`model_type` of a transformers config -> the function that makes its `Family`."""
    known: dict[str, Callable[[Any], Family]] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        known |= dict.fromkeys(module.MODEL_TYPES, module.family)
    return known


def family_of(config: Any) -> Family:
    """The family of a model's config; `Family()` if unknown: then every token counts as text."""
    make = known_families().get(config.model_type)
    return Family() if make is None else make(config)
