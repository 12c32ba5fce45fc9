"""`--model`: a real checkpoint, from a local folder or the hub."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch

from permattn.cli.demo.constructed import Grid
from permattn.cli.demo.subject import Reader, Subject, choose_grid
from permattn.cli.demo.video import Clip
from permattn.cli.errors import UserError

QUESTION = "Describe this video in detail."
# Families differ in tokens per frame: read more frames when the first guess gave too few.
_ATTEMPTS = 3


def load(name: str, *, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """(model, processor).

    Raises:
        UserError: nothing there, not readable, of an unknown family, or a library is missing.
    """
    import transformers

    from permattn.models.families import known_families

    transformers.logging.set_verbosity_error()
    # It would report every retry of an unreachable hub; the one line below says it all.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except Exception as e:
        raise UserError(
            f"--model {name}: no readable checkpoint ({_first_sentence(e)}); give a folder with "
            "config.json, weights and processor files, or a hub id where there is network"
        ) from e
    if config.model_type not in known_families():
        raise UserError(
            f"--model {name}: unknown model family {config.model_type!r}; the demo knows "
            f"{', '.join(sorted(known_families()))}"
        )
    try:
        processor = transformers.AutoProcessor.from_pretrained(name)
        model: Any = transformers.AutoModelForImageTextToText.from_pretrained(
            name, config=config, dtype=dtype, attn_implementation="sdpa"
        )
    except ImportError as e:
        raise UserError(
            f"--model {name}: its processor needs a library: {_first_sentence(e)}"
        ) from e
    except Exception as e:
        raise UserError(
            f"--model {name}: the checkpoint cannot be loaded ({_first_sentence(e)}); check that "
            "its files are complete"
        ) from e
    return model.to(device).eval(), processor


def checkpoint_subject(
    name: str,
    read: Reader,
    *,
    tokens: int,
    frames: int | None,
    aspect: float,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Subject, Clip]:
    """A checkpoint on a prompt of one video and one question."""
    model, processor = load(name, device=device, dtype=dtype)
    return ask(
        name,
        model,
        processor,
        read,
        tokens=tokens,
        frames=frames,
        aspect=aspect,
        device=device,
        dtype=dtype,
    )


def ask(
    name: str,
    model: Any,
    processor: Any,
    read: Reader,
    *,
    tokens: int,
    frames: int | None,
    aspect: float,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Subject, Clip]:
    """A loaded checkpoint on a prompt of one video and one question."""
    patch = 2 * int(getattr(model.config.vision_config, "patch_size", 14))
    grid = choose_grid(tokens, frames, aspect)
    for _ in range(_ATTEMPTS):
        clip = read(Grid(grid.frames, grid.height * patch, grid.width * patch))
        inputs = _process(name, processor, clip)
        visual = _count_visual(model.config, inputs["input_ids"])
        if visual >= tokens or frames is not None:
            break
        more = math.ceil(grid.frames * tokens / max(visual, 1))
        grid = Grid(more, grid.height, grid.width)
    moved = {k: x.to(device) if torch.is_tensor(x) else x for k, x in inputs.items()}
    moved = {k: x.to(dtype) if torch.is_floating_point(x) else x for k, x in moved.items()}
    note = f"Weights of {name}. The prompt asks: {QUESTION!r}"
    return Subject(model, moved, f"{type(model).__name__} {name}", visual, None, note), clip


def _process(name: str, processor: Any, clip: Clip) -> dict[str, Any]:
    message = {
        "role": "user",
        "content": [{"type": "video"}, {"type": "text", "text": QUESTION}],
    }
    try:
        text = processor.apply_chat_template([message], add_generation_prompt=True)
        video = torch.from_numpy(clip.frames).permute(0, 3, 1, 2)
        return dict(processor(text=[text], videos=[video], return_tensors="pt"))
    except Exception as e:
        raise UserError(
            f"--model {name}: its processor refuses a video ({_first_sentence(e)}); use a "
            "vision-language checkpoint that takes videos"
        ) from e


def _count_visual(config: Any, ids: torch.Tensor) -> int:
    found = [getattr(config, f"{kind}_token_id", None) for kind in ("video", "image")]
    found += [getattr(config, f"{kind}_token_index", None) for kind in ("video", "image")]
    wanted = torch.tensor([x for x in found if x is not None])
    return int(torch.isin(ids, wanted).sum())


def _first_sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."
