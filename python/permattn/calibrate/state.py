"""A folder that holds what a search has measured, so that it can go on after any end."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

# What the command line keeps here before a search begins.
_VIDEOS = "made*.mp4*"
_ARGUMENTS = "arguments.json"


class StateError(ValueError):
    """The folder cannot be used; says why."""


class State:
    """Scores by name, each in a file that appears whole or not at all; without a folder, in memory.

    Args:
        folder: made if missing; None = nothing is written.
        arguments: what the scores depend on, as JSON values.

    Raises:
        StateError: the folder belongs to a search with other arguments, or cannot be used.
    """

    def __init__(self, folder: Path | None, arguments: dict[str, Any]) -> None:
        self._folder = folder
        self._known: dict[str, Any] = {}
        if folder is None:
            return
        # As a file would give them back: tuples are lists there.
        arguments = json.loads(json.dumps(arguments))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / _ARGUMENTS
            if path.exists():
                _compare(folder, json.loads(path.read_text("utf-8")), arguments)
            elif any(not x.match(_VIDEOS) for x in folder.iterdir()):
                raise StateError(
                    f"state {folder}: holds files that no search left; name a new folder"
                )
            else:
                _write(path, arguments)
        except OSError as e:
            raise StateError(f"state {folder}: cannot be used ({e.strerror})") from e
        except json.JSONDecodeError as e:
            raise StateError(f"state {folder}: {_ARGUMENTS} is damaged; remove the folder") from e

    def get(self, name: str) -> Any | None:
        """What was put under this name; None if nothing, or if its file is damaged."""
        if name not in self._known and self._folder is not None:
            path = self._folder / f"{name}.json"
            try:
                self._known[name] = json.loads(path.read_text("utf-8"))
            except (OSError, json.JSONDecodeError):
                return None
        return self._known.get(name)

    def put(self, name: str, value: Any) -> None:
        """Keeps a JSON value.

        Raises:
            StateError: the file cannot be written.
        """
        if self._folder is not None:
            try:
                _write(self._folder / f"{name}.json", value)
            except OSError as e:
                raise StateError(f"state {self._folder}: cannot be written ({e.strerror})") from e
        self._known[name] = value


def _write(path: Path, value: Any) -> None:
    part = path.with_suffix(".part")
    try:
        part.write_text(json.dumps(value), encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _compare(folder: Path, before: Any, now: dict[str, Any]) -> None:
    if not isinstance(before, dict):
        raise StateError(f"state {folder}: {_ARGUMENTS} is damaged; remove the folder")
    place = _difference(before, now)
    if place is not None:
        name, was, wanted = place
        raise StateError(
            f"state {folder}: made by a search with {name} = {_short(was)}, this one has "
            f"{_short(wanted)}; name another folder or remove it"
        )


def _difference(before: Any, now: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The first place where two JSON values differ, and both values there."""
    if isinstance(before, dict) and isinstance(now, dict):
        pairs = {k: (before.get(k), now.get(k)) for k in sorted({*before, *now})}
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = {str(i): pair for i, pair in enumerate(zip(before, now, strict=True))}
    else:
        return None if before == now else (name, before, now)
    for key, (a, b) in pairs.items():
        found = _difference(a, b, f"{name}.{key}" if name else key)
        if found is not None:
            return found
    return None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
