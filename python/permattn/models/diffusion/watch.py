"""Shows every self-attention call of a diffusion transformer that runs dense and exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from permattn.core import TokenGrid
from permattn.models.diffusion.call import TransformerCall
from permattn.models.diffusion.dispatch import AttentionCall, Layer
from permattn.models.diffusion.family import DiffusionFamily
from permattn.models.diffusion.masks import text_visible_of
from permattn.models.diffusion.patching import Patch
from permattn.models.diffusion.pipes import transformer_of


@dataclass(frozen=True, eq=False)
class Observation:
    """One self-attention call, right before it runs.

    Args:
        layer: its number, through all lists of blocks.
        q, k, v: [B, H, S, D] after norm and rotary embedding; views of what the model uses.
        grid: the vision tokens; all others are text.
        num_tokens: S.
        text_visible: bool [B, text tokens], False = padding that nobody sees; None = all are seen.
        sigma: noise level of the step: 1 = pure noise.
        step: its number in the run, from 0.
        num_steps: of the run, where known.
        context: "cond" or "uncond", where the pipeline names its calls.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    grid: TokenGrid
    num_tokens: int
    text_visible: Tensor | None
    sigma: float
    step: int | None
    num_steps: int | None
    context: str | None


@contextmanager
def observe(
    pipe_or_transformer: Any,
    callback: Callable[[Observation], None],
    *,
    component: str = "transformer",
) -> Iterator[None]:
    """Calls back for every self-attention call inside the `with`; results do not change.

    Args:
        pipe_or_transformer: a diffusers pipeline or one of its transformers.
        callback: is called right before attention; an exception of its ends the run.
        component: which transformer of a pipeline with several (Wan 2.2: "transformer_2").

    Raises:
        TypeError: something else than a pipeline or a transformer.
        ValueError: an unsupported transformer or attention processor; one that permattn is in
            already; inside the run: tokens that are not one grid, or context parallelism, under
            which a call holds a part of the tokens.
    """
    model, scheduler = transformer_of(pipe_or_transformer, component)

    def run(call: TransformerCall, layer: Layer, attention: AttentionCall) -> Tensor:
        callback(observation_of(patch.family, call, layer, attention))
        return attention.dense()

    patch = Patch(model, run, scheduler=scheduler)
    try:
        yield
    finally:
        patch.remove()


def observation_of(
    family: DiffusionFamily, call: TransformerCall, layer: Layer, attention: AttentionCall
) -> Observation:
    """What an observer sees. Raises ValueError where the tokens are not one grid and text."""
    if attention.parallel is not None:
        raise ValueError("observe: context parallelism splits the tokens; observe without it")
    if call.size is None:
        raise ValueError(f"observe: {call.fault}")
    attention = attention.after_prologue()
    q, k, v = (x.transpose(1, 2) for x in (attention.q, attention.k, attention.v))
    if not q.shape[2] == k.shape[2] == call.num_tokens:
        raise ValueError(
            f"observe: attention of layer {layer.number} has {q.shape[2]} queries and "
            f"{k.shape[2]} keys, but a grid of {call.size} and {call.num_text_tokens} text tokens "
            f"make {call.num_tokens}"
        )
    return Observation(
        layer=layer.number,
        q=q,
        k=k,
        v=v,
        grid=call.grid(family),
        num_tokens=call.num_tokens,
        text_visible=text_visible_of(attention.mask, call, family),
        sigma=call.sigma,
        step=call.step,
        num_steps=call.num_steps,
        context=call.context,
    )
