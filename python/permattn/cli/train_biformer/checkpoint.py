"""The file that a training goes on from."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from permattn.cli.demo.files import write_whole
from permattn.cli.errors import UserError
from permattn.cli.train_biformer.settings import Settings, differences

NAME = "checkpoint.pt"
_FORMAT = "permattn train-biformer 1"


def save(folder: Path, settings: Settings, state: dict[str, Any]) -> None:
    """Writes the checkpoint; it appears whole or the one before stays.

    Raises:
        UserError: the file cannot be written.
    """
    content = {"format": _FORMAT, "settings": settings.to_json(), **state}
    try:
        write_whole(folder / NAME, lambda path: torch.save(content, path))
    except (OSError, RuntimeError) as e:
        raise UserError(f"--out {folder}: the checkpoint cannot be written ({e})") from e


def load(folder: Path, settings: Settings) -> dict[str, Any]:
    """The state that `save` was given.

    Raises:
        UserError: no checkpoint, not one of this command, damaged, or of other settings.
    """
    path = folder / NAME
    if not path.is_file():
        raise UserError(f"--resume: {folder} has no {NAME}; leave --resume out to begin")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as e:
        raise UserError(f"--resume: {path} cannot be read: damaged, or not a checkpoint") from e
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise UserError(f"--resume: {path} is no checkpoint of train-biformer")
    other = differences(content["settings"], settings.to_json())
    if other:
        raise UserError(
            f"--resume: {path} is of other settings: {other}; give its settings or another --out"
        )
    return content


def refuse_to_overwrite(folder: Path) -> None:
    """Raises UserError where a checkpoint of an earlier training lies."""
    if (folder / NAME).exists():
        raise UserError(
            f"--out {folder}: has the {NAME} of an earlier training; add --resume to go on, or "
            "name another folder"
        )
