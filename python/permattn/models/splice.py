"""Models with code of their own that splice visual tokens into the prompt: where they put them.

Such a model turns one placeholder per video into many embeddings, in a method that a family names.
The hooks wrap that method and work out the segments from what went in and what came out; where that
is not certain they say nothing, and the prompt counts as text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from permattn.core import Segment, TokenRun
from permattn.models.frames import Rows, grid_of_frames


@dataclass(frozen=True)
class Frames:
    """How the embeddings of one video follow each other.

    Args:
        after_row, after_frame, after_video: newline embeddings behind every row, frame and video.
        newlines: what those outside a grid are: "vision" (an embedding of their own) or "text".
    """

    after_row: int = 0
    after_frame: int = 0
    after_video: int = 0
    newlines: Literal["vision", "text"] = "vision"

    def side_of(self, tokens: int, frames: int, videos: int) -> int | None:
        """Rows and columns of a square frame, if that many tokens can be that many frames."""
        per_frame, rest = divmod(tokens - videos * self.after_video, max(frames, 1))
        per_frame -= self.after_frame
        side = isqrt(max(per_frame, 0))
        if rest or side < 1 or side * (side + self.after_row) != per_frame:
            return None
        return side

    def length(self, frames: int, height: int, width: int) -> int:
        """Embeddings of one video."""
        per_frame = height * (width + self.after_row) + self.after_frame
        return frames * per_frame + self.after_video

    def segments(self, start: int, frames: int, height: int, width: int) -> list[Segment]:
        """The grid of a video at `start`, and the newlines outside it."""
        # A newline behind every row is a column like any other: lines of the grid keep their phase.
        width += self.after_row
        step = height * width + self.after_frame
        starts = [start + i * step for i in range(frames)]
        found: list[Segment] = [grid_of_frames(starts, height, width)]
        if self.newlines == "text":
            return found
        if self.after_frame:
            ends = (first + height * width for first in starts)
            found += [TokenRun(end, self.after_frame, "vision") for end in ends]
        if self.after_video:
            found.append(TokenRun(start + frames * step, self.after_video, "vision"))
        return sorted(found, key=lambda segment: segment.start)


# LLaVA-NeXT's `mm_newline_position`.
NEWLINES = {
    "grid": Frames(after_row=1),
    "frame": Frames(after_frame=1),
    "one_token": Frames(after_video=1),
    "no_token": Frames(),
}


def newlines_of(config: Any) -> Frames:
    """The newlines that LLaVA-NeXT code puts into a video, by its config."""
    merge = getattr(config, "mm_patch_merge_type", None) or "flat"
    if not merge.startswith("spatial"):
        return NEWLINES["no_token"]
    position = getattr(config, "mm_newline_position", None) or "one_token"
    if position == "one_token" and "unpad" not in merge:
        position = "no_token"
    return NEWLINES[position]


@dataclass(frozen=True)
class Prompt:
    """One batch row before its placeholders were replaced.

    Args:
        num_text: tokens that stay.
        places: how many of them stand before each placeholder.
        frames: frames of each placeholder's video.
        first, stop: where the row begins and ends in the padded sequence.
    """

    num_text: int
    places: tuple[int, ...]
    frames: tuple[int, ...]
    first: int
    stop: int

    @property
    def num_visual(self) -> int:
        """Embeddings that replaced the placeholders."""
        return self.stop - self.first - self.num_text


class Splice(Protocol):
    """The method of a model that replaces placeholders, and what its calls tell."""

    @property
    def method(self) -> str:
        """Its name."""

    def rows(
        self, model: Any, arguments: Mapping[str, Any], result: Any
    ) -> tuple[Rows, int] | None:
        """Segments per batch row of the padded sequence, and its length; None = not certain.

        Args:
            arguments: what the method was called with, by name.
            result: what it returned.
        """


def grid_rows(prompts: Sequence[Prompt], layout: Frames) -> Rows | None:
    """The videos as grids of square frames of one size; None where the lengths do not add up."""
    sides = {
        layout.side_of(prompt.num_visual, sum(prompt.frames), len(prompt.places))
        for prompt in prompts
        if prompt.places
    }
    side = sides.pop() if len(sides) == 1 else None
    if side is None:
        # No video at all is certain as well.
        empty = not any(prompt.places or prompt.num_visual for prompt in prompts)
        return ((),) * len(prompts) if empty else None
    rows = []
    for prompt in prompts:
        row: list[Segment] = []
        spliced = 0
        for place, frames in zip(prompt.places, prompt.frames, strict=True):
            row += layout.segments(prompt.first + place + spliced, frames, side, side)
            spliced += layout.length(frames, side, side)
        rows.append(tuple(row))
    return tuple(rows)


def run_rows(prompts: Sequence[Prompt]) -> Rows | None:
    """The videos as runs without a grid; None where several share a row: who has what is open."""
    if any(len(prompt.places) > 1 or prompt.num_visual < 0 for prompt in prompts):
        return None
    return tuple(
        tuple(
            TokenRun(prompt.first + place, prompt.num_visual, "vision") for place in prompt.places
        )
        for prompt in prompts
    )


def prompts_of(
    input_ids: Sequence[Tensor],
    placeholders: Sequence[int],
    frames: Iterator[int],
    *,
    mask_before: Tensor | None,
    mask_after: Tensor | None,
    length: int,
) -> list[Prompt] | None:
    """Rows of token ids beside the sequence they became; None where that is not certain.

    Args:
        input_ids: 1-D ids per batch row.
        placeholders: the ids that were replaced.
        frames: frames of every video, in order of appearance.
        mask_before: which ids are no padding; None = all.
        mask_after: the same for the spliced sequence; None = all, of a single row.
        length: of the spliced sequence.
    """
    if mask_after is None and len(input_ids) > 1:
        return None
    prompts = []
    for i, ids in enumerate(input_ids):
        real = ids if mask_before is None else ids[mask_before[i].bool()]
        is_place = torch.isin(real.cpu(), torch.tensor(list(placeholders)))
        places = is_place.nonzero().flatten().tolist()
        counts = [next(frames, 0) for _ in places]
        first, stop = 0, length
        if mask_after is not None:
            seen = mask_after[i].bool().nonzero().flatten()
            if not len(seen):
                return None
            first, stop = int(seen[0]), int(seen[-1]) + 1
        before = tuple(place - k for k, place in enumerate(places))
        prompts.append(Prompt(len(real) - len(places), before, tuple(counts), first, stop))
    return prompts


@dataclass(frozen=True)
class LlavaSplice:
    """`prepare_inputs_labels_for_multimodal` of LLaVA-NeXT and of models written after it.

    Source: LLaVA-NeXT, `llava/model/llava_arch.py`. Deviation: prompts with single images, whose
    tiles follow rules of their own, and `add_faster_video` are left uncertain.

    Args:
        frames: newlines of the videos; None = no grid is known (tokens were merged).
        placeholder: the id that was replaced.
    """

    frames: Frames | None
    placeholder: int = -200
    method: str = "prepare_inputs_labels_for_multimodal"

    def rows(
        self, model: Any, arguments: Mapping[str, Any], result: Any
    ) -> tuple[Rows, int] | None:
        """See `Splice.rows`."""
        ids, images = arguments.get("input_ids"), arguments.get("images")
        if not isinstance(result, (tuple, list)) or len(result) < 5 or ids is None:
            return None
        mask, embeds = result[2], result[4]
        if not isinstance(embeds, Tensor) or images is None:
            return None
        kinds = arguments.get("modalities") or ()
        if any(kind != "video" for kind in kinds) or any(video.ndim != 4 for video in images):
            return None
        if getattr(model.config, "add_faster_video", False):
            return None
        prompts = prompts_of(
            ids,
            (self.placeholder,),
            (video.shape[0] for video in images),
            mask_before=arguments.get("attention_mask"),
            mask_after=mask,
            length=embeds.shape[1],
        )
        if prompts is None:
            return None
        rows = run_rows(prompts) if self.frames is None else grid_rows(prompts, self.frames)
        return None if rows is None else (rows, embeds.shape[1])


@dataclass(frozen=True)
class VilaSplice:
    """`_embed` of VILA, LongVILA and NVILA, whose `llm` is the decoder.

    Source: VILA, `llava/model/llava_arch.py`: every frame of a video ends with a newline, and so
    does an image, which has as many tokens as a frame. Deviation: encoders that pool over time or
    cut images into tiles are left uncertain.
    """

    frames: Frames = Frames(after_frame=1, newlines="text")
    method: str = "_embed"

    def rows(
        self, model: Any, arguments: Mapping[str, Any], result: Any
    ) -> tuple[Rows, int] | None:
        """See `Splice.rows`."""
        tokens = getattr(getattr(model, "tokenizer", None), "media_token_ids", None)
        ids, media = arguments.get("input_ids"), arguments.get("media") or {}
        if not tokens or ids is None or not isinstance(result, (tuple, list)) or len(result) < 3:
            return None
        embeds, mask = result[0], result[2]
        counts = {
            token: iter([item.shape[0] if item.ndim == 4 else 1 for item in media.get(name, ())])
            for name, token in tokens.items()
        }
        before = arguments.get("attention_mask")
        prompts = prompts_of(
            ids,
            tuple(counts),
            _in_order(ids, before, counts),
            mask_before=before,
            mask_after=mask,
            length=embeds.shape[1],
        )
        rows = None if prompts is None else grid_rows(prompts, self.frames)
        return None if rows is None else (rows, embeds.shape[1])


def _in_order(
    input_ids: Sequence[Tensor], mask: Tensor | None, counts: Mapping[int, Iterator[int]]
) -> Iterator[int]:
    """The frames of every medium in the order in which the placeholders of all kinds stand."""
    for i, ids in enumerate(input_ids):
        real = ids if mask is None else ids[mask[i].bool()]
        for token in real.tolist():
            if token in counts:
                yield next(counts[token], 0)
