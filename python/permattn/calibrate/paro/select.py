"""From block sums to block masks: thresholds, and the blocks that rules keep."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from permattn.calibrate.paro.options import SelectOptions
from permattn.core.plan import ceil_div
from permattn.patterns.paro import pack_bits


class BlockMeans(Protocol):
    """Mean block sums of a model, read one layer at a time."""

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """bins, layers, heads, query blocks, key blocks."""

    def mean(self, bin: int, layer: int) -> Tensor:
        """float32 [H, nq, nk]: attention mass of every block, mean over samples."""


@dataclass(frozen=True, eq=False)
class Selected:
    """Masks of a model.

    Args:
        packed_masks: uint8 [bins, L, H, bytes].
        empty_heads: bool [L, H].
        recall: float32 [bins, L, H], share of the mass of vision queries that is kept, text
            included.
    """

    packed_masks: Tensor
    empty_heads: Tensor
    recall: Tensor


def forced_blocks(num_tokens: int, block: tuple[int, int]) -> Tensor:
    """bool [nq, nk]: blocks that every mask keeps.

    Blocks that hold a token's own pair, so that no row is empty; and the last row and column where
    the last block is not whole: a sum over few tokens says little.
    """
    nq, nk = (ceil_div(num_tokens, size) for size in block)
    q, k = torch.arange(nq)[:, None] * block[0], torch.arange(nk)[None] * block[1]
    forced = (q < k + block[1]) & (k < q + block[0])
    if num_tokens % block[0]:
        forced[-1] = True
    if num_tokens % block[1]:
        forced[:, -1] = True
    return forced


def free_density(kept: Tensor, num_tokens: int, block: tuple[int, int]) -> Tensor:
    """The share of kept blocks among those that no rule forces; 1 where all are forced.

    Args:
        kept: integer [...], blocks that masks keep, forced ones included.
    """
    forced = forced_blocks(num_tokens, block)
    free = forced.numel() - int(forced.sum())
    return ((kept - int(forced.sum())) / free).clamp(0.0, 1.0) if free else torch.ones(kept.shape)


def select_blocks(
    means: BlockMeans,
    options: SelectOptions,
    *,
    num_tokens: int,
    block: tuple[int, int],
    has_text: bool,
) -> Selected:
    """Chooses the blocks of every mask.

    Of equal sums those with the lower bin, layer, head, row and column win, so that the number of
    blocks is exact and two runs choose alike.

    Args:
        means: block sums.
        options: density, scope and rules.
        num_tokens: vision tokens.
        block: (block_q, block_kv).
        has_text: whether vision queries see text keys too.

    Raises:
        ValueError: a layer whose recall is under `options.min_recall`.
    """
    bins, layers, heads, nq, nk = means.shape
    forced = forced_blocks(num_tokens, block)
    mass = torch.stack(
        [torch.stack([_vision_mass(means, b, n) for n in range(layers)]) for b in range(bins)]
    )
    limit = options.empty_below if has_text else 0.0
    empty = mass.mean(0) / num_tokens < limit
    keep = _Keeper(options, forced, means, empty)
    packed = torch.empty(bins, layers, heads, ceil_div(nq * nk, 8), dtype=torch.uint8)
    recall = torch.empty(bins, layers, heads)
    for b in range(bins):
        for n in range(layers):
            mean = means.mean(b, n)
            mask = keep(mean.where(~forced, 0.0), mean, n)
            mask &= ~empty[n][:, None, None]
            packed[b, n] = pack_bits(mask)
            lost = mean.double().where(~mask, 0.0).sum((-2, -1)) / num_tokens
            recall[b, n] = (1.0 - lost).clamp(0.0, 1.0)
    _check_recall(recall, options)
    return Selected(packed, empty, recall)


class _Keeper:
    """Masks of one layer after the other, bins outside."""

    def __init__(
        self, options: SelectOptions, forced: Tensor, means: BlockMeans, empty: Tensor
    ) -> None:
        self._options, self._forced, self._empty = options, forced, empty
        blocks = forced.numel()
        self._free = max(0, round(options.density * blocks) - int(forced.sum()))
        if options.scope == "model":
            bins, live = means.shape[0], int((~empty).sum())
            count = round(options.density * bins * live * blocks)
            count -= int(forced.sum()) * bins * live
            self._threshold = _global_threshold(means, forced, empty, count)

    def __call__(self, free: Tensor, mean: Tensor, layer: int) -> Tensor:
        """bool [H, nq, nk].

        Args:
            free: `mean` where blocks are free, zeros where they are forced.
            mean: float32 [H, nq, nk].
        """
        live = ~self._empty[layer]
        values = free.masked_fill(self._forced, -1.0).masked_fill(~live[:, None, None], -1.0)
        scope = self._options.scope
        if scope == "model":
            chosen = self._threshold.take(values)
        elif scope == "layer":
            wanted = round(self._options.density * self._forced.numel() * int(live.sum()))
            wanted -= int(self._forced.sum()) * int(live.sum())
            chosen = largest(values.flatten(), max(0, wanted)).view(mean.shape)
        elif scope == "head":
            chosen = torch.stack([largest(x.flatten(), self._free).view(x.shape) for x in values])
        else:
            chosen = torch.stack([self._covering(x, m) for x, m in zip(values, mean, strict=True)])
        return chosen | self._forced

    def _covering(self, values: Tensor, mean: Tensor) -> Tensor:
        """The fewest free blocks that hold, with the forced ones, their share of a head's mass."""
        wanted = self._options.coverage * mean.double().sum() - (mean.double() * self._forced).sum()
        held = values.flatten().clamp_min(0.0).double().sort(descending=True).values.cumsum(0)
        # A hair less than asked: a sum in another order may miss the last rounding.
        count = int((held < wanted * (1.0 - 1e-9)).sum()) + 1 if wanted > 0.0 else 0
        return largest(values.flatten(), min(count, self._free)).view(values.shape)


