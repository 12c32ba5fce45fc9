"""Rows made ready in plain torch: what every other `prepare` must equal."""

from __future__ import annotations

import torch
from torch import Tensor

from permattn.core.prepare import PrepareArgs, Prepared
from permattn.core.quant import quantise


def prepare(args: PrepareArgs) -> Prepared:
    """See `Backend.prepare`."""
    fmt = args.format
    rows = prepared_rows(args)
    if fmt is None:
        return rows.to(args.x.dtype).contiguous(), rows.new_empty(0, dtype=torch.float32)
    return quantise(rows, fmt, args.rows_per_scale, per_column=args.per_column)


def prepared_rows(args: PrepareArgs) -> Tensor:
    """The rows before they are quantised: [B, Hp, n, D], float32 or float64."""
    x = args.x
    rows = x.to(torch.promote_types(x.dtype, torch.float32))
    if args.transform is not None:
        rows = args.transform(x)
    if args.mean is not None:
        rows = rows - args.mean[:, :, None]
    if args.factor is not None:
        rows = rows * args.factor[:, :, None]
    if args.token_of_slot is None:
        return rows
    rows = rows.repeat_interleave(args.num_heads // x.shape[1], 1)
    token = args.token_of_slot.expand(*rows.shape[:2], -1)
    # A spare row of zeros for holes: whatever stands at token 0 stays out.
    rows = torch.nn.functional.pad(rows, (0, 0, 0, 1))
    row = torch.where(token >= 0, token, x.shape[2]).long()
    return rows.gather(2, row[..., None].expand(*row.shape, rows.shape[3]))
