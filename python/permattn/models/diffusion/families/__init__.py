"""Families of diffusion transformers, one file each.

A file names its `FAMILY`. Adding a family is adding a file: `family_of` finds it.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import lru_cache

from torch import nn

from permattn.models.diffusion.family import DiffusionFamily


@lru_cache(maxsize=1)
def known_families() -> dict[str, DiffusionFamily]:
    """Class name of a transformer -> its family."""
    known: dict[str, DiffusionFamily] = {}
    for info in pkgutil.iter_modules(__path__):
        family = importlib.import_module(f"{__name__}.{info.name}").FAMILY
        known |= dict.fromkeys(family.classes, family)
    return known


def family_of(model: nn.Module) -> DiffusionFamily:
    """The family of a transformer, by its class or a class above it.

    Raises:
        ValueError: a class that no family names; lists those that are.
    """
    known = known_families()
    for base in type(model).__mro__:
        if base.__name__ in known:
            return known[base.__name__]
    raise ValueError(
        f"transformer: wants one of {', '.join(sorted(known))}, got {type(model).__name__}"
    )
