"""What permattn has to know of a family of diffusion transformers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor, nn

from permattn.patterns.paro import TextPlace

Inputs = Mapping[str, Any]
"""Arguments of a transformer's forward, by name."""
Size = tuple[int, int, int]
"""(frames, height, width), in tokens."""


class NotOneGrid(ValueError):
    """The vision tokens of a call are not one grid in raster order; says why."""


@dataclass(frozen=True)
class DiffusionFamily:
    """Where a transformer keeps its self-attention, and what its tokens are.

    Args:
        classes: names of transformer classes.
        processors: names of the attention processor classes that can be wrapped.
        blocks: attributes that list blocks; layers are numbered through all of them.
        attention: the attribute of a block that holds self-attention.
        grid: the grid of a call. Raises NotOneGrid.
        text: where text stands in self-attention; "none" = it takes no part.
        timesteps_per_sigma: what a timestep is divided by to give sigma: 1000 where models take
            timesteps, 1 where they take noise levels.
    """

    classes: tuple[str, ...]
    processors: tuple[str, ...]
    blocks: tuple[str, ...]
    attention: str
    grid: Callable[[Any, Inputs], Size]
    text: TextPlace = "none"
    timesteps_per_sigma: float = 1000.0

    def num_text_tokens(self, inputs: Inputs) -> int:
        """Text tokens of self-attention in a call."""
        text = inputs.get("encoder_hidden_states")
        return 0 if self.text == "none" or text is None else int(text.shape[1])

    def attention_modules(self, model: nn.Module) -> list[nn.Module]:
        """Self-attention of every layer, in order."""
        return [
            getattr(block, self.attention) for name in self.blocks for block in getattr(model, name)
        ]


def named_inputs(model: nn.Module, args: Sequence[Any], kwargs: Inputs) -> Inputs:
    """The arguments of a forward by name."""
    names = _forward_names(type(model).forward)
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def grid_of_latents(latents: Sequence[int], patch: Sequence[int]) -> Size:
    """Tokens of latents (frames, height, width) in patches; what does not fill one is cut off."""
    frames, height, width = (size // p for size, p in zip(latents, patch, strict=True))
    return frames, height, width


def version_of(x: Tensor) -> int:
    """Goes up when x is written to, which nobody counts for tensors made in inference mode."""
    return 0 if x.is_inference() else x._version


@cache
def _forward_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]
