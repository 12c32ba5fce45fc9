"""Real images: random crops of photographs, whose middle is kept for validation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from permattn.cli.errors import UserError

# Photographs inside the scikit-image wheel (public domain or CC0); nothing is downloaded.
PHOTOS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "page.png",
    "retina.jpg",
    "rocket.jpg",
    "text.png",
)
# Crops and bands are measured in shares of the longer side, so photographs of all sizes are alike.
TRAIN_BANDS = ((0.0, 0.35), (0.65, 1.0))
VALIDATION_BAND = (0.375, 0.625)
CROP = (0.15, 0.24)
_LONGEST = 640
_VALIDATION_SEED = 20230315
_GREY = (0.299, 0.587, 0.114)


def load_photographs() -> list[Tensor]:
    """The photographs as uint8 [3, H, W], the longer side at most 640.

    Raises:
        UserError: scikit-image is missing, or its files are.
    """
    try:
        import skimage
    except ImportError as e:
        raise UserError(
            "training reads photographs of scikit-image, which is missing: "
            "pip install 'permattn[cli]'"
        ) from e
    # Not skimage.data.coffee() and the like: those may reach for the network.
    folder = Path(skimage.__file__).parent / "data"
    try:
        return [_read(folder / name) for name in PHOTOS]
    except OSError as e:
        raise UserError(f"scikit-image lacks a photograph ({e}); install another version") from e


def _read(path: Path) -> Tensor:
    image = Image.open(path).convert("RGB")
    scale = _LONGEST / max(image.size)
    if scale < 1.0:
        size = (round(image.width * scale), round(image.height * scale))
        image = image.resize(size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class Box:
    """A square window of a photograph, in its pixels."""

    top: int
    left: int
    side: int


@dataclass(frozen=True, eq=False)
class PhotoCrops:
    """Classification: which photograph is a crop from?

    Training crops lie in the outer bands of the longer axis, validation crops in the middle one; a
    gap parts them, so no pixel is in both.

    Args:
        photos: uint8 [3, H, W] each; their number is the class.
        size: pixels of a crop, given to the network.
    """

    photos: list[Tensor]
    size: int

    @property
    def num_classes(self) -> int:
        return len(self.photos)

    def batch(self, seed: int, step: int, count: int) -> tuple[Tensor, Tensor]:
        """Training crops [count, 3, size, size] in about [-2, 2], and labels int64 [count].

        Invariants: a function of its arguments alone, so training goes on after any end as if it
        had not ended.
        """
        draw = torch.Generator().manual_seed(1_000_003 * seed + step)
        labels = torch.randint(self.num_classes, (count,), generator=draw)
        crops = torch.stack([self._train_crop(int(label), draw) for label in labels])
        return _normalise(_jitter(crops, draw)), labels

    def validation(self, per_photo: int) -> tuple[Tensor, Tensor]:
        """Crops of the middle bands, the same ones for every seed and run, and their labels."""
        draw = torch.Generator().manual_seed(_VALIDATION_SEED)
        labels = torch.arange(self.num_classes).repeat_interleave(per_photo)
        crops = [
            self._cut(int(label), self.box(int(label), VALIDATION_BAND, draw)) for label in labels
        ]
        return _normalise(torch.stack(crops)), labels

    def validation_view(self, label: int, across: float) -> tuple[Tensor, Tensor]:
        """A crop of the middle band, for pictures.

        Args:
            label: the photograph.
            across: where, along the shorter side: 0 = its start, 1 = its end.

        Returns: (network input [3, size, size], the same as pixels uint8 [3, side, side]).
        """
        height, width = self.photos[label].shape[1:]
        side = int(CROP[1] * max(height, width))
        middle, shift = (max(height, width) - side) // 2, int(across * (min(height, width) - side))
        box = Box(shift, middle, side) if width >= height else Box(middle, shift, side)
        return _normalise(self._cut(label, box)), self._pixels(label, box)

    def box(self, label: int, band: tuple[float, float], draw: torch.Generator) -> Box:
        """A random window inside a band of a photograph."""
        height, width = self.photos[label].shape[1:]
        longest = max(height, width)
        share = _uniform(draw, *CROP)
        side = min(int(share * longest), height, width)
        # Whole pixels inside the band: its edges belong to no crop.
        low, high = math.ceil(band[0] * longest), math.floor(band[1] * longest)
        along = low + int(_uniform(draw, 0, high - low - side + 1))
        across = int(_uniform(draw, 0, min(height, width) - side + 1))
        return Box(across, along, side) if width >= height else Box(along, across, side)

    def _train_crop(self, label: int, draw: torch.Generator) -> Tensor:
        band = TRAIN_BANDS[int(torch.randint(len(TRAIN_BANDS), (), generator=draw))]
        crop = self._cut(label, self.box(label, band, draw))
        return crop.flip(-1) if _uniform(draw, 0, 1) < 0.5 else crop

    def _cut(self, label: int, box: Box) -> Tensor:
        pixels = self._pixels(label, box).float()[None] / 255
        scaled = F.interpolate(pixels, self.size, mode="bilinear", antialias=True)
        return scaled[0]

    def _pixels(self, label: int, box: Box) -> Tensor:
        rows = slice(box.top, box.top + box.side)
        return self.photos[label][:, rows, box.left : box.left + box.side]


def _uniform(draw: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=draw, dtype=torch.float64))


def _jitter(crops: Tensor, draw: torch.Generator) -> Tensor:
    """Random saturation (a fifth of all crops grey), contrast and brightness."""
    count = len(crops)
    saturation, contrast, brightness = (
        0.6 + 0.8 * torch.rand(count, 1, 1, 1, generator=draw) for _ in range(3)
    )
    saturation[torch.rand(count, generator=draw) < 0.2] = 0.0
    grey = (crops * torch.tensor(_GREY)[:, None, None]).sum(1, keepdim=True)
    crops = grey + saturation * (crops - grey)
    mean = grey.mean((2, 3), keepdim=True)
    return ((mean + contrast * (crops - mean)) * brightness).clamp(0, 1)


def _normalise(crops: Tensor) -> Tensor:
    return (crops - 0.45) / 0.25
