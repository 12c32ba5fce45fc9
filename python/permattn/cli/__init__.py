"""The `permattn` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from permattn.cli.errors import EXIT_BAD_INPUT


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns: the exit code: 0; 2 for bad input, said in one line; 130 after Ctrl-C.
    """
    try:
        from permattn.cli import app
    except ImportError as e:
        print(
            f"permattn: the command needs {e.name}: pip install 'permattn[cli]'",
            file=sys.stderr,
        )
        return EXIT_BAD_INPUT
    return app.run(sys.argv[1:] if argv is None else argv)
