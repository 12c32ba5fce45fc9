"""How numbers are written down."""

from __future__ import annotations

from typing import Any


def rounded(value: Any) -> Any:
    """Floats to six digits: what lies behind is noise, and makes every diff unreadable."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value