def largest(values: Tensor, count: int) -> Tensor:
    """bool [n]: the `count` largest of the values >= 0; of equals the first ones.

    Values below 0 are never taken.
    """
    count = min(count, int((values >= 0).sum()))
    if count <= 0:
        return torch.zeros(values.shape, dtype=torch.bool)
    least = values.kthvalue(values.numel() - count + 1).values
    above, equal = values > least, values == least
    return above | (equal & (equal.cumsum(0) <= count - int(above.sum())))


@dataclass
class _Threshold:
    """Values above `least` are taken, and the first `ties` of those equal to it."""

    least: float
    ties: int

    def take(self, values: Tensor) -> Tensor:
        """Of the next values, in order; uses up ties."""
        equal = values == self.least
        first = equal & (equal.flatten().cumsum(0).view(values.shape) <= self.ties)
        self.ties -= int(first.sum())
        return (values > self.least) | first


def _global_threshold(means: BlockMeans, forced: Tensor, empty: Tensor, count: int) -> _Threshold:
    """The threshold that keeps `count` free blocks of the whole model.

    Bits of floats >= 0 are in the order of the floats. One pass counts their upper halves, a second
    one the lower halves where the threshold lies: nothing is sorted or held.
    """
    if count <= 0:
        return _Threshold(float("inf"), 0)
    upper = torch.zeros(1 << 15, dtype=torch.int64)
    for bits in _free_bits(means, forced, empty):
        upper += torch.bincount(bits >> 16, minlength=1 << 15)
    count = min(count, int(upper.sum()))
    if count == 0:
        return _Threshold(float("inf"), 0)
    high, above = _bucket(upper, count)
    lower = torch.zeros(1 << 16, dtype=torch.int64)
    for bits in _free_bits(means, forced, empty):
        lower += torch.bincount(bits[bits >> 16 == high] & 0xFFFF, minlength=1 << 16)
    low, above = _bucket(lower, count, above)
    least = torch.tensor(high << 16 | low, dtype=torch.int32).view(torch.float32)
    return _Threshold(float(least), count - above)


def _bucket(histogram: Tensor, count: int, above: int = 0) -> tuple[int, int]:
    """The bucket with the `count`-th largest value, and how many values lie above it."""
    from_top = above + histogram.flip(0).cumsum(0)
    place = int((from_top < count).sum())
    bucket = histogram.numel() - 1 - place
    return bucket, int(from_top[place] - histogram[bucket])


def _free_bits(means: BlockMeans, forced: Tensor, empty: Tensor) -> Iterator[Tensor]:
    bins, layers = means.shape[:2]
    for b in range(bins):
        for n in range(layers):
            free = means.mean(b, n)[~empty[n]][:, ~forced]
            yield free.abs().flatten().view(torch.int32)


def _vision_mass(means: BlockMeans, bin: int, layer: int) -> Tensor:
    """float64 [H]: mass that vision queries put on vision keys."""
    mean = means.mean(bin, layer)
    if not bool((mean >= 0.0).all()) or not bool(mean.isfinite().all()):
        raise ValueError(f"layer {layer}: block sums are not finite; is its attention NaN?")
    return mean.double().sum((-2, -1))


def _check_recall(recall: Tensor, options: SelectOptions) -> None:
    per_layer = recall.mean((0, 2))
    worst = int(per_layer.argmin())
    if float(per_layer[worst]) < options.min_recall:
        raise ValueError(
            f"min_recall: layer {worst} keeps {float(per_layer[worst]):.4f} of its attention mass "
            f"at density {options.density:g}, wants {options.min_recall:g}; use a higher density"
        )
