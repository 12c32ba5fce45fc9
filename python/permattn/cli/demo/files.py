"""Output files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from permattn.cli.errors import UserError


def prepare_folder(folder: Path) -> None:
    """Makes the folder. Raises UserError when it cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {folder}: cannot be made ({e.strerror}); name a folder") from e
    if not os.access(folder, os.W_OK):
        raise UserError(f"--out {folder}: no permission to write there; name another folder")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a name beside `path`, and renames the result once it is complete."""
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
