"""A `WanTransformer3DModel` that denoises with constructed, not trained, weights.

Every head averages over a neighbourhood (`heads`), a little more over tokens that look alike. Layer
after layer adds what its heads found to a running estimate of the clean video, and to a part of the
velocity whose size depends on the noise level through the AdaLN gates. How much each head and each
layer counts is a least-squares fit on a noised clip; nothing is trained by gradients.

The residual stream: the noisy patch, the estimate, one part of the velocity per layer, and
constants far larger than all of it, so that layer norms are nearly linear in what matters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from permattn.cli.demo_paro.heads import HEAD_DIM, KINDS, HeadKind, content_values, place_bias
from permattn.cli.demo_paro.latents import CHANNELS

PATCH = (1, 2, 2)
VALUES = CHANNELS * math.prod(PATCH)
NUM_CONSTANTS, CONSTANT = 16, 64.0
TEXT_DIM, TIME_DIM = 64, 256
# Noise levels of the fit, and the ridge relative to the size of what is fitted.
LEVELS = (0.05, 0.15, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
_RIDGE = 1e-3
# The same for the weights of heads, which are pulled towards all alike.
_ALIKE = 0.2
# Levels on which heads are weighted: at the low ones the patch itself tells most.
_NOISY_LEVELS = slice(5, None)
# Nats that two patches of one unit of brightness give each other for being alike.
_LIKENESS = 0.8
# Channels of mean brightness and mean colour.
_MEANS = (0, 10, 13)
_SEED = 20250616
# Coordinates of the residual stream; parts of the velocity follow, constants come last.
NOISY, ESTIMATE = slice(0, VALUES), slice(VALUES, 2 * VALUES)
# Rows of a block's AdaLN table: the gates of attention and of the feed-forward net.
_ATTENTION_GATE, _FFN_GATE = 2, 5


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model. The defaults fit two CPU cores; tests take smaller ones."""

    layers: int = 4
    kinds: tuple[HeadKind, ...] = KINDS
    ffn: int = 512

    @property
    def hidden(self) -> int:
        return max(len(self.kinds) * HEAD_DIM, self.num_used)

    @property
    def num_used(self) -> int:
        return VALUES * (2 + self.layers + 1) + NUM_CONSTANTS + 1

    @property
    def constants(self) -> slice:
        return slice(self.hidden - NUM_CONSTANTS, self.hidden)

    @property
    def blank(self) -> int:
        """A coordinate that stays 0: reading against it cancels the mean of layer norms."""
        return self.hidden - NUM_CONSTANTS - 1

    def velocity(self, part: int) -> slice:
        """Part 0 comes from the noisy patch, part n from layer n - 1."""
        return slice((2 + part) * VALUES, (3 + part) * VALUES)

    @property
    def norm(self) -> float:
        """What a layer norm divides by."""
        return CONSTANT * math.sqrt(NUM_CONSTANTS / self.hidden)


def build(clean: Tensor, sizes: Sizes = Sizes()) -> Any:
    """The model in float32, fitted to denoise videos like `clean`.

    Args:
        clean: float32 [1, 16, F, H, W], latents of a short video; H and W even.
        sizes: of the model.
    """
    from diffusers import WanTransformer3DModel

    if sizes.hidden != len(sizes.kinds) * HEAD_DIM:
        raise ValueError(f"sizes: {sizes.layers} layers want {-(-sizes.num_used // 64)} heads")
    generator = torch.Generator().manual_seed(_SEED)
    model: Any = WanTransformer3DModel(
        patch_size=PATCH,
        num_attention_heads=len(sizes.kinds),
        attention_head_dim=HEAD_DIM,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=TIME_DIM,
        ffn_dim=sizes.ffn,
        num_layers=sizes.layers,
    )
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        _write_ends(model, sizes)
        _write_text(model, generator)
        for number, block in enumerate(model.blocks):
            _write_attention(block.attn1, number, sizes, generator)
        _write_pass_through(model.blocks[0].ffn, sizes)
        gates = _fit_layers(model, clean, sizes, generator)
        _write_gates(model, gates, sizes, generator)
    return model


