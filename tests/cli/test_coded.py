"""Constructed models whose heads find places by a code: real classes, and patterns per name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from permattn.cli.demo.circuits import HEAD_DIM, Grid, Sizes
from permattn.cli.demo.measure import Meter
from permattn.cli.demo.place_code import CODE, CODE_HEIGHT, ONE, ONE_SIZE, RESERVED, code_of
from permattn.cli.demo.subject import constructed_subject, grid_for
from permattn.cli.demo.towers import FAMILIES
from permattn.cli.demo.video import Clip
from permattn.core import TokenGrid
from permattn.models import PrefillConfig, patch

SIZES = Sizes(
    mlp=256, layers=4, heads=4, kv_heads=2, vocab=256, vision_hidden=64, vision_depth=2, patch=4
)
FRAMES = 12


class Case:
    """A small model of one family, its maps and where its tokens are."""

    def __init__(self, name):
        self.family = FAMILIES[name]
        self.grid = Grid(FRAMES, 7, 7) if self.family.is_square else Grid(FRAMES, 6, 8)
        self.size = self.grid.height * self.grid.width
        rng = np.random.default_rng(0)
        shape = (2 * FRAMES, 8 * self.grid.height, 8 * self.grid.width, 3)
        self.clip = Clip(rng.integers(0, 256, shape, np.uint8), 0.1, "raw", shape[1:3], shape[0])
        self.subject = self.build()
        ids = self.subject.inputs["input_ids"][0]
        visual = ((ids == 3) | (ids == 4)).nonzero().flatten()[: self.grid.num_tokens]
        self.frames = visual.view(FRAMES, self.size)
        self.rows = self.frames[-1]
        self.maps = []
        Meter(self.subject.model, self.subject.inputs, torch.device("cpu")).run(instead=self.look)

    def build(self):
        return constructed_subject(
            self.clip, self.grid, device=torch.device("cpu"), dtype=torch.float32, sizes=SIZES,
            model_type=self.family.model_type,
        )  # fmt: skip

    def look(self, attention, module, q, k, v, *rest, **keywords):
        score = (q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT) * HEAD_DIM**-0.5
        hidden = ~torch.ones(score.shape[-2:]).tril().bool()
        self.maps.append(score.masked_fill(hidden, float("-inf")).softmax(-1)[0])
        return attention(module, q, k, v, *rest, **keywords)

    def features(self):
        model, inputs = self.subject.model, self.subject.inputs
        pixels = {k: inputs[k] for k in self.family.pixels(self.clip.frames, SIZES.patch)}
        with torch.no_grad():
            return self.family.features(model, pixels)

    def of_kind(self, kind):
        """[last frame's tokens, keys]"""
        head = next(h for h in self.subject.sheet if h.label == kind)
        return self.maps[head.layer][head.head][self.rows]


@pytest.fixture(scope="module", params=list(FAMILIES))
def case(request):
    return Case(request.param)


def test_it_is_the_real_class(case):
    import transformers

    model = case.subject.model
    assert type(model) is getattr(transformers, case.family.class_name)
    assert model.config.model_type == case.family.model_type
    rope = model.config.text_config.rope_parameters
    assert rope["rope_type"] == "default"
    assert hasattr(model.get_decoder().layers[0].self_attn, "q_norm") == (
        case.family.model_type == "qwen3_vl"
    )


def test_features_hold_their_place(case):
    features = case.features().float()
    height = torch.arange(case.grid.height).repeat_interleave(case.grid.width).repeat(FRAMES)
    width = torch.arange(case.grid.width).repeat(case.grid.height * FRAMES)
    want = CODE_HEIGHT * code_of(height, width).float()
    error = (features[:, CODE:RESERVED] - want).square().mean().sqrt()
    assert float(error) < 0.1 * CODE_HEIGHT
    torch.testing.assert_close(features[:, ONE], torch.full_like(features[:, ONE], ONE_SIZE))
    assert 0.8 < float(features[:, RESERVED:].std()) < 1.2


def test_codes_of_other_places_differ():
    """No place within 12 rows and 17 columns is more than half alike."""
    height, width = torch.meshgrid(torch.arange(12), torch.arange(17), indexing="ij")
    codes = code_of(height.flatten(), width.flatten())
    alike = codes @ codes.mT / (codes.shape[1] / 2)
    torch.testing.assert_close(alike.diagonal(), torch.ones(len(codes)).double())
    assert float((alike - torch.eye(len(codes))).max()) < 0.55


def test_place_heads_look_at_the_same_place_in_earlier_frames(case):
    p = case.of_kind("place")
    same = p[:, case.frames].diagonal(dim1=0, dim2=2).sum(0)
    assert float((same + p[:, 0]).mean()) > 0.8 and float(same.mean()) > 0.3
    # Not in the own frame alone.
    earlier = p[:, case.frames[:-1]].diagonal(dim1=0, dim2=2).sum(0)
    assert float(earlier.mean()) > 0.25


def test_grid_heads_look_at_one_place_of_every_frame(case):
    p = case.of_kind("grid")
    height, width = case.grid.place
    where = height * case.grid.width + width
    assert float(p[:, case.frames[:, where]].sum(-1).mean()) > 0.4
    strongest = p[:, case.frames].mean(0).argmax(-1)
    assert bool((strongest == where).float().mean() > 0.9)


def test_spots_are_the_salient_tokens(case):
    salient = case.frames.flatten()[case.features()[:, 2] > 20]
    assert 2 <= len(salient) < case.grid.num_tokens // 16
    assert float(case.of_kind("spots")[:, salient].sum(-1).mean()) > 0.4


def test_local_and_sink_heads(case):
    local = case.of_kind("local")
    # The nearest quarter of the prompt.
    assert float(local[:, case.frames[-3:].flatten()].sum(-1).mean()) > 0.6
    assert float(case.of_kind("sink")[:, 0].mean()) > 0.4


def test_permattn_finds_the_grid(case):
    with patch(case.subject.model, PrefillConfig(min_q_len=64)) as handle, torch.no_grad():
        case.subject.model(**case.subject.inputs, use_cache=False, logits_to_keep=1)
    seen = [g for g in handle.last_layout.rows[0] if isinstance(g, TokenGrid)]
    assert [(g.frames, g.height, g.width) for g in seen] == [
        (FRAMES, case.grid.height, case.grid.width)
    ]
    assert seen[0].token_of_rank().tolist() == case.frames.flatten().tolist()


def test_the_same_seed_gives_the_same_model(case):
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    again = case.build()
    assert torch.equal(torch.random.get_rng_state(), before)
    pairs = zip(case.subject.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("frames, want", [(None, (15, 12, 12)), (12, (6, 19, 19))])
def test_square_frames(frames, want):
    grid = grid_for("internvl", 2048, frames, 2.0)
    assert (grid.frames, grid.height, grid.width) == want
    assert grid_for("qwen3_vl", 2048, None, 2.0) == Grid(16, 8, 16)
