"""The plan: everything an attention call needs but q, k and v."""

from __future__ import annotations

from dataclasses import InitVar, dataclass

import torch
from torch import Tensor
from torch.utils import _pytree

from permattn.core.block_index import BlockIndex
from permattn.core.permutation import Permutation
from permattn.core.quant import QuantSpec


@dataclass(frozen=True)
class TokenBand:
    """The one mask rule, on token positions.

    A pair is visible iff both tokens exist and `min_lag <= q_token - kv_token < max_lag`.

    Args:
        min_lag: 0 = causal (upper-left); Sq - Skv = causal (lower-right); w = "causal, and outside
            the local window w". None = no lower bound.
        max_lag: w = inside the local window w. None = no upper bound.
    """

    min_lag: int | None = None
    max_lag: int | None = None


@dataclass(frozen=True, eq=False)
class AttnPart:
    """One "permute, list blocks, attend, put back".

    Args:
        q_perm: order of the queries; parts that share the same object are computed together.
        kv_perm: order of the keys and values.
        index: key blocks (of kv_perm's slots) per query block (of q_perm's slots).
        band: the mask rule of the partial blocks.
    """

    q_perm: Permutation
    kv_perm: Permutation
    index: BlockIndex
    band: TokenBand

    def __post_init__(self) -> None:
        want = ceil_div(self.q_perm.num_slots, self.index.block_q)
        if self.index.num_q_blocks != want:
            raise ValueError(
                f"AttnPart.index: {self.q_perm.num_slots} query slots in blocks of "
                f"{self.index.block_q} want {want} rows, got {self.index.num_q_blocks}"
            )

    @property
    def num_kv_blocks(self) -> int:
        return ceil_div(self.kv_perm.num_slots, self.index.block_kv)

    def tensors(self) -> tuple[Tensor, ...]:
        """The seven tensors of a part, in the order every backend knows."""
        return (
            self.q_perm.token_of_slot,
            self.q_perm.slot_of_token,
            self.kv_perm.token_of_slot,
            self.kv_perm.slot_of_token,
            self.index.kv_indices,
            self.index.row_offsets,
            self.index.kv_num_full,
        )


