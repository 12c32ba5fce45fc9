"""A model and one prompt per video, for commands that look at several."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from permattn.cli.demo import video
from permattn.cli.demo.constructed import Grid, Sizes
from permattn.cli.demo.subject import (
    CONSTRUCTED,
    Subject,
    constructed_subject,
    grid_for,
    pixels_of,
)
from permattn.cli.errors import UserError

OWN_VIDEO_ASPECT = 2.0
SIZES = Sizes()


@dataclass(frozen=True)
class PromptOptions:
    """What to run on.

    Args:
        model: a checkpoint, or "constructed:<model type>"; None = the demo's constructed model.
        videos: one prompt each; none = `samples` videos made from photographs.
        tokens: at least that many visual tokens per prompt.
        frames: video frames to read; None = from `tokens`.
    """

    model: str | None
    videos: tuple[Path, ...]
    samples: int
    tokens: int
    frames: int | None

    @property
    def constructed(self) -> str | None:
        """The model type to construct; None = a checkpoint."""
        if self.model is None:
            return CONSTRUCTED[0]
        prefix, colon, name = self.model.partition(":")
        return name if prefix == "constructed" and colon else None

    def check(self) -> None:
        """Raises UserError for files that are not there, and samples that no video is for."""
        if self.constructed is not None and self.constructed not in CONSTRUCTED:
            raise UserError(
                f"--model {self.model}: constructed are {', '.join(CONSTRUCTED)}, got "
                f"{self.constructed!r}"
            )
        for path in self.videos:
            if not path.is_file():
                raise UserError(f"--video {path}: no such file; give the path of a video")
        if self.videos and self.samples not in (1, len(self.videos)):
            raise UserError(
                f"--samples {self.samples}: wants one sample per --video, got "
                f"{len(self.videos)} videos"
            )


def progress_bar(remarks: Console) -> Progress:
    """The bar that every long command shows, on stderr."""
    return Progress(
        TextColumn("{task.description:34}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        console=remarks,
    )


def prepare(
    options: PromptOptions,
    progress: Progress,
    *,
    device: torch.device,
    dtype: torch.dtype,
    keep: Path | None = None,
) -> list[Subject]:
    """One model and its inputs, one subject per prompt; all share the model.

    Args:
        keep: a folder for videos that are made, and used again: encoders do not write the same
            file twice.

    Raises:
        UserError: a model or video that cannot be read, or a folder that cannot be used.
    """
    options.check()
    count = len(options.videos) or options.samples
    task = progress.add_task("reading videos and model", total=count)
    subjects: list[Subject] = []
    loaded: tuple[Any, Any] | None = None
    grid: Grid | None = None
    with _folder(keep) as folder:
        for i in range(count):
            source = _Source(options.videos, i, folder / f"made{i}.mp4")
            if options.model is None or options.constructed:
                # The model is built for one grid of tokens.
                before = subjects[0] if subjects else None
                subject, grid = _constructed(options, source, before, grid, device, dtype)
                subjects.append(subject)
            else:
                from permattn.cli.demo import checkpoint

                loaded = loaded or checkpoint.load(options.model, device=device, dtype=dtype)
                subject, _ = checkpoint.ask(
                    options.model,
                    *loaded,
                    source.read,
                    tokens=options.tokens,
                    frames=options.frames,
                    aspect=source.aspect,
                    device=device,
                    dtype=dtype,
                )
                subjects.append(subject)
            progress.advance(task)
    return subjects


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    try:
        keep.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--resume {keep}: cannot be made ({e.strerror}); name a folder") from e
    yield keep


class _Source:
    """The i-th video: a given file, or one made on demand."""

    def __init__(self, videos: Sequence[Path], number: int, own: Path) -> None:
        self._given = videos[number] if videos else None
        self._number, self._own = number, own
        self.aspect = OWN_VIDEO_ASPECT if self._given is None else video.aspect_of(self._given)

    def read(self, pixels: Grid) -> video.Clip:
        """A clip of two frames per grid frame; height and width in pixels."""
        size: dict[str, Any] = {
            "num_frames": 2 * pixels.frames,
            "width": pixels.width,
            "height": pixels.height,
        }
        if self._given is None and not self._own.is_file():
            video.encode(self._own, **size, first_photo=self._number)
        return video.decode(self._given or self._own, **size)


def _constructed(
    options: PromptOptions,
    source: _Source,
    before: Subject | None,
    grid: Grid | None,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Subject, Grid]:
    """The demo's model on its first video; on others the same model and prompt, new pixels."""
    name = options.constructed
    assert name is not None
    if grid is None:
        grid = grid_for(name, options.tokens, options.frames, source.aspect)
    side = 2 * SIZES.patch
    clip = source.read(Grid(grid.frames, grid.height * side, grid.width * side))
    if before is None:
        subject = constructed_subject(
            clip, grid, device=device, dtype=dtype, sizes=SIZES, model_type=name
        )
        return subject, grid
    pixels = {
        key: x.to(device, dtype) if x.is_floating_point() else x.to(device)
        for key, x in pixels_of(name, clip.frames, SIZES.patch).items()
    }
    return replace(before, inputs=before.inputs | pixels), grid
