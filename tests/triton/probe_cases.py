"""Cases that every backend of the probe must get right, and a dense oracle written apart from all.

Shared by tests/test_probe.py, the interpreter suite and the GPU suite.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from permattn.probe import ProbeMass, probe_mass
from permattn.testing import assert_within
from torch import Tensor

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
# Result -> the power of a probability in it.
POWERS = {"lse": 0, "column": 1, "square": 2, "diagonal": 1}
NAMES = tuple(POWERS)


@dataclass(frozen=True)
class Case:
    """One probe.

    Args:
        first: position of row 0 for every batch row; None = the rows end at the last key.
        ranges: valid keys of every batch row; None = all.
        axis: "positions"; "subset" = a random half of the keys, every seventh coordinate without
            one; "shared" = the same for all batch rows; "unchecked" = also numbers out of range.
        coordinate: of row 0; None = the rows end at the last coordinate.
        skip: a random fifth of the coordinates.
        given: lse comes from outside (another softmax than that of the axis).
        views: q and k are slices of transposed tensors.
    """

    name: str
    keys: int
    rows: int
    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    dim: int = 32
    dtype: torch.dtype = SINGLE
    first: tuple[int, ...] | None = None
    ranges: tuple[tuple[int, int], ...] | None = None
    axis: str = "positions"
    coordinate: int | None = None
    skip: bool = False
    given: bool = False
    views: bool = False

    def __str__(self) -> str:
        return self.name

    def inputs(self, device: str = "cpu") -> dict[str, Any]:
        """Arguments of `probe_mass`; keys that no row sees are NaN and infinite."""
        g = torch.Generator().manual_seed(len(self.name))
        batch, n = self.batch, self.keys
        width = self.dim + 8 * self.views
        q = torch.randn(batch, self.rows, self.heads, width, generator=g)
        k = torch.randn(batch, self.keys, self.kv_heads, width, generator=g)
        q = (q * 2 * self.dim**-0.5).to(self.dtype).transpose(1, 2)
        k = k.to(self.dtype).transpose(1, 2)
        found: dict[str, Any] = {"q": q[..., width - self.dim :], "k": k[..., : self.dim]}
        if not self.views:
            found = {name: x.contiguous() for name, x in found.items()}
        first = self.first or (self.keys - self.rows,) * batch
        found["first_position"] = _ints(first)
        found["key_range"] = _ints(self.ranges or ((0, self.keys),) * batch)
        if self.axis != "positions":
            found["order"] = self._order(g)
            n = found["order"].shape[1]
        if self.axis != "positions" or self.coordinate is not None:
            at = n - self.rows if self.coordinate is None else self.coordinate
            found["first_coordinate"] = _ints((at,) * batch)
        if self.skip:
            found["skip"] = torch.rand(batch, self.heads, n, generator=g) < 0.2
        if self.given:
            found["lse"] = torch.rand(batch, self.heads, self.rows, generator=g) + 7
            found["lse"][0, 0, 0] = float("-inf")
        unseen = ~_seen_keys(found)[:, None, :, None]
        bad = torch.where(torch.arange(self.keys) % 2 == 0, float("nan"), float("inf"))
        found["k"].copy_(torch.where(unseen, bad[:, None], found["k"].float()))
        return {name: x.to(device) for name, x in found.items()}

    def _order(self, g: torch.Generator) -> Tensor:
        rows = 1 if self.axis == "shared" else self.batch
        half = -(-self.keys // 2)
        picked = [torch.randperm(self.keys, generator=g)[:half].sort().values for _ in range(rows)]
        order = torch.stack(picked).int()
        order[:, ::7] = -1
        if self.axis == "unchecked":
            order[:, 1::7] = torch.iinfo(torch.int32).min
            order[:, 2::7] = torch.iinfo(torch.int32).max
            order[:, 3::7] = self.keys
        return order


def _ints(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _visible(found: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Key of every coordinate, [B, n] (0 where there is none), and who sees it, [B, R, n]."""
    batch, _, rows, _ = found["q"].shape
    keys = found["k"].shape[2]
    order = found.get("order", torch.arange(keys)[None]).long().expand(batch, -1)
    real = (order >= 0) & (order < keys)
    key = torch.where(real, order, 0)
    first, key_range = found["first_position"].long()[:, None], found["key_range"].long()
    position = first + torch.arange(rows)
    valid = real & (key >= key_range[:, :1]) & (key < key_range[:, 1:]) & (first >= 0)
    return key, valid[:, None] & (key[:, None] <= position[..., None])


def _seen_keys(found: dict[str, Any]) -> Tensor:
    key, visible = _visible(found)
    seen = torch.zeros(len(key), found["k"].shape[2], dtype=torch.bool)
    for b in range(len(key)):
        seen[b, key[b][visible[b].any(0)]] = True
    return seen


