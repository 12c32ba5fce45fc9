"""What is quantised, stated in slots (no warps, no threads), and the quantisers' exact meaning."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

QkFormat = Literal["none", "int8", "int4"]
PvFormat = Literal["none", "fp8", "int8", "int4"]


class Format(NamedTuple):
    """A number format of rows: `dtype` holds values of magnitude up to `high`.

    Probabilities are never negative, so theirs go up to `p_high` in the same number of bits.
    """

    dtype: torch.dtype
    high: int
    p_high: int


FORMATS: dict[str, Format] = {
    "int8": Format(torch.int8, 127, 255),
    "int4": Format(torch.int8, 7, 15),
    "fp8": Format(torch.float8_e4m3fn, 448, 448),
}
# Short names of what users ask for: name -> (qk, pv).
PRECISIONS: dict[str, tuple[QkFormat, PvFormat]] = {
    "int8": ("int8", "none"),
    "int8+fp8": ("int8", "fp8"),
    "int8+int8": ("int8", "int8"),
    "int8+int4": ("int8", "int4"),
    "int4": ("int4", "int4"),
}
# Below it a group counts as zeros: the inverse of its scale would overflow.
LEAST_MAXIMUM = 1e-30


@dataclass(frozen=True)
class QuantSpec:
    """Numerics of the two products of attention.

    Source: PAROAttention (arXiv 2506.16054), section 3; scales are ours where it gives none: P is
    unsigned with one scale per row and block of keys, V has one per block and column.

    Args:
        qk: format of Q and K in Q K^T.
        pv: format of P and V in P V.
        q_rows_per_scale, kv_rows_per_scale: slots that share one scale. They divide the blocks of
            every part of the plan.
        smooth_k: subtract K's mean over tokens before quantising; the softmax does not see it.
        balance: multiply the columns of K by factors and divide those of Q by them, so that both
            have the same maxima (SmoothQuant, arXiv 2211.10438, equation 4 with alpha 1/2): an
            outlier channel of either costs both a little, and neither much.
    """

    qk: QkFormat = "none"
    pv: PvFormat = "none"
    q_rows_per_scale: int = 64
    kv_rows_per_scale: int = 64
    smooth_k: bool = False
    balance: bool = False

    def __post_init__(self) -> None:
        if self.qk not in ("none", "int8", "int4"):
            raise ValueError(f"QuantSpec.qk: wants 'none', 'int8' or 'int4', got {self.qk!r}")
        if self.pv not in ("none", "fp8", "int8", "int4"):
            raise ValueError(
                f"QuantSpec.pv: wants 'none', 'fp8', 'int8' or 'int4', got {self.pv!r}"
            )
        for name in ("q_rows_per_scale", "kv_rows_per_scale"):
            rows = getattr(self, name)
            if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
                raise ValueError(f"QuantSpec.{name}: wants an integer >= 1, got {rows!r}")
        for name in ("smooth_k", "balance"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(
                    f"QuantSpec.{name}: wants True or False, got {getattr(self, name)!r}"
                )
        if (self.smooth_k or self.balance) and self.qk == "none":
            raise ValueError("QuantSpec.smooth_k, balance: want a quantised qk, got 'none'")

    @classmethod
    def named(cls, name: str) -> QuantSpec:
        """The numerics that go by a short name, with the scales that each format needs.

        Args:
            name: "none", or one of `PRECISIONS`: the format of Q and K, and that of P and V behind
                a plus; "int4" is both. INT4 takes small groups and balanced columns: with the
                scales of INT8 it errs twice as much.

        Raises:
            ValueError: an unknown name; lists the known ones.
        """
        if name == "none":
            return cls()
        if name not in PRECISIONS:
            raise ValueError(f"quant: wants 'none' or one of {list(PRECISIONS)}, got {name!r}")
        qk, pv = PRECISIONS[name]
        if "int4" in (qk, pv):
            return cls(qk, pv, 1, 16, smooth_k=True, balance=True)
        return cls(qk, pv, smooth_k=True)

    @property
    def is_quantised(self) -> bool:
        return self.qk != "none" or self.pv != "none"

    def check_blocks(self, block_q: int, block_kv: int) -> None:
        """Raises ValueError where scales do not divide the blocks of a part."""
        if not self.is_quantised:
            return
        for name, rows, block in (
            ("q_rows_per_scale", self.q_rows_per_scale, block_q),
            ("kv_rows_per_scale", self.kv_rows_per_scale, block_kv),
        ):
            if block % rows:
                raise ValueError(
                    f"QuantSpec.{name}: must divide the plan's blocks of {block}, got {rows}"
                )


def quantise(
    x: Tensor, fmt: Format, rows_per_scale: int, *, per_column: bool = False
) -> tuple[Tensor, Tensor]:
    """Groups of rows as small numbers: x is about value * scale.

    The one definition that every backend meets to the last bit, in float32: `scale = max / high`,
    `value = round(x * ((1 / max) * high))`, ties to even, clamped to `high`. A group whose largest
    magnitude is below LEAST_MAXIMUM becomes zeros with scale 0.

    Args:
        x: float [..., n, D]; converted to float32.
        fmt: one of FORMATS.
        rows_per_scale: rows that share a scale; the last group may be shorter.
        per_column: a scale for every column of a group (V), not one for the group (Q, K).

    Returns: (values [..., n, D] of `fmt.dtype`, scale float32 [..., groups] or [..., groups, D]).
    """
    n = x.shape[-2]
    pad = -n % rows_per_scale
    grouped = torch.nn.functional.pad(x.float(), (0, 0, 0, pad))
    grouped = grouped.unflatten(-2, (-1, rows_per_scale))
    high = grouped.abs().amax(-2, keepdim=True)
    if not per_column:
        high = high.amax(-1, keepdim=True)
    is_zero = high < LEAST_MAXIMUM
    inverse = torch.where(is_zero, 0.0, high.reciprocal() * fmt.high)
    scale = torch.where(is_zero, 0.0, high / fmt.high)
    value = grouped * inverse
    if fmt.dtype == torch.int8:
        value = value.round()
    value = value.clamp(-fmt.high, fmt.high).to(fmt.dtype)
    scale = scale.squeeze(-2) if per_column else scale.flatten(-3)
    return value.flatten(-3, -2)[..., :n, :], scale


def quantise_probabilities(p: Tensor, fmt: Format) -> Tensor:
    """p in [0, 1], 1 in every row that sees anything, as numbers up to `p_high`, in p's dtype."""
    scaled = p * fmt.p_high
    if fmt.dtype == torch.int8:
        return scaled.round()
    return scaled.to(fmt.dtype).to(p.dtype)


_said: set[str] = set()


def say_once(what: str) -> None:
    """Warns that a format is emulated: once a process, not once a call."""
    if what not in _said:
        _said.add(what)
        warnings.warn(what, UserWarning, stacklevel=3)
