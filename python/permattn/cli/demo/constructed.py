"""The default model: the real Qwen2.5-VL class with weights that are built, not trained.

Its heads show what heads of trained vision-language models show, through M-RoPE alone:

    place      the same place in every earlier frame: bias times bias, a function of (dh, dw)
    local      this frame and its neighbours: bias times bias, a function of dt
    sink       the first token: a key weight reads its embedding
    grid       one place of every frame, seen by everyone: a vertical line per frame
    spots      a few single tokens, seen by everyone

Grid and spots are a circuit of two layers. In layer 0 one head looks at itself, except where
M-RoPE says that it stands at the place a marker token of the prompt points to; there it reads the
marker, and o_proj writes a mark into the residual. Key weights of later layers read the mark. All
other weights are small and random, so part of every head's mass is spread, and hidden states depend
on what attention returns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Residual coordinates that random weights never write, one per thing that key weights read.
BOS, GRID_MARKER, GRID_MARK, SPOT_MARK, SPOT_MARKERS = 0, 1, 2, 3, 4

HEAD_DIM = 128
PAIRS = HEAD_DIM // 2
# Pairs of the time, height and width section, as in the released Qwen2.5-VL models.
SECTIONS = (16, 24, 24)
# The slowest pairs of every section do not turn within any prompt: key weights write content there.
STILL = (4, 6, 6)
STILL_FREQUENCY = 1e-6
THETA = 1e4
MAX_POSITIONS = 1 << 20

# What a key pair holds; a head chooses by its query bias how much it cares.
KEY_BIAS = 3.0
# Standard deviation of the random part of every query and key value.
CONTENT = 0.45


@dataclass(frozen=True)
class HeadKind:
    """Scores of one query head, in units of the softmax's exponent.

    Args:
        place: at the same height and width (a quarter of it is gone one token away).
        time: at the same time.
        sink, grid, spots: at keys of that kind.
    """

    name: str
    place: float = 0.0
    time: float = 0.0
    sink: float = 0.0
    grid: float = 0.0
    spots: float = 0.0


MARKER = HeadKind("marker", place=36.0, time=14.0)
KINDS = (
    HeadKind("place", place=36.0, sink=38.0),
    HeadKind("grid", time=6.0, grid=9.0, sink=12.0),
    HeadKind("local", place=5.0, time=16.0, sink=12.0),
    HeadKind("sink", time=5.0, sink=13.0),
    HeadKind("place and grid", place=30.0, grid=29.0, sink=30.0),
    HeadKind("spots", time=6.0, spots=11.5, sink=12.0),
    HeadKind("near", place=8.0, time=12.0, sink=14.0),
    HeadKind("near and spots", place=6.0, time=14.0, spots=16.0),
)


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model. The defaults fit two CPU cores; tests take smaller ones."""

    hidden: int = 1024
    mlp: int = 1024
    layers: int = 4
    heads: int = 8
    kv_heads: int = 2
    vocab: int = 2048
    vision_hidden: int = 128
    vision_depth: int = 4
    patch: int = 14
    num_spots: int = 8


@dataclass(frozen=True)
class Grid:
    """The video in tokens, and the places that markers point to."""

    frames: int
    height: int
    width: int

    @property
    def num_tokens(self) -> int:
        return self.frames * self.height * self.width

    @property
    def place(self) -> tuple[int, int]:
        """Height and width of the vertical grid line."""
        return self.height // 3, self.width // 4

    def spots(self, count: int) -> list[tuple[int, int, int]]:
        """(t, h, w) of single tokens, scattered over the first three quarters."""
        steps = torch.arange(1, count + 1, dtype=torch.float64)
        # Fractions of the golden ratio and its powers: spread out, and the same in every run.
        where = (steps[:, None] * torch.tensor([0.61803, 0.38197, 0.23607])) % 1.0
        size = torch.tensor([0.75 * self.frames, self.height, self.width])
        return [(int(t), int(h), int(w)) for t, h, w in (where * size).tolist()]


