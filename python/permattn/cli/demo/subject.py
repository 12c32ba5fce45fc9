"""What the demo runs: a model, its inputs, and which heads to draw."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from permattn.cli.demo.circuits import VIDEO_TOKEN
from permattn.cli.demo.coded import build_coded
from permattn.cli.demo.constructed import MODEL_TYPES, Grid, Sizes, build
from permattn.cli.demo.patches import TEMPORAL, patches_of
from permattn.cli.demo.towers import FAMILIES, square_grid
from permattn.cli.demo.video import Clip

TOKENS_PER_FRAME = 128
# Classes that can be constructed; the first is the demo's.
CONSTRUCTED = (*MODEL_TYPES, *FAMILIES)
# Kinds that the sheet shows, in this order, from layers that can read marks.
_SHEET_KINDS = ("place", "grid", "spots", "local", "sink", "place and grid")

CONSTRUCTED_NOTE = (
    "The weights are constructed, not trained: the model's text is meaningless. Its class, its "
    "sizes and its M-RoPE are real, and so are the attention patterns that they make."
)
CODED_NOTE = (
    "The weights are constructed, not trained: the model's text is meaningless. Its class, its "
    "sizes and its rotary embedding are real; heads find places by a code in the visual features."
)


@dataclass(frozen=True)
class SheetHead:
    """One head of the picture."""

    layer: int
    head: int
    label: str


@dataclass(frozen=True, eq=False)
class Subject:
    """A model ready for a prefill.

    Args:
        inputs: keyword arguments of its forward.
        visual_tokens: visual tokens in the prompt.
        sheet: heads to draw, or None to choose by density once plans are known.
        note: what the reader must know about the weights.
    """

    model: Any
    inputs: dict[str, Any]
    name: str
    visual_tokens: int
    sheet: tuple[SheetHead, ...] | None
    note: str


def choose_grid(tokens: int, frames: int | None, aspect: float) -> Grid:
    """Frames, height and width in tokens that hold at least `tokens` tokens.

    Args:
        frames: video frames to use; None = enough for about TOKENS_PER_FRAME tokens each.
        aspect: width / height of the video.
    """
    pairs = max(2, frames // TEMPORAL if frames else math.ceil(tokens / TOKENS_PER_FRAME))
    per_frame = max(4, math.ceil(tokens / pairs)) if frames else TOKENS_PER_FRAME
    height = max(2, round(math.sqrt(per_frame / aspect)))
    return Grid(pairs, height, max(2, math.ceil(per_frame / height)))


def grid_for(model_type: str, tokens: int, frames: int | None, aspect: float) -> Grid:
    """`choose_grid`, or a square one for a class that sees squares only."""
    if model_type in FAMILIES and FAMILIES[model_type].is_square:
        return square_grid(tokens, frames)
    return choose_grid(tokens, frames, aspect)


def pixels_of(model_type: str, frames: np.ndarray, patch: int) -> dict[str, Tensor]:
    """The inputs of a constructed class that depend on the video alone.

    Args:
        frames: uint8 [T, H, W, 3]; T even, H and W multiples of 2 * patch.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type].pixels(frames, patch)
    patches, thw = patches_of(frames, patch)
    return {"pixel_values_videos": patches, "video_grid_thw": thw}


def constructed_subject(
    clip: Clip,
    grid: Grid,
    *,
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sizes = Sizes(),
    model_type: str = "qwen2_5_vl",
) -> Subject:
    """The default model (or another of `CONSTRUCTED`) on a clip of `2 * grid.frames` frames."""
    few = np.linspace(0, len(clip.frames) - 1, 8).astype(int)
    sample = pixels_of(model_type, clip.frames[few], sizes.patch)
    pixels = pixels_of(model_type, clip.frames, sizes.patch)
    if model_type in FAMILIES:
        made = build_coded(model_type, grid, sample, sizes=sizes, dtype=dtype)
        more = FAMILIES[model_type].inputs_of_ids(made.input_ids)
    else:
        made = build(grid, *sample.values(), sizes=sizes, dtype=dtype, model_type=model_type)
        more = _qwen_inputs(made.input_ids, model_type)
    inputs = {"input_ids": made.input_ids} | more
    inputs |= {n: x.to(dtype) if x.is_floating_point() else x for n, x in pixels.items()}
    return Subject(
        made.model.to(device),
        {name: x.to(device) for name, x in inputs.items()},
        f"{type(made.model).__name__}, constructed weights",
        grid.num_tokens,
        _sheet(made.kinds),
        CODED_NOTE if model_type in FAMILIES else CONSTRUCTED_NOTE,
    )


def _qwen_inputs(ids: Tensor, model_type: str) -> dict[str, Tensor]:
    inputs = {
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": 2 * torch.eq(ids, VIDEO_TOKEN).int(),
    }
    if model_type == "qwen2_5_vl":
        inputs["second_per_grid_ts"] = torch.tensor([1.0])
    return inputs


def _sheet(kinds: tuple[tuple[str, ...], ...]) -> tuple[SheetHead, ...]:
    """One head of every kind that the sheet shows, from layers that can read marks."""
    sheet: list[SheetHead] = []
    for kind in _SHEET_KINDS:
        found = [(n, h) for n, row in enumerate(kinds) if n for h, k in enumerate(row) if k == kind]
        if found:
            # Not all from one layer.
            sheet.append(SheetHead(*found[len(sheet) % len(found)], kind))
    return tuple(sheet)


Reader = Callable[[Grid], Clip]
