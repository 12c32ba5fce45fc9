"""Videos as latents and back, by a fixed linear map in place of a VAE: the low cosines of 8 x 8
pixel blocks, as JPEG has them. 16 channels, a factor of 8 in height and width, as in Wan."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from permattn.cli.demo.video import photographs

PIXELS, CHANNELS = 8, 16
# (row, column) frequencies that are kept of brightness, and of each of two colours.
_BRIGHTNESS = ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (1, 2), (2, 1), (0, 3), (3, 0))
_COLOUR = ((0, 0), (0, 1), (1, 0))
# Rows: brightness and two colour differences of RGB, orthonormal.
_TO_YCC = (
    torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]])
    / torch.tensor([[3.0], [2.0], [6.0]]).sqrt()
)
# Pixel values per unit of latent, for a block's mean brightness, its mean colour and all else: as
# in a trained VAE, no channel drowns the others.
_SCALE_MEAN, _SCALE_COLOUR, _SCALE_REST = 0.7, 0.4, 0.2
# Motion of the camera over the whole video, as a share of the frame.
_DRIFT, _ZOOM = 0.035, 0.04


def film(photo: int, frames: int, height: int, width: int) -> Tensor:
    """float32 [frames, height, width, 3] in [0, 1]: a slow pan and zoom over one photograph.

    Raises:
        UserError: scikit-image or its photographs are missing.
    """
    photos = photographs()
    image = Image.fromarray(photos[photo % len(photos)])
    full_w, full_h = image.size
    shots = []
    for i in range(frames):
        time = i / max(frames - 1, 1)
        window_w = min(full_w, full_h * width / height) * (0.9 - _ZOOM * time)
        window_h = window_w * height / width
        x = (full_w - window_w) / 2 + _DRIFT * full_w * (time - 0.5)
        y = (full_h - window_h) / 2 - 0.5 * _DRIFT * full_h * (time - 0.5)
        box = (x, y, x + window_w, y + window_h)
        box = (max(box[0], 0), max(box[1], 0), min(box[2], full_w), min(box[3], full_h))
        shot = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
        shots.append(np.asarray(shot, dtype=np.float32) / 255)
    return torch.from_numpy(np.stack(shots))


def encode(video: Tensor) -> Tensor:
    """float32 [1, 16, F, H / 8, W / 8] of a video [F, H, W, 3]."""
    ycc = torch.einsum("fhwc,yc->fyhw", video - 0.5, _TO_YCC)
    blocks = ycc.unflatten(3, (-1, PIXELS)).unflatten(2, (-1, PIXELS))
    return torch.einsum("fyhiwj,kyij->kfhw", blocks, _basis())[None] / _scale()


def decode(latents: Tensor) -> Tensor:
    """float32 [F, H, W, 3] in [0, 1]: the transpose of `encode`; what was cut off stays away."""
    blocks = torch.einsum("kfhw,kyij->fyhiwj", latents[0].float() * _scale(), _basis())
    ycc = blocks.flatten(4, 5).flatten(2, 3)
    return (torch.einsum("fyhw,yc->fhwc", ycc, _TO_YCC) + 0.5).clamp(0, 1)


def _basis() -> Tensor:
    """float32 [16, 3, 8, 8], scaled so that a block's mean keeps its size."""
    place = torch.arange(PIXELS, dtype=torch.float32) + 0.5
    waves = [torch.cos(math.pi * n * place / PIXELS) for n in range(4)]
    rows = []
    for colour, frequencies in enumerate((_BRIGHTNESS, _COLOUR, _COLOUR)):
        for row, column in frequencies:
            wave = torch.outer(waves[row], waves[column])
            out = torch.zeros(3, PIXELS, PIXELS)
            out[colour] = wave / wave.norm()
            rows.append(out)
    return torch.stack(rows)


def _scale() -> Tensor:
    """float32 [16, 1, 1, 1]."""
    scale = torch.full((CHANNELS, 1, 1, 1), _SCALE_REST)
    scale[0] = _SCALE_MEAN
    scale[len(_BRIGHTNESS) :: len(_COLOUR)] = _SCALE_COLOUR
    return scale