def expected(found: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """lse, column, square, diagonal from the whole probability matrix, in `dtype`."""
    q, k = (found[x].cpu().to(dtype) for x in ("q", "k"))
    found = {name: x.cpu() for name, x in found.items()}
    key, visible = _visible(found)
    group = q.shape[1] // k.shape[1]
    k = torch.where(_seen_keys(found)[:, None, :, None], k, 0).repeat_interleave(group, 1)
    score = q @ k.gather(2, key[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])).mT
    score = score.masked_fill(~visible[:, None], float("-inf"))
    lse = found["lse"].to(dtype) if "lse" in found else score.logsumexp(-1)
    dead = lse == float("-inf")
    p = (score - lse.masked_fill(dead, 0.0)[..., None]).exp().masked_fill(dead[..., None], 0.0)
    counted = p.masked_fill(found["skip"][:, :, None], 0.0) if "skip" in found else p
    coordinate = found.get("first_coordinate", found["first_position"]).long()[:, None]
    n, rows = p.shape[-1], p.shape[2]
    lag = (coordinate + torch.arange(rows))[..., None] - torch.arange(n)
    # Lags outside of [0, n) go to a place of their own.
    place = (
        torch.where((lag >= 0) & (lag < n), lag, n).flatten(1)[:, None].expand(-1, p.shape[1], -1)
    )
    diagonal = torch.zeros(*p.shape[:2], n + 1, dtype=dtype).scatter_add_(
        2, place, counted.flatten(2)
    )
    return lse, p.mean(2), p.square().mean(2), diagonal[..., :n] / rows


def assert_probe(ours: ProbeMass, found: dict[str, Any], what: str) -> None:
    """Within the bound of float32 arithmetic; masses are measured in shares of the mean.

    A probability is 2^(score - lse) with both in base 2, so two roundings of numbers as large as
    the lse are allowed in its exponent.
    """
    exact, plain = expected(found, torch.float64), expected(found, torch.float32)
    n = exact[1].shape[-1]
    largest = _largest(exact[0])
    for name, scale, e, p in zip(NAMES, (1, n, n * n, n), exact, plain, strict=True):
        value = getattr(ours, name)
        assert value.shape == e.shape and value.dtype == torch.float32, name
        cancelled = 2 * POWERS[name] * largest * _largest(e * scale)
        assert_within(
            value.cpu() * scale, p * scale, e * scale, f"{what} {name}", cancelled=cancelled
        )


def _largest(x: Tensor) -> float:
    return float(x.abs().nan_to_num(0, 0, 0).max()) if x.numel() else 0.0


def check_case(case: Case, backend: str, device: str = "cpu") -> None:
    found = case.inputs(device)
    assert_probe(probe_mass(**found, backend=backend), found, f"{backend} {case}")


WHOLE = Case("whole", 300, 64, heads=4, kv_heads=2)
PADDED = ((3, 290), (0, 300), (40, 200))
CASES = (
    Case("one-key", 1, 1),
    Case("one-row", 130, 1, dtype=BRAIN),
    WHOLE,
    replace(WHOLE, name="bfloat16", dtype=BRAIN),
    replace(WHOLE, name="float16", dtype=HALF),
    Case("fewer-keys-than-rows", 40, 64, first=(0,)),
    Case("three-keys-five-rows", 3, 5, first=(1,), dtype=BRAIN),
    Case("odd-rows", 211, 37, dtype=HALF),
    Case("padded", 300, 20, batch=3, first=(270, 280, 180), ranges=PADDED),
    Case("rows-in-the-middle", 300, 33, batch=2, first=(100, 5), dtype=BRAIN),
    Case("batch-row-without-rows", 90, 16, batch=3, first=(-1, 74, -7)),
    Case("no-valid-key", 90, 16, batch=2, ranges=((40, 40), (0, 90))),
    Case("group-of-seven", 150, 24, heads=7, dtype=BRAIN),
    Case("subset", 400, 64, axis="subset", batch=2),
    Case("subset-skip", 400, 30, axis="subset", batch=2, skip=True, dtype=BRAIN),
    Case("shared-order", 300, 20, axis="shared", batch=2, ranges=((3, 290), (0, 200))),
    Case("numbers-out-of-range", 300, 20, axis="unchecked", dtype=BRAIN),
    Case("coordinates-ahead", 120, 30, coordinate=140),
    Case("coordinates-behind", 120, 30, coordinate=-10, dtype=BRAIN),
    Case("coordinates-far", 120, 30, coordinate=100000),
    Case("lse-given", 300, 64, given=True),
    Case("lse-given-order-skip", 300, 50, given=True, axis="subset", skip=True, dtype=BRAIN),
    Case("views", 140, 30, heads=4, kv_heads=2, batch=2, views=True, dtype=BRAIN),
    Case("head-dim-16", 100, 16, dim=16, dtype=BRAIN),
    Case("head-dim-40", 100, 30, dim=40),
    Case("head-dim-80", 100, 30, dim=80, dtype=BRAIN),
    Case("head-dim-256", 100, 30, dim=256, dtype=BRAIN),
    Case("head-dim-256-float32", 60, 30, dim=256),
    Case("more-than-64-rows", 200, 100, skip=True, dtype=BRAIN),
    Case("128-rows", 300, 128, batch=2, first=(172, -1)),
)
# Past one program of the Triton kernels (1024 coordinates) and one tile of the native ones (2304).
LONG = (
    Case("two-splits", 1100, 64, skip=True, dim=16),
    Case("edge-in-the-last-split", 2050, 64, heads=1, dim=16, dtype=BRAIN),
    Case("two-tiles", 2310, 64, heads=1, dim=16),
    Case("three-tiles", 4700, 41, batch=2, skip=True, dim=16, dtype=BRAIN, first=(4659, 2000)),
)