@dataclass(frozen=True, eq=False)
class AttnPlan:
    """A set of parts under one softmax. Immutable; a pytree; see `save_plan` for files.

    Args:
        parts: disjoint sets of (query, key) pairs. They are kept in an order of their own (by
            sizes and bands), so that the order in which they are given changes no bit of a result;
            parts of the same sizes and band keep the given order.
        quant: numerics; its scales must divide the blocks of every part.
        validate: check every index value now (a few device syncs). Planners that made the values
            themselves switch it off.

    Raises:
        ValueError: sizes, devices or values that do not fit; the message names the field.

    Invariants: a (query, key) pair lies in at most one part. A query without any visible key gives
    `out = 0`, `lse = -inf`.
    """

    parts: tuple[AttnPart, ...]
    quant: QuantSpec = QuantSpec()
    validate: InitVar[bool] = True

    def __post_init__(self, validate: bool) -> None:
        if not self.parts:
            raise ValueError("AttnPlan.parts: wants at least one part, got none")
        object.__setattr__(self, "parts", tuple(sorted(self.parts, key=_sizes)))
        first = self.parts[0]
        for i, part in enumerate(self.parts):
            sizes = (part.q_perm.num_tokens, part.kv_perm.num_tokens)
            want = (first.q_perm.num_tokens, first.kv_perm.num_tokens)
            if sizes != want:
                raise ValueError(
                    f"AttnPlan.parts[{i}]: made for (Sq, Skv) = {sizes}, the first part for {want}"
                )
            self.quant.check_blocks(part.index.block_q, part.index.block_kv)
            devices = {x.device for x in part.tensors()} | {first.index.kv_indices.device}
            if len(devices) != 1:
                raise ValueError(f"AttnPlan.parts[{i}]: tensors lie on {sorted(map(str, devices))}")
        if validate:
            self.check_values()

    @property
    def num_q_tokens(self) -> int:
        return self.parts[0].q_perm.num_tokens

    @property
    def num_kv_tokens(self) -> int:
        return self.parts[0].kv_perm.num_tokens

    @property
    def device(self) -> torch.device:
        return self.parts[0].index.kv_indices.device

    def distinct_permutations(self) -> tuple[list[Permutation], list[tuple[int, int]]]:
        """Every permutation object once, and the numbers of each part's (q_perm, kv_perm)."""
        perms: list[Permutation] = []

        def number(perm: Permutation) -> int:
            for i, other in enumerate(perms):
                if other is perm:
                    return i
            perms.append(perm)
            return len(perms) - 1

        numbers = [(number(part.q_perm), number(part.kv_perm)) for part in self.parts]
        return perms, numbers

    def q_groups(self) -> tuple[int, ...]:
        """Group number of every part: parts that share a q_perm object share a group."""
        q_numbers = [q for q, _ in self.distinct_permutations()[1]]
        order = list(dict.fromkeys(q_numbers))
        return tuple(order.index(q) for q in q_numbers)

    def leading_sizes(self) -> tuple[int, int]:
        """The largest batch and head axes among the plan's tensors (1 = broadcast)."""
        shapes = [x.shape[:2] for part in self.parts for x in part.tensors()]
        return max(s[0] for s in shapes), max(s[1] for s in shapes)

    def check_values(self) -> None:
        """Checks every permutation, list and full mark; raises ValueError at the first fault."""
        for i, part in enumerate(self.parts):
            try:
                part.q_perm.validate()
                part.kv_perm.validate()
                part.index.validate(part.num_kv_blocks)
                check_full_blocks(part)
            except ValueError as e:
                raise ValueError(f"AttnPlan.parts[{i}]: {e}") from None

    def to(self, device: torch.device | str) -> AttnPlan:
        """The same plan with its tensors on `device`; shared permutations stay shared."""
        leaves, spec = _pytree.tree_flatten(self)
        return _pytree.tree_unflatten([x.to(device) for x in leaves], spec)

    def num_block_pairs(self) -> Tensor:
        """int64 [Bx, Hx]: (query slot, key slot) pairs in listed blocks: what a kernel computes."""
        total: Tensor | int = 0
        for part in self.parts:
            total = total + part.index.num_entries() * (part.index.block_q * part.index.block_kv)
        assert isinstance(total, Tensor)
        return total

    def density(self, *, causal: bool = True) -> float:
        """Computed pairs over all (or all causal, lower-right) pairs, mean over heads. Syncs."""
        sq, skv = self.num_q_tokens, self.num_kv_tokens
        pairs = sq * skv
        if causal:
            hidden = min(sq, skv)
            pairs = sq * skv - hidden * (hidden - 1) // 2
        return float(self.num_block_pairs().double().mean()) / max(pairs, 1)


