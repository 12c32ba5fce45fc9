"""The native library: loaded on the first question, never by an import."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).resolve().parents[1]


def build_report() -> dict[str, Any]:
    """What setup.py wrote down of the build; empty where it never ran."""
    report = PACKAGE / "_native_build.json"
    return json.loads(report.read_text()) if report.exists() else {}


@functools.cache
def load() -> str | None:
    """Loads the library once; None, or one line saying why it cannot be used."""
    library = PACKAGE / "_native.so"
    if not library.exists():
        report = build_report()
        if report:
            return f"native library was not built: {report.get('reason', 'unknown reason')}"
        return "native library was not built: install permattn to build it"
    try:
        torch.ops.load_library(str(library))
    except OSError as e:
        return f"native library does not load: {e}"
    return None
