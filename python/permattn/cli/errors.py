"""Errors that a person at the terminal can fix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """Bad input to a command: its text is one line that says what to do; exit code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: object) -> str:
    """The text with every run of white space as one blank: messages of libraries span lines."""
    return " ".join(str(text).split())


@contextmanager
def memory_errors() -> Iterator[None]:
    """Around a command: a lack of memory becomes a `UserError`."""
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        if isinstance(e, MemoryError) or "alloc" in str(e) or "out of memory" in str(e):
            raise UserError(f"not enough memory ({one_line(e)}); use fewer --tokens") from e
        raise


@contextmanager
def user_errors() -> Iterator[None]:
    """Around a command of the library's calls: what they refuse becomes a `UserError`, too."""
    try:
        with memory_errors():
            yield
    except (ValueError, TypeError) as e:
        raise UserError(str(e)) from e
