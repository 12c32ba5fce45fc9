"""Decoded frames as vision towers want them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Values that the image processors of Qwen-VL normalise with.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_MERGE = 2
TEMPORAL = 2


def patches_of(frames: np.ndarray, patch: int) -> tuple[Tensor, Tensor]:
    """A video as Qwen2.5-VL's vision tower wants it.

    Args:
        frames: uint8 [T, H, W, 3]; T even, H and W multiples of 2 * patch.

    Returns: float32 [num_patches, 3 * 2 * patch * patch] and int64 [1, 3] sizes in patches.
    """
    t, h, w = frames.shape[0] // TEMPORAL, *(x // patch for x in frames.shape[1:3])
    x = _normalised(frames)
    x = x.view(t, TEMPORAL, h // _MERGE, _MERGE, patch, w // _MERGE, _MERGE, patch, 3)
    x = x.permute(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return x.reshape(t * h * w, -1), torch.tensor([[t, h, w]])


def every_other(frames: np.ndarray) -> Tensor:
    """float32 [T / 2, 3, H, W]: one frame of every two, for towers that see images."""
    return _normalised(frames[::TEMPORAL]).permute(0, 3, 1, 2).contiguous()


def _normalised(frames: np.ndarray) -> Tensor:
    x = torch.from_numpy(frames).float().div_(255.0).sub_(torch.tensor(_MEAN))
    return x.div_(torch.tensor(_STD))
