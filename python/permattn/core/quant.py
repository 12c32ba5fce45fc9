"""What is quantised, stated in slots: no warps, no threads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class QuantSpec:
    """Numerics of the two products of attention.

    Args:
        qk: format of Q and K in Q K^T.
        pv: format of P and V in P V.
        q_rows_per_scale, kv_rows_per_scale: slots that share one scale.
        smooth_k: subtract K's mean over tokens before quantising.
    """

    qk: Literal["none", "int8", "int4"] = "none"
    pv: Literal["none", "fp8", "int8", "int4"] = "none"
    q_rows_per_scale: int = 64
    kv_rows_per_scale: int = 64
    smooth_k: bool = False

    def __post_init__(self) -> None:
        if self.qk not in ("none", "int8", "int4"):
            raise ValueError(f"QuantSpec.qk: wants 'none', 'int8' or 'int4', got {self.qk!r}")
        if self.pv not in ("none", "fp8", "int8", "int4"):
            raise ValueError(
                f"QuantSpec.pv: wants 'none', 'fp8', 'int8' or 'int4', got {self.pv!r}"
            )

    @property
    def is_quantised(self) -> bool:
        return self.qk != "none" or self.pv != "none"