def _sizes(part: AttnPart) -> tuple[float, ...]:
    """What the host knows of a part, as a sort key."""
    index, band = part.index, part.band
    return (
        index.block_q,
        index.block_kv,
        -index.num_q_blocks,
        -part.kv_perm.num_slots,
        float("-inf") if band.min_lag is None else band.min_lag,
        float("inf") if band.max_lag is None else band.max_lag,
        index.capacity,
    )


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def block_token_range(token_of_slot: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lowest and highest token of every block of slots, and whether it has holes.

    Returns: (low, high, has_hole), each [Bx, Hx, num_blocks]; an empty block has low > high.
    """
    n = token_of_slot.shape[-1]
    pad = ceil_div(n, block) * block - n
    big = torch.iinfo(torch.int32).max
    token = torch.nn.functional.pad(token_of_slot, (0, pad), value=-2)
    token = token.unflatten(-1, (-1, block))
    low = torch.where(token < 0, big, token).amin(-1)
    return low, token.amax(-1).clamp_min(-1), (token == -1).any(-1)


def check_full_blocks(part: AttnPart) -> None:
    """Raises ValueError when a block marked full holds a pair that the band or a hole hides."""
    index = part.index
    if index.capacity == 0 or index.num_q_blocks == 0 or part.num_kv_blocks == 0:
        return
    heads = [x.shape[:2] for x in part.tensors()]
    bx, hx = max(s[0] for s in heads), max(s[1] for s in heads)
    row = index.entry_row().clamp_max(index.num_q_blocks - 1).expand(bx, hx, -1)
    kv = index.kv_indices.long().clamp(0, part.num_kv_blocks - 1).expand(bx, hx, -1)
    full = index.entry_is_full().expand(bx, hx, -1)
    q_low, q_high, _ = (
        x.expand(bx, hx, -1).gather(-1, row)
        for x in block_token_range(part.q_perm.token_of_slot, index.block_q)
    )
    kv_low, kv_high, kv_hole = (
        x.expand(bx, hx, -1).gather(-1, kv)
        for x in block_token_range(part.kv_perm.token_of_slot, index.block_kv)
    )
    hidden = kv_hole.clone()
    if part.band.min_lag is not None:
        hidden |= q_low.long() - kv_high.long() < part.band.min_lag
    if part.band.max_lag is not None:
        hidden |= q_high.long() - kv_low.long() >= part.band.max_lag
    # A query block of holes only has no queries: whatever it lists, nobody looks.
    hidden &= q_high >= 0
    if bool((full & hidden).any()):
        raise ValueError(
            "BlockIndex.kv_num_full: a block marked full has a hole or a pair outside its band"
        )


def _flatten(plan: AttnPlan):
    """Leaves: every distinct tensor once, so that shared permutations stay shared."""
    perms, numbers = plan.distinct_permutations()
    leaves: list[Tensor] = []
    parts = []
    for part, (q, kv) in zip(plan.parts, numbers, strict=True):
        index = part.index
        parts.append((q, kv, index.block_q, index.block_kv, part.band))
        leaves += [index.kv_indices, index.row_offsets, index.kv_num_full]
    for perm in perms:
        leaves += [perm.token_of_slot, perm.slot_of_token]
    return leaves, (tuple(parts), tuple(p.is_identity for p in perms), plan.quant)


def _unflatten(leaves, context) -> AttnPlan:
    parts, identities, quant = context
    leaves = list(leaves)
    base = 3 * len(parts)
    perms = []
    for i, is_identity in enumerate(identities):
        perm = object.__new__(Permutation)
        values = (leaves[base + 2 * i], leaves[base + 2 * i + 1], is_identity)
        for name, value in zip(
            ("token_of_slot", "slot_of_token", "is_identity"), values, strict=True
        ):
            object.__setattr__(perm, name, value)
        perms.append(perm)
    made = []
    for i, (q, kv, block_q, block_kv, band) in enumerate(parts):
        # tree_map may put anything in place of a tensor, so no field is checked here.
        index = object.__new__(BlockIndex)
        names = ("kv_indices", "row_offsets", "kv_num_full", "block_q", "block_kv")
        for name, value in zip(names, (*leaves[3 * i : 3 * i + 3], block_q, block_kv), strict=True):
            object.__setattr__(index, name, value)
        part = object.__new__(AttnPart)
        for name, value in zip(
            ("q_perm", "kv_perm", "index", "band"), (perms[q], perms[kv], index, band), strict=True
        ):
            object.__setattr__(part, name, value)
        made.append(part)
    plan = object.__new__(AttnPlan)
    object.__setattr__(plan, "parts", tuple(made))
    object.__setattr__(plan, "quant", quant)
    return plan


_pytree.register_pytree_node(
    AttnPlan, _flatten, _unflatten, serialized_type_name="permattn.AttnPlan"
)
