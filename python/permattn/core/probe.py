"""What a probe is: the last rows of a prompt, summed along columns and diagonals of the keys."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ProbeMass:
    """Where R consecutive rows put their attention.

    Args:
        lse: float32 [B, Hq, R], natural log, over the keys each row sees; -inf where it sees none.
        column: float32 [B, Hq, n]: mean over the R rows of the probability that each key gets.
        square: float32 [B, Hq, n]: mean over the R rows of its square.
        diagonal: float32 [B, Hq, n]: sum over pairs at lag l = coordinate of the row - coordinate
            of the key, over R, for l in [0, n).
    """

    lse: Tensor
    column: Tensor
    square: Tensor
    diagonal: Tensor


@dataclass(frozen=True)
class ProbeProblem:
    """The static facts on which a backend decides whether it can run a probe."""

    device_type: str
    dtype: torch.dtype
    head_dim: int
    num_rows: int


@dataclass(frozen=True, eq=False)
class ProbeArgs:
    """The checked arguments of one probe; see `permattn.probe.probe_mass`.

    q [B, Hq, R, D], scaled; k [B, Hkv, Skv, D], last stride 1; first_position, first_coordinate
    int32 [B]; key_range int32 [B, 2]; order int32 [Bx, n] or None: coordinate = position, n = Skv;
    lse float32 [B, Hq, R] or None: computed; skip bool [B, Hq, n] or None.
    """

    q: Tensor
    k: Tensor
    first_position: Tensor
    key_range: Tensor
    order: Tensor | None
    first_coordinate: Tensor
    lse: Tensor | None
    skip: Tensor | None

    @property
    def num_coordinates(self) -> int:
        return self.k.shape[2] if self.order is None else self.order.shape[1]


# lse, column, square, diagonal.
Masses = tuple[Tensor, Tensor, Tensor, Tensor]


def empty_masses(q: Tensor, num_coordinates: int) -> Masses:
    """Uninitialised results for q [B, Hq, R, D]."""
    batch, heads, rows, _ = q.shape
    shape = (batch, heads, num_coordinates)
    column, square, diagonal = (q.new_empty(shape, dtype=torch.float32) for _ in range(3))
    return q.new_empty((batch, heads, rows), dtype=torch.float32), column, square, diagonal


def probe_by_rows(args: ProbeArgs, most: int, launch: Callable[[ProbeArgs, int], Masses]) -> Masses:
    """A probe of any number of rows by a kernel that takes `most`.

    Args:
        launch: (arguments of up to `most` rows with contiguous order, skip, lse and key_range; the
            number of all rows, by which sums are divided) -> lse of its rows, and sums.
    """
    order, skip = (None if x is None else x.contiguous() for x in (args.order, args.skip))
    args = replace(args, key_range=args.key_range.contiguous(), order=order, skip=skip)
    found = []
    for i in range(0, args.q.shape[2], most):
        rows = slice(i, i + most)
        piece = replace(
            args,
            q=args.q[:, :, rows],
            # A batch row without probe rows stays one.
            first_position=torch.where(args.first_position < 0, -1, args.first_position + i),
            first_coordinate=args.first_coordinate + i,
            lse=None if args.lse is None else args.lse[:, :, rows].contiguous(),
        )
        found.append(launch(piece, args.q.shape[2]))
    lses, columns, squares, diagonals = zip(*found, strict=True)
    # cat also copies a given lse, which an operator must not return.
    column, square, diagonal = (
        functools.reduce(torch.add, parts) for parts in (columns, squares, diagonals)
    )
    return torch.cat(lses, 2), column, square, diagonal