@dataclass(frozen=True, eq=False)
class Constructed:
    """A model, and the prompt it is built for.

    Args:
        model: `Qwen2_5_VLForConditionalGeneration` in eval mode.
        input_ids: [1, S].
        kinds: names of the heads' kinds, per layer and head.
    """

    model: nn.Module
    input_ids: Tensor
    kinds: tuple[tuple[str, ...], ...]


def build(
    grid: Grid,
    sample: Tensor,
    sample_thw: Tensor,
    *,
    sizes: Sizes = Sizes(),
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Constructed:
    """Builds the model and its prompt.

    Args:
        grid: the video that the prompt will hold.
        sample, sample_thw: patches and sizes of a few frames: the merger's last layer is scaled so
            that visual embeddings have mean 0 and variance 1, as text embeddings do.
    """
    from transformers import Qwen2_5_VLForConditionalGeneration

    config = _config(sizes)
    random_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        model: nn.Module = Qwen2_5_VLForConditionalGeneration._from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        ).eval()
        with torch.no_grad():
            ids = _write_prompt(model, grid, sizes)
            _write_vision(model, sample, sample_thw, sizes)
            kinds = _write_decoder(model, grid, ids, sizes)
    finally:
        torch.random.set_rng_state(random_state)
    return Constructed(model, ids, kinds)


def frequencies() -> Tensor:
    """float64 [PAIRS]: how fast each pair turns per position of its section."""
    out = []
    for count, still in zip(SECTIONS, STILL, strict=True):
        moving = torch.logspace(
            math.log10(1.6), math.log10(0.15), count - still, dtype=torch.double
        )
        out += [moving, torch.full((still,), STILL_FREQUENCY, dtype=torch.double)]
    return torch.cat(out)


