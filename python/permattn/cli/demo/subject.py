"""What the demo runs: a model, its inputs, and which heads to draw."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from permattn.cli.demo.constructed import Grid, Sizes, build
from permattn.cli.demo.video import Clip

TOKENS_PER_FRAME = 128
# Values that Qwen-VL's image processor normalises with.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_MERGE = 2
_TEMPORAL = 2
# Kinds that the sheet shows, in this order, from layers that can read marks.
_SHEET_KINDS = ("place", "grid", "spots", "local", "sink", "place and grid")

CONSTRUCTED_NOTE = (
    "The weights are constructed, not trained: the model's text is meaningless. Its class, its "
    "sizes and its M-RoPE are real, and so are the attention patterns that they make."
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
    pairs = max(2, frames // _TEMPORAL if frames else math.ceil(tokens / TOKENS_PER_FRAME))
    per_frame = max(4, math.ceil(tokens / pairs)) if frames else TOKENS_PER_FRAME
    height = max(2, round(math.sqrt(per_frame / aspect)))
    return Grid(pairs, height, max(2, math.ceil(per_frame / height)))


def patches_of(frames: np.ndarray, patch: int) -> tuple[Tensor, Tensor]:
    """A video as Qwen2.5-VL's vision tower wants it.

    Args:
        frames: uint8 [T, H, W, 3]; T even, H and W multiples of 2 * patch.

    Returns: float32 [num_patches, 3 * 2 * patch * patch] and int64 [1, 3] sizes in patches.
    """
    t, h, w = frames.shape[0] // _TEMPORAL, *(x // patch for x in frames.shape[1:3])
    x = torch.from_numpy(frames).float().div_(255.0).sub_(torch.tensor(_MEAN))
    x = x.div_(torch.tensor(_STD))
    x = x.view(t, _TEMPORAL, h // _MERGE, _MERGE, patch, w // _MERGE, _MERGE, patch, 3)
    x = x.permute(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return x.reshape(t * h * w, -1), torch.tensor([[t, h, w]])


def constructed_subject(
    clip: Clip,
    grid: Grid,
    *,
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sizes = Sizes(),
    model_type: str = "qwen2_5_vl",
) -> Subject:
    """The default model (or another class, see `build`) on a clip of `2 * grid.frames` frames."""
    pixels, thw = patches_of(clip.frames, sizes.patch)
    few = np.linspace(0, len(clip.frames) - 1, 8).astype(int)
    made = build(
        grid,
        *patches_of(clip.frames[few], sizes.patch),
        sizes=sizes,
        dtype=dtype,
        model_type=model_type,
    )
    ids = made.input_ids
    is_video: Tensor = torch.eq(ids, made.model.config.video_token_id)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": 2 * is_video.int(),
        "pixel_values_videos": pixels.to(dtype),
        "video_grid_thw": thw,
    }
    if model_type == "qwen2_5_vl":
        inputs["second_per_grid_ts"] = torch.tensor([1.0])
    sheet: list[SheetHead] = []
    for kind in _SHEET_KINDS:
        where = (
            (n, h) for n, row in enumerate(made.kinds) if n for h, k in enumerate(row) if k == kind
        )
        found = list(where)
        if found:
            # Not all from one layer.
            sheet.append(SheetHead(*found[len(sheet) % len(found)], kind))
    return Subject(
        made.model.to(device),
        {name: x.to(device) for name, x in inputs.items()},
        f"{type(made.model).__name__}, constructed weights",
        int(is_video.sum()),
        tuple(sheet),
        CONSTRUCTED_NOTE,
    )


Reader = Callable[[Grid], Clip]
