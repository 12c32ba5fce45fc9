"""A real video file: encoded from photographs when none is given, decoded with PyAV."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from permattn.cli.errors import UserError

# Photographs inside the scikit-image wheel (public domain or CC0); nothing is downloaded.
PHOTOS = (
    "astronaut.png",
    "coffee.png",
    "rocket.jpg",
    "chelsea.png",
    "motorcycle_left.png",
    "hubble_deep_field.jpg",
)
CODECS = ("libx264", "mpeg4")
RATE = 24


@dataclass(frozen=True, eq=False)
class Clip:
    """Decoded frames.

    Args:
        frames: uint8 [num_frames, height, width, 3].
        seconds: what one frame stands for.
        codec, source_size, source_frames: of the file, for the report.
    """

    frames: np.ndarray
    seconds: float
    codec: str
    source_size: tuple[int, int]
    source_frames: int


def photographs() -> list[np.ndarray]:
    """The photographs as uint8 [H, W, 3].

    Raises:
        UserError: scikit-image is missing, or its files are.
    """
    try:
        import skimage
    except ImportError as e:
        raise UserError(
            "the demo's own video needs scikit-image: pip install 'permattn[cli]', or pass --video"
        ) from e
    # Not skimage.data.coffee() and the like: those may reach for the network.
    folder = Path(skimage.__file__).parent / "data"
    try:
        return [np.asarray(Image.open(folder / name).convert("RGB")) for name in PHOTOS]
    except OSError as e:
        raise UserError(f"scikit-image lacks a photograph ({e}); pass --video FILE instead") from e


def encode(
    path: Path,
    *,
    num_frames: int,
    width: int,
    height: int,
    first_photo: int = 0,
    on_frame: Callable[[], object] = lambda: None,
) -> None:
    """Writes a video of `photographs`: every shot pans and zooms, shots are cut hard.

    The file appears whole or not at all.

    Args:
        first_photo: which one it starts with, so that several videos differ.
    """
    photos = photographs()
    photos = photos[first_photo % len(photos) :] + photos[: first_photo % len(photos)]
    part = path.with_name(f".{path.name}.part")
    try:
        with av.open(str(part), "w", format="mp4") as container:
            stream: Any = container.add_stream(_codec(), rate=RATE)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.bit_rate = 4_000_000
            for image in _shots(photos, num_frames, width, height):
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                container.mux(stream.encode(frame))
                on_frame()
            container.mux(stream.encode())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def decode(
    path: Path,
    *,
    num_frames: int,
    width: int,
    height: int,
    on_frame: Callable[[], object] = lambda: None,
) -> Clip:
    """Reads `num_frames` frames, evenly spread over the file, scaled to width x height.

    A file with fewer frames is sampled with repeats.

    Raises:
        UserError: no such file, not a video, or nothing in it can be decoded.
    """
    if not path.is_file():
        raise UserError(f"--video {path}: no such file; give the path of a video")
    try:
        total, seconds, codec, size = _measure(path)
        wanted = np.linspace(0, total - 1, num_frames).round().astype(int)
        frames = np.empty((num_frames, height, width, 3), np.uint8)
        filled = 0
        with av.open(str(path)) as container:
            for i, frame in enumerate(container.decode(video=0)):
                if filled == num_frames:
                    break
                if wanted[filled] > i:
                    continue
                image = frame.to_ndarray(
                    format="rgb24", width=width, height=height, interpolation="AREA"
                )
                while filled < num_frames and wanted[filled] <= i:
                    frames[filled] = image
                    filled += 1
                    on_frame()
    except (av.error.FFmpegError, IndexError, ValueError, OSError) as e:
        raise _undecodable(path, e) from e
    if filled < num_frames:
        raise UserError(f"--video {path}: decoding stopped early; the file looks damaged")
    return Clip(frames, seconds / num_frames, codec, size, total)


def aspect_of(path: Path) -> float:
    """Width / height of the first video stream. Raises UserError when there is none."""
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            return stream.width / stream.height
    except (av.error.FFmpegError, IndexError, ZeroDivisionError, OSError) as e:
        raise _undecodable(path, e) from e


def _undecodable(path: Path, error: BaseException) -> UserError:
    return UserError(
        f"--video {path}: cannot be decoded ({error}); give a file that ffmpeg can play"
    )


def _measure(path: Path) -> tuple[int, float, str, tuple[int, int]]:
    """Frames (by decoding them: containers lie), seconds, codec and size of the first stream."""
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError("it has no video stream")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        codec, size = stream.codec_context.name, (stream.width, stream.height)
        rate = float(stream.average_rate or RATE)
        total = sum(1 for _ in container.decode(stream))
    if total == 0:
        raise ValueError("it has no frames")
    return total, total / rate, codec, size


def _codec() -> str:
    for name in CODECS:
        try:
            av.codec.Codec(name, "w")
        except av.codec.codec.UnknownCodecError:
            continue
        return name
    raise UserError(f"this PyAV has no encoder of {', '.join(CODECS)}; pass --video FILE")


def _shots(
    photos: list[np.ndarray], num_frames: int, width: int, height: int
) -> Iterator[np.ndarray]:
    """The frames: shot i shows photo i while the camera drifts and slowly zooms in."""
    per_shot = math.ceil(num_frames / len(photos))
    for n in range(num_frames):
        shot, step = divmod(n, per_shot)
        yield _crop(photos[shot], step / per_shot, 1.0 + 2.0 * shot, width, height)


def _crop(photo: np.ndarray, time: float, angle: float, width: int, height: int) -> np.ndarray:
    """A window of the photo at time 0..1, moving along `angle`, with the target's aspect ratio."""
    full_h, full_w = photo.shape[:2]
    aspect = width / height
    # The largest window that fits, then a little closer.
    window_w = min(full_w, full_h * aspect) * (0.85 - 0.15 * time)
    window_h = window_w / aspect
    x = (full_w - window_w) * (0.5 + 0.4 * math.cos(angle) * (2 * time - 1))
    y = (full_h - window_h) * (0.5 + 0.4 * math.sin(angle) * (2 * time - 1))
    box = (x, y, x + window_w, y + window_h)
    image = Image.fromarray(photo).resize((width, height), Image.Resampling.BILINEAR, box=box)
    return np.asarray(image)
