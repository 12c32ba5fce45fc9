"""What the tokens of one forward pass are: visual grids, padding, and how much the cache holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from permattn.models.frames import AUDIO, IMAGE, TEXT, VIDEO, FrameRule, Rows
from permattn.models.splice import Splice


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """One prefill-like forward pass: `q_len` queries at the end of `q_offset + q_len` keys.

    Args:
        rows: segments per batch row, at absolute key positions; empty where modality is unknown.
        left_pad, right_pad: padding keys per batch row.
        q_offset: keys that were in the cache before this pass.
        q_len: queries of this pass.
        has_gaps: whether some row has padding between its tokens.
        dense_reason: why this pass cannot be sparse, whatever the layer; None = it can.
    """

    rows: Rows
    left_pad: tuple[int, ...]
    right_pad: tuple[int, ...]
    q_offset: int
    q_len: int
    has_gaps: bool = False
    dense_reason: str | None = None

    @property
    def kv_len(self) -> int:
        """Keys that exist once this pass has written its own."""
        return self.q_offset + self.q_len

    @property
    def is_padded(self) -> bool:
        """Whether any row has padding anywhere."""
        return self.has_gaps or any(self.left_pad) or any(self.right_pad)


@dataclass(frozen=True)
class Family:
    """What differs between model families; everything else is generic.

    Args:
        image_token, video_token, audio_token: placeholder ids in `input_ids`.
        frames: how the placeholders form grids; None = unknown: no token is in a grid.
        splice: the method of a model with code of its own that replaces placeholders.
        decoder: attribute of such a model that holds its language model; None = it is one itself.
        whole_layers: layers before the first one that drops tokens; None = none does.
    """

    image_token: int | None = None
    video_token: int | None = None
    audio_token: int | None = None
    frames: FrameRule | None = None
    splice: Splice | None = None
    decoder: str | None = None
    whole_layers: int | None = None

    @property
    def names_placeholders(self) -> bool:
        """Whether ids tell visual tokens from text."""
        return self.image_token is not None or self.video_token is not None

    def labels_of_ids(self, input_ids: Tensor) -> Tensor:
        """int64 [B, S] on the CPU: TEXT, IMAGE, VIDEO or AUDIO."""
        input_ids = input_ids.cpu()
        labels = torch.full(input_ids.shape, TEXT, dtype=torch.long)
        tokens = {IMAGE: self.image_token, VIDEO: self.video_token, AUDIO: self.audio_token}
        for kind, token in tokens.items():
            if token is not None:
                labels[input_ids == token] = kind
        return labels


def padding_of_mask(mask: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
    """Padding keys left and right of every row of a 2-D mask, and whether a row has gaps inside."""
    seen = mask.bool().cpu()
    n = seen.shape[1]
    left = seen.long().argmax(1)
    last = (seen * torch.arange(1, n + 1)).amax(1)
    right = n - last
    has_gaps = bool((seen.sum(1) != (last - left)).any())
    return tuple(left.tolist()), tuple(right.tolist()), has_gaps
