"""Errors that a person at the terminal can fix."""

from __future__ import annotations

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """Bad input to a command: its text is one line that says what to do; exit code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: object) -> str:
    """The text with every run of white space as one blank: messages of libraries span lines."""
    return " ".join(str(text).split())
