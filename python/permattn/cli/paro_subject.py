"""The diffusion pipeline that PARO commands run on: a checkpoint, or a constructed one."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from permattn.calibrate.paro.pipelines import Prompt
from permattn.cli.errors import UserError, one_line

CONSTRUCTED = "constructed"
# Pixels of a token's side in the constructed model, and its steps.
_PIXELS, _STEPS = 16, 5
# The demo denoises photograph 0; calibration must not see it.
_FIRST_PHOTO = 2


@dataclass(frozen=True)
class PipeOptions:
    """What to run on.

    Args:
        model: a folder or hub id of a diffusers pipeline; "constructed" or None = constructed
            weights.
        prompts: texts; the constructed model takes none.
        samples: runs of the constructed model, each on another video.
        steps, height, width, frames: of a run, pixels and video frames; None = the pipeline's.
    """

    model: str | None
    prompts: tuple[str, ...] = ()
    samples: int = 1
    steps: int | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None

    @property
    def is_constructed(self) -> bool:
        return self.model in (None, CONSTRUCTED)

    def check(self) -> None:
        """Raises UserError for options that do not fit each other."""
        if self.is_constructed and self.prompts:
            raise UserError("--prompt: the constructed model takes no text; name a --model")
        if not self.is_constructed and not self.prompts:
            raise UserError("--prompt: wants at least one text for --model, got none")
        if not self.is_constructed and self.samples != 1:
            raise UserError("--samples: counts videos of the constructed model; repeat --prompt")
        for name in ("height", "width"):
            value = getattr(self, name)
            if self.is_constructed and value is not None and value % _PIXELS:
                raise UserError(f"--{name}: wants a multiple of {_PIXELS}, got {value}")


@dataclass(frozen=True, eq=False)
class PipeSubject:
    """A pipeline and what to call it with.

    Args:
        pipe: the pipeline.
        prompts: one per run.
        call: arguments of every run.
        note: what it is, in a sentence.
    """

    pipe: Any
    prompts: list[Prompt]
    call: dict[str, Any]
    note: str


def load_pipe(options: PipeOptions, *, device: torch.device, dtype: torch.dtype) -> PipeSubject:
    """Loads or builds the pipeline.

    Raises:
        UserError: a missing library, a checkpoint that does not load, or an argument that its
            pipeline does not take.
    """
    options.check()
    if options.is_constructed:
        return _constructed(options, device, dtype)
    try:
        from diffusers import DiffusionPipeline
    except ImportError as e:
        raise UserError(f"diffusers is missing ({e}): pip install 'permattn[diffusers]'") from e
    try:
        pipe = DiffusionPipeline.from_pretrained(options.model, dtype=dtype).to(device)
    except (OSError, ValueError, AttributeError, ImportError) as e:
        raise UserError(f"--model {options.model}: does not load ({one_line(e)})") from e
    call: dict[str, Any] = {
        "num_inference_steps": options.steps,
        "height": options.height,
        "width": options.width,
        "num_frames": options.frames,
    }
    call = {name: value for name, value in call.items() if value is not None}
    known = inspect.signature(type(pipe).__call__).parameters
    for name in call:
        if name not in known:
            raise UserError(f"--model {options.model}: {type(pipe).__name__} takes no {name}")
    pipe.set_progress_bar_config(disable=True)
    return PipeSubject(pipe, list(options.prompts), call, f"{options.model}")


def _constructed(options: PipeOptions, device: torch.device, dtype: torch.dtype) -> PipeSubject:
    from permattn.cli.demo_paro.pipeline import GRID, build_demo_pipeline

    grid = (
        options.frames or GRID[0],
        (options.height or GRID[1] * _PIXELS) // _PIXELS,
        (options.width or GRID[2] * _PIXELS) // _PIXELS,
    )
    made = build_demo_pipeline(grid, steps=options.steps or _STEPS, dtype=dtype, device=device)
    prompts: list[Prompt] = [
        made.call(photo=_FIRST_PHOTO + i, seed=1 + i) for i in range(options.samples)
    ]
    return PipeSubject(made.pipe, prompts, {}, made.note)
