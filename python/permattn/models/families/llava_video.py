"""LLaVA-Video and other LLaVA-NeXT code: `LlavaQwen` models splice video tokens in by themselves.

Their prompt holds one placeholder per video and reaches the decoder as embeddings. The method that
replaces placeholders is wrapped, and square frames are found from what it returns. Where that
cannot be, `rows_of_prompt` computes rows for `handle.layout(rows)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from torch import Tensor

from permattn.core import Segment
from permattn.models.frames import Rows, Size
from permattn.models.layout import Family
from permattn.models.splice import NEWLINES, Frames, LlavaSplice, newlines_of

MODEL_TYPES = ("llava_qwen", "llava_mistral")

# The id that LLaVA's tokenizer code writes for a video; it is no token of the vocabulary.
PLACEHOLDER = -200


def family(config: Any) -> Family:
    """What a config of these model types says about its tokens."""
    return Family(splice=LlavaSplice(newlines_of(config), placeholder=PLACEHOLDER))


def rows_of_prompt(
    prompts: Sequence[Tensor],
    videos: Iterable[Size],
    *,
    newline: Literal["grid", "frame", "one_token", "no_token"] = "grid",
    padding_side: Literal["left", "right"] = "right",
    placeholder: int = PLACEHOLDER,
) -> Rows:
    """Where the frames are once the videos have replaced their placeholders.

    Source: `prepare_inputs_labels_for_multimodal` of LLaVA-NeXT.

    Args:
        prompts: token ids of every batch row, 1-D, without padding.
        videos: (frames, height, width) in tokens after pooling, in order of appearance.
        newline: the model's `mm_newline_position`: a newline token after every row of a frame,
            after every frame, after the video, or none.
        padding_side: where shorter rows are padded (the model's `tokenizer_padding_side`).

    Returns: segments for `handle.layout`.

    Raises:
        ValueError: more or fewer videos than placeholders.
    """
    if newline not in NEWLINES:
        raise ValueError(f"newline: wants one of {list(NEWLINES)}, got {newline!r}")
    frames = NEWLINES[newline]
    sizes = iter(videos)
    rows: list[list[tuple[int, Size]]] = []
    lengths = []
    for prompt in prompts:
        row, position = [], 0
        for token in prompt.tolist():
            if token != placeholder:
                position += 1
                continue
            size = next(sizes, None)
            if size is None:
                raise ValueError("videos: fewer sizes than placeholders in the prompts")
            row.append((position, size))
            position += frames.length(*size)
        rows.append(row)
        lengths.append(position)
    if next(sizes, None) is not None:
        raise ValueError("videos: more sizes than placeholders in the prompts")
    longest = max(lengths, default=0)
    pads = [longest - n if padding_side == "left" else 0 for n in lengths]
    return tuple(tuple(_segments(pad, row, frames)) for row, pad in zip(rows, pads, strict=True))


def _segments(pad: int, row: Sequence[tuple[int, Size]], frames: Frames) -> Iterator[Segment]:
    for position, size in row:
        yield from frames.segments(pad + position, *size)
