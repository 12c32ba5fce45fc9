"""The probe in plain torch: chunked over the coordinates."""

from __future__ import annotations

import torch
from torch import Tensor

from permattn.core.probe import Masses, ProbeArgs

# Bytes of one chunk of probe scores.
_PROBE_CHUNK_BYTES = 1 << 26


def probe(args: ProbeArgs) -> Masses:
    """See `Backend.probe`. Chunked over the coordinates; no host sync, so meta tensors pass too."""
    batch, heads, rows, _ = args.q.shape
    n = args.num_coordinates
    dtype = torch.promote_types(args.q.dtype, torch.float32)
    lse = args.q.new_full((batch, heads, rows), float("-inf"), dtype=dtype)
    column, square = (args.q.new_zeros(batch, heads, n, dtype=dtype) for _ in range(2))
    skew = args.q.new_zeros(batch, heads, n + rows - 1, dtype=dtype)
    size = max(1024, _PROBE_CHUNK_BYTES // max(1, 4 * batch * heads * rows))
    bounds = [(i, min(i + size, n)) for i in range(0, n if args.k.shape[2] else 0, size)]
    whole = _probe_scores(args, *bounds[0]) if len(bounds) == 1 else None
    if args.lse is not None:
        lse = args.lse.to(dtype, copy=True)  # an operator must not return its input
    else:
        for bound in bounds:
            score = _probe_scores(args, *bound) if whole is None else whole
            lse = torch.logaddexp(lse, score.logsumexp(-1))
    # A row that sees nothing: exp(-inf - inf) is 0, where exp(-inf - -inf) is NaN.
    divisor = torch.where(lse == float("-inf"), float("inf"), lse)[..., None]
    for start, stop in bounds:
        score = _probe_scores(args, start, stop) if whole is None else whole
        p = score.sub_(divisor).exp_()
        column[..., start:stop] = p.mean(2)
        square[..., start:stop] = p.square().mean(2)
        if args.skip is not None:
            p.masked_fill_(args.skip[:, :, None, start:stop], 0.0)
        skew[..., start : stop + rows - 1] += _skewed_sum(p)
    diagonal = _lags_of_skew(skew, args.first_coordinate.long() + rows - 1, n) / rows
    return lse.float(), column.float(), square.float(), diagonal.float()


def _probe_scores(args: ProbeArgs, start: int, stop: int) -> Tensor:
    """[B, Hq, R, stop - start], float32 or float64; -inf where a row does not see the key."""
    q, k = args.q, args.k
    batch, heads, rows, dim = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    if args.order is None:
        key = torch.arange(start, stop, device=q.device)[None]
        k = k[:, :, start:stop]
    else:
        key = args.order[:, start:stop].long()
        row = key.clamp(0, k.shape[2] - 1).expand(batch, -1)[:, None, :, None]
        k = k.gather(2, row.expand(batch, k.shape[1], -1, dim))
    begin, end = args.key_range[:, :1], args.key_range[:, 1:]
    known = (key >= begin) & (key < end) & (key >= 0) & (key < args.k.shape[2])
    known = known & (args.first_position >= 0)[:, None]
    position = args.first_position.long()[:, None] + torch.arange(rows, device=q.device)
    seen = known[:, None] & (key[:, None] <= position[..., None])
    stacked = q.to(dtype).reshape(batch, k.shape[1], heads // k.shape[1] * rows, dim)
    score = (stacked @ k.to(dtype).mT).view(batch, heads, rows, stop - start)
    return score.masked_fill_(~seen[:, None], float("-inf"))


def _skewed_sum(p: Tensor) -> Tensor:
    """Sums along diagonals: [..., R, n] -> [..., n + R - 1]; entry s sums p[r, s - (R - 1) + r]."""
    rows, n = p.shape[-2:]
    if n < 2 * rows:
        # A padded row is R longer than p's; read with one column less, row r moves right by r.
        flat = torch.nn.functional.pad(p.flip(-2), (0, rows)).flatten(-2)
        flat = flat[..., : rows * (n + rows - 1)].unflatten(-1, (rows, n + rows - 1))
        return flat.sum(-2)
    # Diagonals that cross every row are read where they lie; the two corners are small.
    p = p.contiguous()
    strides = (*p.stride()[:-2], n + 1, 1)
    middle = p.as_strided((*p.shape[:-1], n - rows + 1), strides, p.storage_offset()).sum(-2)
    first, last = _skewed_sum(p[..., : rows - 1]), _skewed_sum(p[..., n - rows + 1 :])
    return torch.cat((first[..., : rows - 1], middle, last[..., rows - 1 :]), -1)


def _lags_of_skew(skew: Tensor, last: Tensor, n: int) -> Tensor:
    """[B, Hq, n] by lag, of `_skewed_sum`'s [B, Hq, m], whose entry s has lag last - s.

    Args:
        last: int64 [B], coordinate of the last row.
    """
    place = last[:, None] - torch.arange(n, device=skew.device)
    inside = (place >= 0) & (place < skew.shape[-1])
    place = torch.where(inside, place, 0)[:, None].expand(*skew.shape[:2], n)
    return torch.where(inside[:, None], skew.gather(-1, place), 0.0)
