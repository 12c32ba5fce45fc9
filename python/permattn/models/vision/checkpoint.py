"""Released weights: read from a local file, checked name by name, loaded whole or not at all."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)

# Names in the legacy class and in its channels-first twin.
_TWINS = (("qkv.qkv", "qkv_linear"), ("wo", "output_linear"))
# Names that an error lists before it says how many more there are.
_LISTED = 8


def load_biformer(source: str | os.PathLike[str] | Mapping[str, Any], model: Model) -> Model:
    """Loads weights into a model: every name and every shape must fit, or nothing is loaded.

    Args:
        source: a .pth (read with weights_only) or .safetensors file, or what such a file holds: a
            state dict, alone or as "model" beside other things of a training run.
        model: any module, for instance a `BiFormer`; changed in place.

    Returns: model.

    Raises:
        ValueError: names that are missing, that the model does not know, or whose shapes differ,
            all of them in one message; a source that holds no state dict.
        FileNotFoundError: no file there.
    """
    state = _state_dict(source)
    own = model.state_dict()
    faults = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "of another shape": [
            f"{name} ({list(state[name].shape)}, wants {list(own[name].shape)})"
            for name in own
            if name in state and state[name].shape != own[name].shape
        ],
    }
    if any(faults.values()):
        told = "; ".join(f"{what}: {listed_names(x)}" for what, x in faults.items() if x)
        raise ValueError(f"checkpoint: does not fit {type(model).__name__}. {told}")
    model.load_state_dict(state)
    return model


def nchw_from_legacy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a `BiLevelRoutingAttention` for a `NchwBiLevelRoutingAttention`.

    Names and shapes of the two linear layers change ([out, in] -> [out, in, 1, 1]), wherever they
    stand in a larger state dict; everything else is kept.

    Raises:
        ValueError: a projection with qk_dim other than dim, which the twin does not have.
    """
    new = {}
    for name, x in state.items():
        target = _renamed(name, forth=True)
        if target != name and name.endswith("qkv.qkv.weight") and x.shape[0] != 3 * x.shape[1]:
            raise ValueError(
                f"{name}: wants [3 * dim, dim] (qk_dim = dim), got shape {list(x.shape)}"
            )
        new[target] = x[:, :, None, None] if target != name and x.dim() == 2 else x
    return new


def legacy_from_nchw(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `nchw_from_legacy`."""
    new = {}
    for name, x in state.items():
        target = _renamed(name, forth=False)
        new[target] = x[:, :, 0, 0] if target != name and x.dim() == 4 else x
    return new


def _renamed(name: str, forth: bool) -> str:
    for legacy, nchw in _TWINS:
        old, new = (legacy, nchw) if forth else (nchw, legacy)
        for leaf in ("weight", "bias"):
            if name == f"{old}.{leaf}" or name.endswith(f".{old}.{leaf}"):
                return name.removesuffix(f"{old}.{leaf}") + f"{new}.{leaf}"
    return name


def _state_dict(source: str | os.PathLike[str] | Mapping[str, Any]) -> Mapping[str, Tensor]:
    if not isinstance(source, Mapping):
        source = _read(Path(source))
    state = source.get("model", source)
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"checkpoint: wants a state dict, got {type(state).__name__}")
    for name, x in state.items():
        if not isinstance(name, str) or not isinstance(x, Tensor):
            raise ValueError(
                f"checkpoint: wants tensors by name, got {type(x).__name__} at {name!r}"
            )
    return state


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: no file {path}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    # Training scripts keep their parsed command line beside the weights.
    with torch.serialization.safe_globals([argparse.Namespace]):
        held = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(held, Mapping):
        raise ValueError(f"checkpoint: wants a state dict, {path} holds {type(held).__name__}")
    return held


def listed_names(names: list[str]) -> str:
    """The first names, for an error message, and how many more there are."""
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")
