"""A plan measured on a run: what it keeps of the attention mass, and how far its output is off."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from permattn.api import sparse_attention_with_lse
from permattn.block_mass import block_mass
from permattn.calibrate.paro.bins import spread
from permattn.calibrate.paro.measure import Subject, everything
from permattn.calibrate.paro.pipelines import Prompt, call_pipe, check_prompts
from permattn.core import TokenGrid
from permattn.patterns.paro import ParoPlan, vision_tokens


@dataclass(frozen=True, eq=False)
class HeadMap:
    """Block masses of one head, and the mask of its plan; text is left out.

    Args:
        layer, head: which.
        sigma: noise level of the step.
        before: float32 [nq, nk], vision tokens in the model's own order.
        after: float32 [nq, nk], in the order of the head.
        mask: bool [nq, nk].
        recall: share of the mass of vision queries that this head keeps at this step.
    """

    layer: int
    head: int
    sigma: float
    before: Tensor
    after: Tensor
    mask: Tensor
    recall: float


@dataclass(frozen=True, eq=False)
class PlanCheck:
    """What a plan does to the heads of a model, mean over the steps that were looked at.

    Args:
        recall: float32 [L, H], share of the attention mass of vision queries that is kept.
        error: float32 [L, H], norm of the error of the attention output over its norm.
        maps: of the heads that were asked for.
    """

    recall: Tensor
    error: Tensor
    maps: tuple[HeadMap, ...]


def check_plan(
    pipe: Any,
    prompt: Prompt,
    plan: ParoPlan,
    *,
    component: str = "transformer",
    num_steps: int = 3,
    maps: Sequence[tuple[int, int]] = (),
    on_progress: Callable[[float], object] = lambda done: None,
    backend: str = "auto",
    **call_kwargs: Any,
) -> PlanCheck:
    """Runs a pipeline dense on one prompt and measures a plan beside, on exact inputs.

    Args:
        pipe: see `calibrate`.
        prompt: one prompt.
        plan: for this pipeline.
        component: which transformer of a pipeline with several.
        num_steps: how many steps to look at, evenly spread.
        maps: (layer, head) pairs whose maps to keep.
        on_progress: called with the share in [0, 1].
        backend: see `permattn.sparse_attention`.
        call_kwargs: arguments of the pipeline.

    Raises:
        ValueError: a plan for another model or grid; names both.
    """
    from permattn.models.diffusion import describe, observe

    check_subject(plan, describe(pipe, component=component))
    call = check_prompts([prompt], call_kwargs)[0]
    checking = _Checking(plan, num_steps, frozenset(maps), on_progress, backend)
    with observe(pipe, checking.see, component=component), torch.no_grad():
        call_pipe(pipe, call, seed=0)
    return checking.found()


def check_subject(plan: ParoPlan, subject: Subject) -> None:
    """Raises ValueError unless a plan was made for a model of this class and size."""
    want: Mapping[str, Any] = {
        "model_class": plan.origin.model_class,
        "num_layers": plan.num_layers,
        "num_heads": plan.num_heads,
        "head_dim": plan.origin.head_dim,
        "text": plan.text,
    }
    for name, value in want.items():
        if getattr(subject, name) != value:
            raise ValueError(
                f"plan: was made for a model with {name} = {value!r}, this one has "
                f"{getattr(subject, name)!r}"
            )


class _Checking:
    """Sums over the calls of a run."""

    def __init__(
        self,
        plan: ParoPlan,
        num_steps: int,
        maps: frozenset[tuple[int, int]],
        on_progress: Callable[[float], object],
        backend: str,
    ) -> None:
        self._plan, self._num_steps, self._wanted = plan, num_steps, maps
        self._on_progress, self._backend = on_progress, backend
        self._sigmas: list[float] = []
        shape = (plan.num_layers, plan.num_heads)
        self._kept, self._error2, self._norm2 = (torch.zeros(shape).double() for _ in range(3))
        self._calls = torch.zeros(plan.num_layers, 1)
        self._maps: dict[tuple[int, int], HeadMap] = {}

    def see(self, seen: Any) -> None:
        """Measures one call, or passes it by."""
        plan = self._plan
        grid = (seen.grid.frames, seen.grid.height, seen.grid.width)
        if grid != plan.grid:
            raise ValueError(
                f"plan: was made for a grid of {plan.grid} tokens, this run has {grid}"
            )
        if not self._sigmas or seen.sigma != self._sigmas[-1]:
            self._sigmas.append(seen.sigma)
        step, total = len(self._sigmas) - 1, seen.num_steps
        if total:
            self._on_progress(min(1.0, (step + seen.layer / plan.num_layers) / total))
        if total and step not in spread(range(total), self._num_steps):
            return
        text = seen.num_tokens - seen.grid.num_tokens
        sparse_plan = plan.attn_plan(
            *(seen.layer, plan.bin_of(seen.sigma)),
            num_text_tokens=text,
            text_visible=seen.text_visible,
            device=seen.q.device,
        )
        dense_plan = everything(seen, plan.block)
        qkv = (seen.q, seen.k, seen.v)
        out, lse = sparse_attention_with_lse(*qkv, sparse_plan, backend=self._backend)
        exact, exact_lse = sparse_attention_with_lse(*qkv, dense_plan, backend=self._backend)
        vision = slice(seen.grid.start, seen.grid.stop)
        kept = (lse - exact_lse)[:, :, vision].double().exp().mean((0, 2))
        off, size = (out - exact)[:, :, vision].double(), exact[:, :, vision].double()
        self._kept[seen.layer] += kept.cpu()
        self._error2[seen.layer] += off.square().sum((0, 2, 3)).cpu()
        self._norm2[seen.layer] += size.square().sum((0, 2, 3)).cpu()
        self._calls[seen.layer] += 1
        for layer, head in self._wanted:
            # The last step of the first half: neither pure noise nor a finished picture.
            early = not total or step <= total / 2
            if layer == seen.layer and (early or (layer, head) not in self._maps):
                self._maps[layer, head] = self._map(seen, head, exact_lse, float(kept[head]))

    def found(self) -> PlanCheck:
        calls = self._calls.clamp_min(1.0)
        error = (self._error2 / self._norm2.clamp_min(1e-30)).sqrt()
        maps = tuple(self._maps[x] for x in sorted(self._maps))
        return PlanCheck((self._kept / calls).float(), error.float(), maps)

    def _map(self, seen: Any, head: int, lse: Tensor, recall: float) -> HeadMap:
        plan, device = self._plan, seen.q.device
        group = seen.q.shape[1] // seen.k.shape[1]
        q, k = seen.q[:1, head : head + 1], seen.k[:1, head // group : head // group + 1]
        order = plan.axis_orders[seen.layer, head : head + 1].to(device)
        grid: TokenGrid = seen.grid
        own = torch.arange(grid.start, grid.stop, dtype=torch.int32, device=device)[None]
        after = vision_tokens(grid, order, plan.native_cells)
        sums = [
            block_mass(
                *(q, k),
                token_of_q_slot=token[None],
                token_of_kv_slot=token[None],
                q_blocks=torch.arange(plan.mask_shape[0], dtype=torch.int32, device=device),
                block=plan.block,
                lse=lse[:1, head : head + 1].float(),
            )
            .sums[0, 0]
            .cpu()
            for token in (own, after)
        ]
        mask = plan.block_mask(seen.layer, plan.bin_of(seen.sigma))[head]
        return HeadMap(seen.layer, head, seen.sigma, sums[0], sums[1], mask, recall)
