"""The online probe: one fused operator that sums where the last rows of a prompt look."""

from __future__ import annotations

import torch
from torch import Tensor

from permattn.backends import BACKENDS, resolve
from permattn.core.probe import Masses, ProbeArgs, ProbeMass, ProbeProblem, empty_masses

__all__ = ["ProbeMass", "probe_mass"]


def probe_mass(
    q: Tensor,
    k: Tensor,
    *,
    first_position: Tensor,
    key_range: Tensor,
    order: Tensor | None = None,
    first_coordinate: Tensor | None = None,
    lse: Tensor | None = None,
    skip: Tensor | None = None,
    backend: str = "auto",
) -> ProbeMass:
    """The softmax of R consecutive rows over the keys, summed along columns and diagonals.

    Row r of batch row b stands at key position `first_position[b] + r` and sees key j iff
    `key_range[b, 0] <= j < key_range[b, 1]` and j does not lie behind it. Keys are laid out on an
    axis of n coordinates; lags are differences of coordinates.

    Source: MMInference, Algorithm 1 (last_q = 64), fused: one sweep over the keys finds the
    log-sum-exp, a second one the sums. Nothing of size R x Skv is stored.

    Args:
        q: [B, Hq, R, D], multiplied by the softmax scale already, R >= 1.
        k: [B, Hkv, Skv, D], q's dtype and device, Hq % Hkv == 0; any strides, last one 1.
        first_position: int32 [B]; a batch row with a negative one has no probe rows.
        key_range: int32 [B, 2], first key and one past the last.
        order: int32 [1 or B, n], key position of every coordinate, each at most once; -1 = no key.
            None: coordinate = position, n = Skv.
        first_coordinate: int32 [B], coordinate of row 0; row r stands r further on. None =
            first_position.
        lse: float32 [B, Hq, R], normalises the rows. None: over the keys on the axis.
        skip: bool [B, Hq, n], keys whose mass does not count in `diagonal`.
        backend: "auto", "cuda", "triton", "cpu" or "reference". A named backend never falls back.

    Returns: a `ProbeMass`; its lse is `lse` where that was given.

    Raises:
        ValueError: shapes, devices or strides that do not fit; names what it got and wants.
        TypeError: a dtype that does not fit.
        NotImplementedError: the named backend cannot run it; says why.

    Invariants: sums are in float32 (float64 for float64 inputs). A key that no row sees is without
    effect, NaN or not. Inputs are never modified, nothing waits for the device, and two runs are
    bit-identical. Without gradients.
    """
    _check_keys(q, k)
    _check_axis(q, k, first_position, key_range, order, first_coordinate)
    _check_per_head(q, k.shape[2] if order is None else order.shape[1], lse, skip)
    name = resolve(ProbeProblem(q.device.type, q.dtype, q.shape[3], q.shape[2]), backend)
    found, column, square, diagonal = probe_mass_op(
        *(q.detach(), k.detach(), first_position, key_range),
        *(order, first_coordinate, lse, skip, name),
    )
    return ProbeMass(found if lse is None else lse, column, square, diagonal)


@torch.library.custom_op("permattn::probe_mass", mutates_args=())
def probe_mass_op(
    q: Tensor,
    k: Tensor,
    first_position: Tensor,
    key_range: Tensor,
    order: Tensor | None,
    first_coordinate: Tensor | None,
    lse: Tensor | None,
    skip: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first = first_position if first_coordinate is None else first_coordinate
    args = ProbeArgs(q, k, first_position, key_range, order, first, lse, skip)
    return BACKENDS[backend].probe(args)


@probe_mass_op.register_fake
def _(q, k, first_position, key_range, order, first_coordinate, lse, skip, backend) -> Masses:
    return empty_masses(q, k.shape[2] if order is None else order.shape[1])


def _check_keys(q: Tensor, k: Tensor) -> None:
    for name, x in (("q", q), ("k", k)):
        if x.dim() != 4:
            raise ValueError(f"{name}: wants 4 axes [B, H, S, D], got shape {list(x.shape)}")
        if not x.dtype.is_floating_point:
            raise TypeError(f"{name}: wants a floating dtype, got {x.dtype}")
    if k.dtype != q.dtype:
        raise TypeError(f"k: wants q's dtype {q.dtype}, got {k.dtype}")
    if k.device != q.device:
        raise ValueError(f"k: wants q's device {q.device}, got {k.device}")
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"k: wants q's batch size {q.shape[0]}, got {k.shape[0]}")
    if k.shape[3] != q.shape[3] or q.shape[3] < 1:
        raise ValueError(f"k: wants q's head dim {q.shape[3]}, at least 1, got {k.shape[3]}")
    if q.shape[2] < 1:
        raise ValueError("q: wants at least one row, got 0")
    hq, hkv = q.shape[1], k.shape[1]
    if hkv == 0 or hq == 0 or hq % hkv:
        raise ValueError(f"k: Hq % Hkv must be 0, got Hq = {hq}, Hkv = {hkv}")
    if k.stride(3) != 1 and k.shape[3] > 1 and k.numel() > 0:
        raise ValueError(f"k: the last stride must be 1, got {k.stride(3)}")


def _check_axis(
    q: Tensor,
    k: Tensor,
    first_position: Tensor,
    key_range: Tensor,
    order: Tensor | None,
    first_coordinate: Tensor | None,
) -> None:
    batch = q.shape[0]
    _check("first_position", first_position, q, torch.int32, (batch,))
    _check("key_range", key_range, q, torch.int32, (batch, 2))
    if order is not None:
        if order.dim() != 2 or order.shape[0] not in (1, batch):
            raise ValueError(f"order: wants [1 or {batch}, n], got {list(order.shape)}")
        _check("order", order, q, torch.int32, tuple(order.shape))
        if first_coordinate is None:
            raise ValueError("first_coordinate: wants int32 [B] beside an order, got None")
    if first_coordinate is not None:
        _check("first_coordinate", first_coordinate, q, torch.int32, (batch,))
    if max(k.shape[2], 0 if order is None else order.shape[1]) >= 2**31 - 256:
        raise ValueError(f"k: wants positions that fit int32, got {k.shape[2]} keys")


def _check_per_head(q: Tensor, n: int, lse: Tensor | None, skip: Tensor | None) -> None:
    batch, heads, rows, _ = q.shape
    if lse is not None:
        _check("lse", lse, q, torch.float32, (batch, heads, rows))
    if skip is not None:
        _check("skip", skip, q, torch.bool, (batch, heads, n))


def _check(name: str, x: Tensor, q: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if x.dtype != dtype:
        raise TypeError(f"{name}: wants {dtype}, got {x.dtype}")
    if tuple(x.shape) != shape:
        raise ValueError(f"{name}: wants shape {list(shape)}, got {list(x.shape)}")
    if x.device != q.device:
        raise ValueError(f"{name}: wants q's device {q.device}, got {x.device}")