def _config(sizes: Sizes):
    from transformers import Qwen2_5_VLConfig

    # longrope states one factor per pair, which lets the config choose every frequency.
    plain = THETA ** -(torch.arange(PAIRS, dtype=torch.double) / PAIRS)
    factors = (plain / frequencies()).tolist()
    rope = {
        "rope_type": "longrope",
        "rope_theta": THETA,
        "mrope_section": list(SECTIONS),
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": MAX_POSITIONS,
    }
    text = {
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.mlp,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": MAX_POSITIONS,
        "rope_parameters": rope,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    vision = {
        "depth": sizes.vision_depth,
        "hidden_size": sizes.vision_hidden,
        "intermediate_size": 2 * sizes.vision_hidden,
        "num_heads": max(2, sizes.vision_hidden // 64),
        "patch_size": sizes.patch,
        "window_size": 8 * sizes.patch,
        "fullatt_block_indexes": [sizes.vision_depth - 1],
        "out_hidden_size": sizes.hidden,
        "tokens_per_second": 1,
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=3,
        video_token_id=4,
        vision_start_token_id=5,
        vision_end_token_id=6,
        tie_word_embeddings=False,
    )


# The prompt: bos, system text, markers, vision start, the video, vision end, question.
_FIRST_MARKER, _FIRST_WORD = 8, 64
_SYSTEM, _QUESTION = 20, 24
# Special tokens outweigh what layers add to them, as the first token of trained models does.
_SPECIAL_SIZE = 8.0


def _write_prompt(model: nn.Module, grid: Grid, sizes: Sizes) -> Tensor:
    config = model.config
    table = model.get_input_embeddings().weight
    table.normal_()
    table[:, : SPOT_MARKERS + sizes.num_spots] = 0.0
    # A special token is its own coordinate and nothing else; RMSNorm keeps it at sqrt(hidden).
    special = {config.text_config.bos_token_id: BOS, _FIRST_MARKER: GRID_MARKER}
    special |= {_FIRST_MARKER + 1 + i: SPOT_MARKERS + i for i in range(sizes.num_spots)}
    for token, coordinate in special.items():
        table[token] = 0.0
        table[token, coordinate] = _SPECIAL_SIZE * math.sqrt(sizes.hidden)
    words = torch.randint(_FIRST_WORD, sizes.vocab, (_SYSTEM + _QUESTION,))
    ids = [
        config.text_config.bos_token_id,
        *words[:_SYSTEM].tolist(),
        *range(_FIRST_MARKER, _FIRST_MARKER + 1 + sizes.num_spots),
        config.vision_start_token_id,
        *[config.video_token_id] * grid.num_tokens,
        config.vision_end_token_id,
        *words[_SYSTEM:].tolist(),
    ]
    return torch.tensor([ids])


def _write_vision(model: nn.Module, sample: Tensor, thw: Tensor, sizes: Sizes) -> None:
    """Scales the merger's output to mean 0 and variance 1 over the sample."""
    visual = model.model.visual
    for weight in visual.parameters():
        if weight.ndim > 1:
            weight.normal_(std=weight[0].numel() ** -0.5)
    last = visual.merger.mlp[-1]
    reserved = SPOT_MARKERS + sizes.num_spots
    out = visual(sample.to(last.weight.dtype), grid_thw=thw).pooler_output.float()
    last.weight.div_((out - out.mean(0)).std().to(last.weight.dtype))
    out = visual(sample.to(last.weight.dtype), grid_thw=thw).pooler_output.float()
    last.bias.sub_(out.mean(0).to(last.bias.dtype))
    last.weight[:reserved] = 0.0
    last.bias[:reserved] = 0.0


def _write_decoder(
    model: nn.Module, grid: Grid, ids: Tensor, sizes: Sizes
) -> tuple[tuple[str, ...], ...]:
    text = model.model.language_model
    reserved = SPOT_MARKERS + sizes.num_spots
    kinds = []
    for number, layer in enumerate(text.layers):
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
            linear.weight.normal_(std=linear.in_features**-0.5)
        for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            linear.weight.normal_(std=linear.in_features**-0.5)
        for linear in (attention.q_proj, attention.k_proj):
            linear.weight.mul_(CONTENT)
            linear.weight[:, :reserved] = 0.0
            linear.bias.zero_()
        attention.v_proj.bias.zero_()
        for linear in (attention.o_proj, mlp.down_proj):
            linear.weight[:reserved] = 0.0
        chosen = [KINDS[(number * 3 + i) % len(KINDS)] for i in range(sizes.heads)]
        if number == 0:
            chosen[0] = MARKER
            # Marks do not exist yet where layer 0 makes its keys.
            chosen[1:] = [KINDS[i % 4 if i % 4 != 1 else 6] for i in range(sizes.heads - 1)]
        for head, kind in enumerate(chosen):
            _write_query(attention, head, kind)
        _write_keys(attention, sizes)
        if number == 0:
            _write_markers(attention, grid, ids, sizes)
        kinds.append(tuple(kind.name for kind in chosen))
    return tuple(kinds)


def _moving_pairs(section: int) -> slice:
    start = sum(SECTIONS[:section])
    return slice(start, start + SECTIONS[section] - STILL[section])


def _still_pair(section: int) -> int:
    return sum(SECTIONS[:section]) + SECTIONS[section] - 1


# Pairs where key weights write sink, grid and spots; queries read the first value of each.
_CONTENT_PAIRS = {BOS: _still_pair(0), GRID_MARK: _still_pair(1), SPOT_MARK: _still_pair(2)}
# Key value of a content pair where the thing is there, so that queries stay of moderate size.
_CONTENT_KEY = 12.0


def _amplitude(score: float, pairs: int, key: float) -> float:
    """The query bias per pair that gives this score against keys of size `key`."""
    return score * math.sqrt(HEAD_DIM) / (pairs * key)


def _write_query(attention: nn.Module, head: int, kind: HeadKind) -> None:
    bias = attention.q_proj.bias[head * HEAD_DIM : (head + 1) * HEAD_DIM]
    for section, score in enumerate((kind.time, kind.place / 2, kind.place / 2)):
        where = _moving_pairs(section)
        bias[where] = _amplitude(score, where.stop - where.start, KEY_BIAS)
    for coordinate, score in ((BOS, kind.sink), (GRID_MARK, kind.grid), (SPOT_MARK, kind.spots)):
        bias[_CONTENT_PAIRS[coordinate]] = _amplitude(score, 1, _CONTENT_KEY)


def _key_rows(attention: nn.Module, kv_head: int) -> tuple[Tensor, Tensor]:
    rows = slice(kv_head * HEAD_DIM, (kv_head + 1) * HEAD_DIM)
    return attention.k_proj.weight[rows], attention.k_proj.bias[rows]


def _write_keys(attention: nn.Module, sizes: Sizes) -> None:
    """Biases for place and time; weights that read the sink and the marks."""
    size = math.sqrt(sizes.hidden)
    for kv_head in range(sizes.kv_heads):
        weight, bias = _key_rows(attention, kv_head)
        for section in range(3):
            bias[_moving_pairs(section)] = KEY_BIAS
        special = [BOS, GRID_MARKER, *range(SPOT_MARKERS, SPOT_MARKERS + sizes.num_spots)]
        # Special tokens have no place of their own: their weight takes the bias away.
        weight[:, special] = -(bias / size)[:, None]
        weight[_CONTENT_PAIRS[BOS], BOS] = _CONTENT_KEY / size
        for mark in (GRID_MARK, SPOT_MARK):
            weight[_CONTENT_PAIRS[mark], mark] = _CONTENT_KEY / (size * _MARK_SHARE)


# Size of a mark where text and visual embeddings have 1, and its share of the token's norm then.
_MARK_SIZE = 3.0
_MARK_SHARE = 0.86


def _write_markers(attention: nn.Module, grid: Grid, ids: Tensor, sizes: Sizes) -> None:
    """Layer 0, query head 0 and its key head: who stands where a marker points reads the marker."""
    size = math.sqrt(sizes.hidden)
    weight, bias = _key_rows(attention, 0)
    video = int((ids[0] == 4).nonzero()[0])
    height, width = grid.place
    here = MARKER.place + MARKER.time
    targets = [(GRID_MARKER, (None, height, width), here / MARKER.place)]
    targets += [(SPOT_MARKERS + i, s, 1.0) for i, s in enumerate(grid.spots(sizes.num_spots))]
    turn = frequencies().to(bias)
    # Just above the score that a token gives itself.
    margin = 1.0 + 2.0 / here
    for coordinate, target, gain in targets:
        token = _FIRST_MARKER + (0 if coordinate == GRID_MARKER else coordinate - SPOT_MARKERS + 1)
        lag = video - int((ids[0] == token).nonzero()[0])
        for section, position in enumerate(target):
            if position is None:
                continue
            where = _moving_pairs(section)
            angle = turn[where].float() * (lag + position)
            key = KEY_BIAS * gain * margin / size
            weight[where, coordinate] += (key * angle.cos()).to(weight)
            weight[slice(where.start + PAIRS, where.stop + PAIRS), coordinate] = (
                key * angle.sin()
            ).to(weight)
    # Values 0 and 1 of this key head say which kind of marker was read.
    attention.v_proj.weight[:2] = 0.0
    attention.v_proj.weight[0, GRID_MARKER] = 1.0 / size
    attention.v_proj.weight[1, SPOT_MARKERS : SPOT_MARKERS + sizes.num_spots] = 1.0 / size
    attention.o_proj.weight[GRID_MARK, 0] = _MARK_SIZE * size
    attention.o_proj.weight[SPOT_MARK, 1] = _MARK_SIZE * size
