"""Constructed models of families whose heads find places by a code in the visual features.

See `place_code` for the heads and `towers` for the families. As in `constructed`, all other weights
are small and random.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from permattn.cli.demo.circuits import MARK_SIZE, Grid, Sizes
from permattn.cli.demo.constructed import Constructed
from permattn.cli.demo.place_code import (
    BOS,
    CODE,
    CODE_HEIGHT,
    CODE_SIZE,
    DAMPING,
    KINDS,
    ONE,
    ONE_SIZE,
    RESERVED,
    SPOT,
    code_of,
    write_attention,
)
from permattn.cli.demo.towers import BOS_TOKEN, FAMILIES, FIRST_WORD, CodedFamily, Tower

_SYSTEM, _QUESTION = 21, 24
# The first token outweighs what layers add to it.
_SPECIAL_SIZE = 8.0
# Size of the code in the tower, where random coordinates start at 1.
_TOWER_SIZE = 8.0
# Visual tokens that the projector finds salient, at least and per token.
_SALIENT, _SALIENT_SHARE = 4, 1 / 256
# Directions of the visual content that are taken out.
_STRONG = 4
# How steeply a salient token's mark rises, in standard deviations of what it measures.
_STEEP = 8.0


def build_coded(
    model_type: str,
    grid: Grid,
    sample: dict[str, Tensor],
    *,
    sizes: Sizes = Sizes(),
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Constructed:
    """Builds the model and its prompt.

    Args:
        model_type: one of `towers.FAMILIES`.
        grid: the video that the prompt will hold.
        sample: pixels of a few frames: the projector is scaled so that visual embeddings have mean
            0 and variance 1, as text embeddings do.
    """
    import transformers

    family = FAMILIES[model_type]
    model_class = getattr(transformers, family.class_name)
    random_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        model: Any = model_class._from_config(
            family.config(grid, sizes), dtype=dtype, attn_implementation="sdpa"
        ).eval()
        with torch.no_grad():
            ids = _write_prompt(model, family, grid, sizes)
            _write_tower(model, family, grid, sample)
            kinds = _write_decoder(model, family, grid, sizes)
    finally:
        torch.random.set_rng_state(random_state)
    return Constructed(model, ids, kinds)


def _write_prompt(model: Any, family: CodedFamily, grid: Grid, sizes: Sizes) -> Tensor:
    """bos, system text, the video, question."""
    table = model.get_input_embeddings().weight
    table.normal_()
    table[:, :RESERVED] = 0.0
    table[:, ONE] = ONE_SIZE
    table[BOS_TOKEN] = 0.0
    table[BOS_TOKEN, BOS] = _SPECIAL_SIZE * math.sqrt(sizes.hidden)
    words = torch.randint(FIRST_WORD, sizes.vocab, (_SYSTEM + _QUESTION,)).tolist()
    ids = [BOS_TOKEN, *words[:_SYSTEM], *family.visual_ids(grid), *words[_SYSTEM:]]
    newline = getattr(model.model, "image_newline", None)
    if newline is not None:
        newline.normal_()
        newline[:RESERVED] = 0.0
        newline[ONE] = ONE_SIZE
    return torch.tensor([ids])


def _write_tower(model: Any, family: CodedFamily, grid: Grid, sample: dict[str, Tensor]) -> None:
    """Position embeddings hold the code, nothing overwrites it, the projector passes it on."""
    tower = family.tower(model, grid)
    modules: list[Any] = [*tower.root.modules(), tower.first, tower.last]
    for module in modules:
        weight = getattr(module, "weight", None)
        if weight is not None and weight.ndim > 1:
            weight.normal_(std=weight[0].numel() ** -0.5)
            if getattr(module, "bias", None) is not None:
                module.bias.zero_()
    tower.table.zero_()
    tower.table[:, :CODE_SIZE] = _TOWER_SIZE * code_of(tower.height, tower.width).to(tower.table)
    for writer in tower.writers:
        writer.weight[:CODE_SIZE] = 0.0
    for other in tower.others:
        other.weight.mul_(DAMPING / 2)
        other.weight[:RESERVED] = 0.0
    _write_projector(model, family, tower, sample)


def _write_projector(
    model: Any, family: CodedFamily, tower: Tower, sample: dict[str, Tensor]
) -> None:
    first, last = tower.first, tower.last
    # Unit 0 looks for salience. gelu(x) - gelu(-x) = x: two units per value pass the code on.
    plus, minus = slice(1, 1 + CODE_SIZE), slice(1 + CODE_SIZE, 1 + 2 * CODE_SIZE)
    reads = first.weight.view(first.out_features, tower.copies, -1)
    reads[:, :, :CODE_SIZE] = 0.0
    reads[1 : minus.stop] = 0.0
    # Less the mean of the rest, since a layer norm before the projector moves both alike.
    rest = 1.0 / (tower.copies * (reads.shape[-1] - CODE_SIZE))
    reads[plus, :, CODE_SIZE:], reads[minus, :, CODE_SIZE:] = -rest, rest
    for unit in range(CODE_SIZE):
        reads[plus.start + unit, :, unit] = 1.0 / tower.copies
        reads[minus.start + unit, :, unit] = -1.0 / tower.copies
    last.weight[:RESERVED] = 0.0
    last.weight[:, : minus.stop] = 0.0
    for unit in range(CODE_SIZE):
        last.weight[CODE + unit, plus.start + unit] = 1.0
        last.weight[CODE + unit, minus.start + unit] = -1.0
    seen: list[Tensor] = []
    hook = first.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    out = family.features(model, sample).float()
    hook.remove()
    content = out[:, RESERVED:] - out[:, RESERVED:].mean(0)
    # A dark shot lies far from the mean, in few directions. Without those all norms are alike.
    strong = torch.linalg.svd(content, full_matrices=False).Vh[:_STRONG]
    content -= content @ strong.mT @ strong
    weight = last.weight[RESERVED:].float()
    weight -= strong.mT @ (strong @ weight)
    last.weight[RESERVED:] = (weight / content.std()).to(last.weight)
    # Per wave cosine and sine have mean square 1 in all.
    code = out[:, CODE:RESERVED].square().sum(-1).mean().div(CODE_SIZE / 2).sqrt()
    last.weight[CODE:RESERVED].mul_((CODE_HEIGHT / code).to(last.weight))
    salience = (seen[0].float() @ first.weight[0].float()).flatten()
    share = max(_SALIENT_SHARE, _SALIENT / len(salience))
    gain = _STEEP / float(salience.std())
    threshold = float(salience.topk(math.ceil(share * len(salience))).values[-1])
    first.weight[0].mul_(gain)
    first.bias[0] = -gain * threshold
    last.weight[SPOT, 0] = MARK_SIZE * math.sqrt(last.out_features)
    out = family.features(model, sample).float()
    last.bias[RESERVED:] = -out[:, RESERVED:].mean(0).to(last.bias)
    last.bias[ONE] = ONE_SIZE


def _write_decoder(
    model: Any, family: CodedFamily, grid: Grid, sizes: Sizes
) -> tuple[tuple[str, ...], ...]:
    pairs = family.pairs(grid)
    names = []
    for number, layer in enumerate(model.model.language_model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
            linear.weight.normal_(std=linear.in_features**-0.5)
        for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            linear.weight.normal_(std=linear.in_features**-0.5)
        for linear in (attention.o_proj, mlp.down_proj):
            linear.weight.mul_(DAMPING)
            linear.weight[:RESERVED] = 0.0
        kinds = tuple(KINDS[(number * 3 + i) % len(KINDS)] for i in range(sizes.heads))
        write_attention(attention, kinds, pairs, grid.place, sizes, number)
        names.append(tuple(kind.name for kind in kinds))
    return tuple(names)
