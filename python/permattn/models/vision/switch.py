"""Changes the backend of a network that is already there."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from permattn.models.vision.attention import BiLevelRoutingAttention
from permattn.models.vision.nchw import NchwBiLevelRoutingAttention

Module = TypeVar("Module", bound=nn.Module)


def set_backend(module: Module, backend: str) -> Module:
    """Sets the backend of every bi-level routing attention below a module, itself included.

    Args:
        module: changed in place.
        backend: see `BiLevelRoutingAttention`; "torch" makes a network of plain torch operators,
            which exporters (torch.export, ONNX) and tracers write out.

    Returns: module.

    Raises:
        ValueError: nothing there that has a backend.
    """
    found = [
        m
        for m in module.modules()
        if isinstance(m, BiLevelRoutingAttention | NchwBiLevelRoutingAttention)
    ]
    if not found:
        raise ValueError(f"module: {type(module).__name__} holds no bi-level routing attention")
    for m in found:
        m.backend = backend
    return module
