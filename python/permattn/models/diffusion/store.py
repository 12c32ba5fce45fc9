"""The attention plans of a ParoPlan: built from packed bits when first asked for, and kept."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from permattn.core import AttnPart, AttnPlan, BlockIndex, Permutation, QuantSpec
from permattn.models.diffusion.prefetch import Prefetcher
from permattn.patterns.paro import ParoPlan

# Lists of a long video at many noise levels outgrow any memory (one layer of Wan 14B at 720p takes
# tens of megabytes), so what is kept is bounded; the rest is built again, on a GPU ahead of time.
KEPT_BYTES = {"cpu": 4 << 30, "cuda": 1 << 30}


@dataclass(frozen=True)
class PlanKey:
    """What decides an attention plan.

    Args:
        layer, bin: of the ParoPlan.
        num_text: joint text tokens.
        heads: (first, one past the last) head that runs here.
        num_ranks: parts that context parallelism cuts the tokens into; see `interleaved`.
    """

    layer: int
    bin: int
    num_text: int
    heads: tuple[int, int]
    num_ranks: int = 1


class PlanStore:
    """Plans of one transformer, by key and device.

    On the CPU, and on a GPU while they fit, lists are kept. Past `kept_bytes` the plan used
    longest ago goes first, those of other bins before those of the bin that runs. A GPU reads
    packed masks from pinned memory then, one layer ahead.

    Args:
        plan: orders and masks.
        quant: numerics of every plan.
        kept_bytes: bound of what is kept on a device; None = KEPT_BYTES of its kind.
    """

    def __init__(self, plan: ParoPlan, quant: QuantSpec, kept_bytes: int | None = None) -> None:
        self._plan, self._quant, self._limit = plan, quant, kept_bytes
        self._kept: OrderedDict[tuple[PlanKey, torch.device], AttnPlan] = OrderedDict()
        self._prefetchers: dict[torch.device, Prefetcher[PlanKey, AttnPlan]] = {}
        self.num_built = 0

    @property
    def num_bytes(self) -> int:
        """Of everything kept."""
        return sum(_bytes(plan) for plan in self._kept.values())

    def get(self, key: PlanKey, device: torch.device) -> AttnPlan:
        """The plan of a key on a device. Nothing waits for the device."""
        found = self._kept.get((key, device))
        if found is None:
            found = self._make(key, device)
            self._keep(key, device, found)
        else:
            self._kept.move_to_end((key, device))
        return found

    def masked(self, key: PlanKey, device: torch.device, visible: Tensor) -> AttnPlan:
        """The plan of a key whose text is padded: bool [B, text tokens], True = seen."""
        first, stop = key.heads
        if stop - first == 1 and key.num_text == self._plan.num_vision_tokens:
            # One head, as much text as vision: sizes do not tell the parts apart.
            made = self._plan.attn_plan(
                key.layer,
                key.bin,
                num_text_tokens=key.num_text,
                heads=slice(first, stop),
                text_visible=visible,
                quant=self._quant,
                device=device,
            )
            return self._in_rows(made, key)
        return _with_text_visible(self.get(key, device), visible)

    def _make(self, key: PlanKey, device: torch.device) -> AttnPlan:
        if device.type != "cuda":
            return self._build(key, None, device)
        prefetcher = self._prefetchers.get(device)
        if prefetcher is None:
            prefetcher = Prefetcher.on_cuda(self._plan.packed_masks, device, self._build_packed)
            self._prefetchers[device] = prefetcher
        plan = prefetcher.take(key)
        following = replace(key, layer=(key.layer + 1) % self._plan.num_layers)
        if (following, device) not in self._kept:
            prefetcher.start(following)
        return plan

    def _build_packed(self, key: PlanKey, packed: Tensor) -> AttnPlan:
        return self._build(key, packed, packed.device)

    def _build(self, key: PlanKey, packed: Tensor | None, device: torch.device) -> AttnPlan:
        self.num_built += 1
        heads = slice(*key.heads)
        made = self._plan.attn_plan(
            key.layer,
            key.bin,
            num_text_tokens=key.num_text,
            heads=heads,
            packed=None if packed is None else packed[heads],
            quant=self._quant,
            device=device,
        )
        return self._in_rows(made, key)

    def _in_rows(self, plan: AttnPlan, key: PlanKey) -> AttnPlan:
        if key.num_ranks == 1 or key.num_text == 0:
            return plan
        rows = interleaved(self._plan, key.num_text, key.num_ranks)
        return _moved(plan, rows.to(plan.parts[0].index.kv_indices.device))

    def _keep(self, key: PlanKey, device: torch.device, plan: AttnPlan) -> None:
        limit = KEPT_BYTES.get(device.type, KEPT_BYTES["cpu"])
        limit = limit if self._limit is None else self._limit
        size = _bytes(plan)
        used = sum(_bytes(p) for (_, where), p in self._kept.items() if where == device) + size
        mine = [entry for entry in self._kept if entry[1] == device]
        for entry in sorted(mine, key=lambda entry: entry[0].bin == key.bin):
            if used <= limit:
                break
            if entry[0].bin == key.bin:
                # Layers of a bin come round in turn: to drop the oldest would drop every one
                # right before it is asked for. Those that fit stay.
                return
            used -= _bytes(self._kept.pop(entry))
        if used <= limit:
            self._kept[key, device] = plan


def interleaved(plan: ParoPlan, num_text: int, num_ranks: int) -> Tensor:
    """Where every token stands after the all-to-all of Ulysses attention.

    Each rank holds its share of the text beside its share of the vision tokens, so that joint
    sequences come out as [text 0, vision 0, text 1, vision 1, ...] for text in front.

    Returns: int64 [S], row of every token of the plain order.
    """
    total = num_text + plan.num_vision_tokens
    text_share, vision_share = num_text // num_ranks, plan.num_vision_tokens // num_ranks
    token = torch.arange(total).view(num_ranks, text_share + vision_share)
    if plan.text == "prefix":
        text, vision = token[:, :text_share], token[:, text_share:]
        return torch.cat((text.flatten(), vision.flatten()))
    vision, text = token[:, :vision_share], token[:, vision_share:]
    return torch.cat((vision.flatten(), text.flatten()))


def _with_text_visible(plan: AttnPlan, visible: Tensor) -> AttnPlan:
    """A plan of two parts in which some text keys are not seen.

    Args:
        plan: of vision and text.
        visible: bool [B, text tokens].
    """
    num_text = visible.shape[1]
    # The text part has as many keys as there is text, in one order for all heads.
    text = min(plan.parts, key=lambda p: (p.kv_perm.num_slots != num_text, _heads(p.kv_perm)))
    token = torch.where(visible[:, None], text.kv_perm.token_of_slot, -1)
    index = text.index
    partial = BlockIndex(
        index.kv_indices,
        index.row_offsets,
        torch.zeros_like(index.kv_num_full),
        index.block_q,
        index.block_kv,
    )
    masked = AttnPart(
        text.q_perm,
        Permutation.from_token_of_slot(token, plan.num_kv_tokens, validate=False),
        partial,
        text.band,
    )
    parts = tuple(masked if part is text else part for part in plan.parts)
    return AttnPlan(parts, plan.quant, validate=False)


def _moved(plan: AttnPlan, row_of_token: Tensor) -> AttnPlan:
    """The plan for tokens that stand in other rows; parts that shared an order still do."""
    made: dict[int, Permutation] = {}

    def moved(perm: Permutation) -> Permutation:
        if id(perm) not in made:
            token = perm.token_of_slot
            row = row_of_token[token.clamp_min(0).long()].to(torch.int32)
            row = torch.where(token < 0, -1, row)
            made[id(perm)] = Permutation.from_token_of_slot(row, perm.num_tokens, validate=False)
        return made[id(perm)]

    parts = tuple(AttnPart(moved(p.q_perm), moved(p.kv_perm), p.index, p.band) for p in plan.parts)
    return AttnPlan(parts, plan.quant, validate=False)


def _heads(perm: Permutation) -> int:
    return perm.token_of_slot.shape[1]


def _bytes(plan: AttnPlan) -> int:
    """Of its tensors; those that parts share count once."""
    tensors = {id(x): x for part in plan.parts for x in part.tensors()}
    return sum(x.numel() * x.element_size() for x in tensors.values())
