"""Streams: which queries meet which keys under one pattern, and the orders in which they lie.

A head without a boundary is one stream: all queries, all keys. A Q-boundary makes one stream per
query modality, a 2D-boundary one per pair of query and key modality. Streams of a head share no
(query, key) pair, so their parts add up to one softmax, and causality stays on token positions.

Source: MMInference (arXiv 2504.16083), section 3.2 and Algorithms 2, 3, 6 and 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from permattn.core import Permutation
from permattn.core.plan import ceil_div
from permattn.patterns.mminference.config import HeadPattern
from permattn.patterns.mminference.prompt import Prompt

BLOCK = 64


@dataclass(frozen=True, eq=False)
class Axis:
    """An ascending order of key positions. A place on it is a coordinate, and a slot of `perm`.

    Args:
        position: int64 [Bx, n] on the host: position of every coordinate; Skv past the end.
        start, stop: int64 [Bx, 1] on the host: coordinates before and after which there is no key.
        perm: on the device; holes where the coordinate is no key of the stream.
        order: int32 [Bx, n] on the device, -1 where there is no key; None where coordinates are
            positions.
        has_holes: keys are missing between start and stop.
    """

    position: Tensor
    start: Tensor
    stop: Tensor
    perm: Permutation
    order: Tensor | None
    has_holes: bool

    @property
    def size(self) -> int:
        return self.position.shape[-1]

    def coordinate(self, position: Tensor) -> Tensor:
        """How many coordinates lie before a position, within [start, stop]: int64 [Bx or B, m].

        Args:
            position: int64 [1 or B, m] on the host.
        """
        if self.order is not None:
            batch = max(self.position.shape[0], position.shape[0])
            axis = self.position.expand(batch, -1).contiguous()
            position = torch.searchsorted(axis, position.expand(batch, -1).contiguous())
        return torch.minimum(torch.maximum(position, self.start), self.stop)


@dataclass(frozen=True, eq=False)
class QueryBlocks:
    """Blocks of 64 neighbouring coordinates, those that hold a query of the stream.

    Args:
        home: int64 [Bx, nQ] on the host: coordinate of every block's first slot.
        first, last: int64 [Bx, nQ] on the host: positions of its first and last query; a block that
            fills up a batch row has first = Skv and last = -1.
        perm: on the device; holes where the slot is no query of the stream.
    """

    home: Tensor
    first: Tensor
    last: Tensor
    perm: Permutation

    @property
    def count(self) -> int:
        return self.home.shape[-1]


@dataclass(frozen=True, eq=False)
class Stream:
    """Queries of one modality over keys of one modality (None = all).

    Args:
        heads: what every head does here.
        mine: which heads have this stream.
        axis, blocks: where keys and queries lie.
        slash_axis, slash_blocks: an axis that keys and queries share, so that a lag is a distance
            on it. The same objects, but for two different modalities: there it is the prompt.
        is_query: bool [Bx, 1, Sq] on the device; is_key: bool [Bx, 1, Skv].
    """

    query: str | None
    key: str | None
    heads: tuple[HeadPattern, ...]
    mine: tuple[bool, ...]
    axis: Axis
    blocks: QueryBlocks
    slash_axis: Axis
    slash_blocks: QueryBlocks
    is_query: Tensor
    is_key: Tensor

    def any(self, name: str) -> bool:
        """Whether a head of this stream has a property of `HeadPattern`."""
        return any(getattr(h, name) for h, m in zip(self.heads, self.mine, strict=True) if m)

    def flag(self, name: str) -> Tensor:
        """bool [Hq, 1]: heads of this stream that have a property of `HeadPattern`."""
        pairs = zip(self.heads, self.mine, strict=True)
        return torch.tensor([m and bool(getattr(h, name)) for h, m in pairs], device=self.device)[
            :, None
        ]

    def each(self, name: str) -> Tensor:
        """int64 [Hq, 1]: a number of every head; 0 for those that are not of this stream."""
        pairs = zip(self.heads, self.mine, strict=True)
        return torch.tensor([int(getattr(h, name)) * m for h, m in pairs], device=self.device)[
            :, None
        ]

    def most(self, name: str, where: str | None = None) -> int:
        """The largest number among the heads of this stream (that have the property `where`)."""
        pairs = zip(self.heads, self.mine, strict=True)
        return max((getattr(h, name) for h, m in pairs if m and (not where or getattr(h, where))))

    @property
    def device(self) -> torch.device:
        return self.is_query.device


@lru_cache(maxsize=16)
def describe_streams(prompt: Prompt, heads: tuple[HeadPattern, ...]) -> tuple[Stream, ...]:
    """The streams of all heads that have at least one query and one key."""
    pairs: dict[tuple[str | None, str | None], None] = {}
    for head in dict.fromkeys(heads):
        pairs.update(dict.fromkeys(_pairs_of(head, prompt.names)))
    builder = _Builder(prompt)
    found = []
    for query, key in pairs:
        wanted = prompt.of(query)
        wanted[:, : prompt.q_offset] = False
        if not (bool(wanted.any()) and bool(prompt.of(key).any())):
            continue
        mine = tuple((query, key) in _pairs_of(h, prompt.names) for h in heads)
        own = tuple(h.between(query or "", key or "") for h in heads)
        found.append(builder.stream(query, key, own, mine))
    return tuple(found)


def _pairs_of(head: HeadPattern, names: Sequence[str]) -> list[tuple[str | None, str | None]]:
    if head.boundary == "q":
        return [(name, None) for name in names]
    if head.boundary == "2d":
        return [(query, key) for query in names for key in names]
    return [(None, None)]


class _Builder:
    """Makes every axis and every set of query blocks once, so that parts share permutations."""

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self.axes: dict[tuple[str | None, bool], Axis] = {}
        self.blocks: dict[tuple[str | None, str | None], QueryBlocks] = {}

    def stream(
        self,
        query: str | None,
        key: str | None,
        heads: tuple[HeadPattern, ...],
        mine: tuple[bool, ...],
    ) -> Stream:
        prompt = self.prompt
        with torch.inference_mode(False):
            axis = self.axis(key, compact=key is not None)
            # With a 2D-boundary queries lie in the compact order of their own modality.
            blocks = self.query_blocks(query, query if key is not None else None)
            slash = (axis, blocks)
            if key is not None and key != query:
                slash = (self.axis(key, compact=False), self.query_blocks(query, None))
            return Stream(
                query,
                key,
                heads,
                mine,
                axis,
                blocks,
                *slash,
                _rows_alike(prompt.of(query)[:, prompt.q_offset :])[:, None].to(prompt.device),
                _rows_alike(prompt.of(key))[:, None].to(prompt.device),
            )

    def axis(self, key: str | None, compact: bool) -> Axis:
        if (key, compact) not in self.axes:
            keys = _rows_alike(self.prompt.of(key))
            make = _compact_axis if compact else _prompt_axis
            self.axes[key, compact] = make(keys, self.prompt.device)
        return self.axes[key, compact]

    def query_blocks(self, query: str | None, along: str | None) -> QueryBlocks:
        """The queries of a modality, in the order of one modality or of the prompt."""
        if (query, along) not in self.blocks:
            axis = self.axis(along, compact=along is not None)
            self.blocks[query, along] = _query_blocks(self.prompt, axis, self.prompt.of(query))
        return self.blocks[query, along]


def _rows_alike(x: Tensor) -> Tensor:
    """One batch row where all are equal."""
    return x[:1] if bool((x == x[:1]).all()) else x


def _prompt_axis(keys: Tensor, device: torch.device) -> Axis:
    """Coordinate = position, with holes."""
    n = keys.shape[-1]
    position = torch.arange(n)
    some = keys.any(-1, keepdim=True)
    start = torch.where(some, keys.int().argmax(-1, keepdim=True), n)
    stop = torch.where(some, n - keys.flip(-1).int().argmax(-1, keepdim=True), n)
    perm = Permutation.identity(n, device)
    if not bool(keys.all()):
        perm = perm.without_tokens(~keys[:, None].to(device))
    has_holes = bool((keys.sum(-1, keepdim=True) != stop - start).any())
    return Axis(position.expand(keys.shape), start, stop, perm, None, has_holes)


def _compact_axis(keys: Tensor, device: torch.device) -> Axis:
    """Only the keys, one after the other."""
    n = keys.shape[-1]
    count = keys.sum(-1, keepdim=True)
    # A stable sort brings the keys to the front in their order.
    position = torch.argsort((~keys).to(torch.uint8), dim=-1, stable=True)[:, : int(count.max())]
    missing = torch.arange(position.shape[-1]) >= count
    token = position.masked_fill(missing, -1).to(device, torch.int32)
    perm = Permutation.from_token_of_slot(token[:, None], n, validate=False)
    position = position.masked_fill(missing, n).contiguous()
    return Axis(position, torch.zeros_like(count), count, perm, token, False)


def _query_blocks(prompt: Prompt, axis: Axis, wanted: Tensor) -> QueryBlocks:
    wanted = _rows_alike(wanted)
    batch = max(wanted.shape[0], axis.position.shape[0])
    n = prompt.num_kv
    first = torch.tensor([[prompt.q_offset]])
    # The prompt's own order starts at the first query, padded or not: a plain prefill is identity.
    if axis.order is not None:
        first = axis.coordinate(first)
    first = first.expand(batch, 1)
    blocks = max(1, ceil_div(axis.size - int(first.min()), BLOCK))
    place = first[..., None] + torch.arange(blocks * BLOCK).view(1, blocks, BLOCK)
    position = torch.nn.functional.pad(axis.position, (0, 1), value=n).expand(batch, -1)
    position = position.gather(-1, place.clamp_max(axis.size).flatten(1)).view(place.shape)
    wanted = torch.nn.functional.pad(wanted, (0, 1)).expand(batch, -1)
    is_query = wanted.gather(-1, position.flatten(1)).view(place.shape)
    kept = is_query.any(-1)
    count = int(kept.sum(-1).max())
    pick = torch.argsort((~kept).to(torch.uint8), dim=-1, stable=True)[:, :count]
    home = place[..., 0].gather(-1, pick)
    pick = pick[..., None].expand(batch, count, BLOCK)
    position, is_query = position.gather(1, pick), is_query.gather(1, pick)
    token = torch.where(is_query, position - prompt.q_offset, -1)
    low = torch.where(is_query, position, n).amin(-1)
    high = torch.where(is_query, position, -1).amax(-1)
    flat = token.flatten(1)
    plain = torch.arange(flat.shape[-1])
    plain = torch.where(plain < prompt.num_q, plain, -1)
    if batch == 1 and torch.equal(flat[0], plain):
        perm = Permutation.identity(prompt.num_q, prompt.device)
    else:
        token = flat[:, None].to(prompt.device, torch.int32)
        perm = Permutation.from_token_of_slot(token, prompt.num_q, validate=False)
    return QueryBlocks(home, low, high, perm)