def _write_ends(model: Any, sizes: Sizes) -> None:
    """Patches in, velocity out; a patch value is (row, column, channel)."""
    into, out = model.patch_embedding, model.proj_out
    for value in range(VALUES):
        place, channel = divmod(value, CHANNELS)
        into.weight[value, channel, 0, place // PATCH[2], place % PATCH[2]] = 1.0
    into.bias[sizes.constants] = CONSTANT * (1 - 2 * (torch.arange(NUM_CONSTANTS) % 2))
    for part in range(sizes.layers + 1):
        _read(out.weight, sizes.velocity(part), torch.eye(VALUES), sizes)


def _read(weight: Tensor, where: slice, values: Tensor, sizes: Sizes) -> None:
    """Makes a projection of layer-normed rows compute `values` of the coordinates `where`."""
    weight[:, where] += values * sizes.norm
    weight[:, sizes.blank] -= values.sum(1) * sizes.norm


def _write_text(model: Any, generator: torch.Generator) -> None:
    """Cross-attention that runs but writes nothing: a prompt has no say."""
    text = model.condition_embedder.text_embedder
    layers = [text.linear_1, text.linear_2]
    for block in model.blocks:
        layers += [block.attn2.to_q, block.attn2.to_k, block.attn2.to_v]
        block.attn2.norm_q.weight.fill_(1.0)
        block.attn2.norm_k.weight.fill_(1.0)
    for layer in layers:
        layer.weight.normal_(0, layer.in_features**-0.5, generator=generator)


def kind_of(sizes: Sizes, layer: int, head: int) -> HeadKind:
    """What a head aggregates over: every layer has all kinds, in another order."""
    return sizes.kinds[(head + 3 * layer) % len(sizes.kinds)]


def _write_attention(attention: Any, number: int, sizes: Sizes, generator: torch.Generator) -> None:
    """Self-attention of one layer: place from biases, likeness from content.

    Values are the noisy patch, and in later layers what the estimate lacks of it.
    """
    source = NOISY if number == 0 else ESTIMATE
    kinds = [kind_of(sizes, number, head) for head in range(len(sizes.kinds))]
    bias = torch.cat([place_bias(kind) for kind in kinds])
    # RMSNorm divides by the size of all heads together: nearly that of the biases.
    size = float(bias.square().mean().sqrt())
    for head in range(len(kinds)):
        rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        likeness = _likeness(generator)
        for projection in (attention.to_q, attention.to_k):
            _read(projection.weight[rows], source, likeness, sizes)
        _read(attention.to_v.weight[rows], NOISY, torch.eye(VALUES), sizes)
        if number > 0:
            _read(attention.to_v.weight[rows], ESTIMATE, -torch.eye(VALUES), sizes)
    for projection, norm in (
        (attention.to_q, attention.norm_q),
        (attention.to_k, attention.norm_k),
    ):
        projection.bias.copy_(bias)
        norm.weight.fill_(size)


def _likeness(generator: torch.Generator) -> Tensor:
    """[HEAD_DIM, VALUES]: mean brightness and colour of a patch, spread over the content values."""
    means = torch.zeros(len(_MEANS), VALUES)
    for row, channel in enumerate(_MEANS):
        means[row, channel::CHANNELS] = CHANNELS / VALUES
    where = content_values()
    spread = torch.randn(len(where), len(_MEANS), generator=generator)
    spread = torch.linalg.qr(spread).Q * math.sqrt(_LIKENESS * math.sqrt(HEAD_DIM))
    out = torch.zeros(HEAD_DIM, VALUES)
    out[where] = spread @ means
    return out


def _write_pass_through(ffn: Any, sizes: Sizes) -> None:
    """The first feed-forward net hands the noisy patch on: gelu(x) - gelu(-x) = x."""
    into, out = ffn.net[0].proj.weight, ffn.net[2].weight
    for sign, rows in ((1.0, slice(0, VALUES)), (-1.0, slice(VALUES, 2 * VALUES))):
        _read(into[rows], NOISY, sign * torch.eye(VALUES), sizes)
        out[sizes.velocity(0), rows] = sign * torch.eye(VALUES)


def _fit_layers(model: Any, clean: Tensor, sizes: Sizes, generator: torch.Generator) -> Tensor:
    """Writes how much every head counts, and returns how much every layer counts.

    The estimate is that of the noisy patch without its noise. Layer after layer, heads are weighted
    such that their sum comes closest to what it lacks; not far from all alike, so that every head
    counts. Then the velocity is fitted, per noise level and channel, as a sum of the noisy patch
    and of what each layer added.

    Returns: float64 [levels, layers + 1, CHANNELS].
    """
    level = torch.tensor(LEVELS).view(-1, 1, 1, 1, 1)
    noise = torch.randn(len(LEVELS), *clean.shape[1:], generator=generator)
    noisy = (1 - level) * clean + level * noise
    hidden = _rows(model, noisy)
    target = _rows(model, (1 - level) * clean)[..., NOISY]
    velocity = _rows(model, noise - clean)[..., NOISY]
    rotary = model.rope(noisy)
    still = torch.zeros(len(LEVELS), 6, sizes.hidden)
    text = torch.zeros(len(LEVELS), 1, sizes.hidden)
    found = [hidden[..., NOISY]]
    for block in model.blocks:
        to_out = block.attn1.to_out[0]
        per_head = (
            _head_outputs(block, (hidden, text, still, rotary))
            .unflatten(-1, (-1, VALUES))
            .transpose(-1, -2)
        )
        lacking = target - hidden[..., ESTIMATE]
        weights = _solve(
            per_head[_NOISY_LEVELS].flatten(0, 2),
            lacking[_NOISY_LEVELS].reshape(-1, 1),
            ridge=_ALIKE,
            prior=1 / len(sizes.kinds),
        )
        found.append(per_head @ weights[:, 0].float())
        hidden[..., ESTIMATE] += found[-1]
        block.scale_shift_table[0, _ATTENTION_GATE, ESTIMATE] = 1.0
        part = sizes.velocity(len(found) - 1)
        for head, weight in enumerate(weights[:, 0].tolist()):
            columns = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
            to_out.weight[ESTIMATE, columns] = weight * torch.eye(VALUES)
            to_out.weight[part, columns] = weight * torch.eye(VALUES)
    features = torch.stack(found, -1).unflatten(2, (-1, CHANNELS))
    velocity = velocity.unflatten(2, (-1, CHANNELS))
    return torch.stack(
        [
            torch.cat(
                [
                    _solve(features[n, :, :, c].flatten(0, 1), velocity[n, :, :, c].reshape(-1, 1))
                    for c in range(CHANNELS)
                ],
                -1,
            )
            for n in range(len(LEVELS))
        ]
    )


def _head_outputs(block: Any, arguments: tuple[Tensor, ...]) -> Tensor:
    """[B, tokens, heads * values]: what the self-attention of a block hands to its last layer."""
    outputs: list[Tensor] = []
    hook = block.attn1.to_out[0].register_forward_pre_hook(lambda _, x: outputs.append(x[0]))
    try:
        block(*arguments)
    finally:
        hook.remove()
    return outputs[0]


def _rows(model: Any, latents: Tensor) -> Tensor:
    """[B, tokens, hidden]: what enters the first block."""
    rows: Tensor = model.patch_embedding(latents).flatten(2).transpose(1, 2).contiguous()
    return rows


def _solve(features: Tensor, target: Tensor, ridge: float = _RIDGE, prior: float = 0.0) -> Tensor:
    """float64 [features, targets]: ridge regression that pulls all weights towards `prior`."""
    features, target = features.double(), target.double()
    gram = features.mT @ features
    pull = ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    wanted = features.mT @ target + prior * pull.sum(1, keepdim=True)
    return torch.linalg.solve(gram + pull, wanted)


def _write_gates(model: Any, parts: Tensor, sizes: Sizes, generator: torch.Generator) -> None:
    """AdaLN gates: functions of the timestep that make every part of the velocity count as fitted.

    Random smooth functions of the timestep come first; the last projection is a fit on them.
    """
    embedder = model.condition_embedder
    first, last = embedder.time_embedder.linear_1, embedder.time_embedder.linear_2
    # The slow half of the sines and cosines alone: fits stay smooth between the levels.
    for start in (TIME_DIM // 4, 3 * TIME_DIM // 4):
        slow = first.weight[:, start : start + TIME_DIM // 4]
        slow.normal_(0, 2 * TIME_DIM**-0.5, generator=generator)
    first.bias.normal_(0, 1, generator=generator)
    last.weight.normal_(0, 2 * last.in_features**-0.5, generator=generator)
    last.bias.normal_(0, 0.5, generator=generator)
    # The output layer adds the embedding to what it reads.
    read = slice(sizes.velocity(0).start, sizes.velocity(sizes.layers).stop)
    for quiet in (read, sizes.blank):
        last.weight[quiet] = 0.0
        last.bias[quiet] = 0.0
    levels = torch.linspace(LEVELS[0], LEVELS[-1], 120)
    inside = torch.bucketize(levels, torch.tensor(LEVELS)).clamp(1, len(LEVELS) - 1)
    low, high = (torch.tensor(LEVELS)[inside - 1], torch.tensor(LEVELS)[inside])
    share = ((levels - low) / (high - low)).double()[:, None, None]
    wanted = parts[inside - 1] * (1 - share) + parts[inside] * share
    embedding = embedder.time_embedder(embedder.timesteps_proj(1000 * levels))
    features = torch.nn.functional.silu(embedding)
    features = torch.cat((features, torch.ones(len(features), 1)), -1).double()
    patches = VALUES // CHANNELS
    for part in range(sizes.layers + 1):
        gate = _FFN_GATE if part == 0 else _ATTENTION_GATE
        where = sizes.velocity(part)
        rows = slice(gate * sizes.hidden + where.start, gate * sizes.hidden + where.stop)
        fit = _solve(features, wanted[:, part].repeat(1, patches)).mT.float()
        embedder.time_proj.weight[rows] = fit[:, :-1]
        embedder.time_proj.bias[rows] = fit[:, -1]
