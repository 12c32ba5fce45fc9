"""Attention of single heads in blocks: before and after reordering, and what a plan keeps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from permattn.cli.demo_paro.constructed import Sizes, kind_of
from permattn.cli.demo_paro.pipeline import ConstructedWan
from permattn.core.axis_order import ORDER_NAMES, cells_in_order
from permattn.models.diffusion import Observation, observe
from permattn.patterns.paro import ParoPlan

_ROWS = 512


@dataclass(frozen=True, eq=False)
class HeadMap:
    """One head of one layer at one noise level.

    Args:
        layer, head, name: which, and what it is built to do.
        order: the name of its order.
        before, after: float32 [nq, nk], mass of every block in FHW order and in its own; rows of a
            whole map sum to 1.
        mask: bool [nq, nk], the blocks that the plan keeps, in the order of the head.
    """

    layer: int
    head: int
    name: str
    order: str
    before: Tensor
    after: Tensor
    mask: Tensor

    @property
    def kept(self) -> float:
        """Share of the mass that the plan keeps."""
        return float((self.after * self.mask).sum() / self.after.sum())

    @property
    def kept_before(self) -> float:
        """The most that as many blocks can hold in FHW order."""
        most = self.before.flatten().topk(int(self.mask.sum())).values
        return float(most.sum() / self.before.sum())

    @property
    def density(self) -> float:
        return float(self.mask.float().mean())


def block_map(q: Tensor, k: Tensor, tokens: Tensor, block: tuple[int, int]) -> Tensor:
    """Softmax mass of every block; mean over the rows of a block.

    Args:
        q, k: [S, D] of one head.
        tokens: int64 [S], the token of every slot.
        block: (block_q, block_kv).

    Returns: float32 [nq, nk] on the CPU. A map of any length is made a few rows at a time.
    """
    q, k = q[tokens].float(), k[tokens].float()
    size, (block_q, block_kv) = len(tokens), block
    rows = max(1, _ROWS // block_q) * block_q
    out = []
    for first in range(0, size, rows):
        part = q[first : first + rows]
        mass = torch.softmax(part @ k.mT * q.shape[-1] ** -0.5, -1)
        pad = (0, -size % block_kv, 0, -len(part) % block_q)
        mass = torch.nn.functional.pad(mass, pad)
        cut = mass.view(-1, block_q, mass.shape[1] // block_kv, block_kv)
        sums = cut.sum((1, 3))
        real = (len(part) - block_q * torch.arange(len(sums))).clamp_max(block_q)
        out.append(sums.cpu() / real[:, None])
    return torch.cat(out)


def head_maps(
    made: ConstructedWan, plan: ParoPlan, photo: int, layer: int, count: int, sizes: Sizes
) -> list[HeadMap]:
    """Maps of the first `count` heads of a layer, those that reordering changes most first."""
    seen: list[Observation] = []

    def keep(observation: Observation) -> None:
        if observation.layer == layer and not seen:
            # Views of what the model goes on to use.
            q, k = observation.q.clone(), observation.k.clone()
            seen.append(replace(observation, q=q, k=k))

    once = replace(made, steps=1)
    with observe(made.pipe, keep), torch.no_grad():
        made.pipe(**once.call(photo))
    found = seen[0]
    masks = plan.block_mask(layer, plan.bin_of(found.sigma))
    maps = []
    for head in range(min(found.q.shape[1], masks.shape[0])):
        q, k = found.q[0, head], found.k[0, head]
        order = int(plan.axis_orders[layer, head])
        raster = torch.arange(made.num_tokens)
        own = cells_in_order(made.grid, torch.tensor(order)).long()
        maps.append(
            HeadMap(
                layer,
                head,
                kind_of(sizes, layer, head).name,
                ORDER_NAMES[order],
                block_map(q, k, raster, plan.block),
                block_map(q, k, own, plan.block),
                masks[head],
            )
        )
    maps.sort(key=lambda m: m.kept_before - m.kept)
    return maps[:count]
