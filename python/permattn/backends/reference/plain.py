"""Attention in plain torch: float32 or float64 inside, one running softmax over all parts."""

from __future__ import annotations

import torch
from torch import Tensor

from permattn.backends.reference.tiles import add_rows, rows_of, tiles, working
from permattn.core.problem import BwdArgs, FwdArgs, empty_out


def forward_plain(args: FwdArgs) -> tuple[Tensor, Tensor]:
    heads = args.q.shape[1]
    q, k, v = working(args.q), working(args.k, heads), working(args.v, heads)
    # One running softmax over all parts: row maximum, row sum, unnormalised output.
    high = q.new_full(q.shape[:3], float("-inf"))
    total = q.new_zeros(q.shape[:3])
    acc = q.new_zeros(*q.shape[:3], v.shape[3])
    for tile in tiles(args):
        row = tile.q_row
        score = tile.score(q, k, args.scale)
        before = high.gather(2, row)
        now = torch.maximum(before, score.amax(-1))
        safe = torch.where(now == float("-inf"), 0.0, now)
        p = torch.exp(score - safe[..., None])
        shrink = torch.exp(before - safe)
        high.scatter_(2, row, now)
        total.scatter_(2, row, total.gather(2, row) * shrink + p.sum(-1))
        value = rows_of(acc, row) * shrink[..., None] + p @ rows_of(v, tile.kv_row)
        acc.scatter_(2, row[..., None].expand_as(value), value)
    high, total, acc = high[:, :, :-1], total[:, :, :-1], acc[:, :, :-1]
    seen = total > 0
    divisor = torch.where(seen, total, 1.0)
    out = empty_out(args.q, args.v)
    out.copy_(torch.where(seen[..., None], acc / divisor[..., None], 0.0))
    lse = torch.where(seen, high + torch.log(divisor), float("-inf"))
    return out, lse


def backward(args: BwdArgs) -> tuple[Tensor, Tensor, Tensor]:
    heads, num_kv_heads = args.q.shape[1], args.k.shape[1]
    q, k, v = working(args.q), working(args.k, heads), working(args.v, heads)
    out, dout = working(args.out), working(args.dout)
    pad = torch.nn.functional.pad
    lse = pad(args.lse.to(q.dtype), (0, 1))
    lse = torch.where(lse == float("-inf"), 0.0, lse)
    delta = (out * dout).sum(-1) - pad(args.dlse.to(q.dtype), (0, 1))
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for tile in tiles(FwdArgs(args.q, args.k, args.v, args.plan, args.scale)):
        p = torch.exp(tile.score(q, k, args.scale) - lse.gather(2, tile.q_row)[..., None])
        dout_rows = rows_of(dout, tile.q_row)
        dp = dout_rows @ rows_of(v, tile.kv_row).mT
        ds = p * (dp - delta.gather(2, tile.q_row)[..., None]) * args.scale
        add_rows(dq, tile.q_row, ds @ rows_of(k, tile.kv_row))
        add_rows(dk, tile.kv_row, ds.mT @ rows_of(q, tile.q_row))
        add_rows(dv, tile.kv_row, p.mT @ dout_rows)
    group = heads // max(num_kv_heads, 1)
    dk, dv = (x.unflatten(1, (num_kv_heads, group)).sum(2) for x in (dk, dv))
    grads = ((dq, args.q), (dk, args.k), (dv, args.v))
    dq, dk, dv = (g[:, :, :-1].to(x.dtype) for g, x in grads)
    return dq, dk, dv
