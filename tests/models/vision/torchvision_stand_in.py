"""timm without torchvision: the few names that timm's models import, while timm is imported.

timm asks for torchvision, whose wheels want one build of torch each, and uses it for images, which
no test here reads. The stand-in leaves `sys.modules` again, so that nothing else takes it for
torchvision: transformers looks for it to choose its image processors.
"""

from __future__ import annotations

import enum
import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

NAMES = (
    *("datasets", "models", "models.feature_extraction", "ops", "ops.misc"),
    *("transforms", "transforms.functional"),
)


class Absent(torch.nn.Module):
    """Any name of torchvision: a class that nothing is an instance of."""


class InterpolationMode(enum.Enum):
    """Keys of a table in timm."""

    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class StandIn(ModuleType):
    """A module that has every public name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return InterpolationMode if name == "InterpolationMode" else Absent


def import_timm() -> ModuleType:
    """timm, beside torchvision or a stand-in for it; skips the module's tests without timm."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("needs timm", allow_module_level=True)
    if importlib.util.find_spec("torchvision") is not None:
        return _imported()
    whole = {f"torchvision.{name}": StandIn(f"torchvision.{name}") for name in NAMES}
    whole["torchvision"] = StandIn("torchvision")
    for name, module in whole.items():
        module.__path__ = []
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(whole[parent], child, module)
    sys.modules.update(whole)
    try:
        return _imported()
    finally:
        for name in whole:
            del sys.modules[name]


def _imported() -> ModuleType:
    import timm
    import timm.data
    import timm.optim
    import timm.utils

    return timm
