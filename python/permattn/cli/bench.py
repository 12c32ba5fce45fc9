"""`permattn bench`: the repository's bench, found from here."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from permattn.cli.errors import UserError

_ROOT = Path(__file__).resolve().parents[3]


def run(argv: Sequence[str]) -> int:
    """Runs `bench.run.main`.

    Raises:
        UserError: permattn is installed without its repository.
    """
    # An editable install puts python/ on the path, not the folder that holds bench/.
    if not (_ROOT / "bench" / "run.py").is_file():
        raise UserError(
            "bench: the benchmarks are not part of the installed package; clone the repository "
            "and run `make bench` there"
        )
    if find_spec("bench") is None or str(_ROOT) not in sys.path:
        sys.path.insert(0, str(_ROOT))
    try:
        from bench.run import main
    except ImportError as e:
        raise UserError(f"bench: needs {e.name}: pip install 'permattn[cli]'") from e
    try:
        return main(list(argv))
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else 0
