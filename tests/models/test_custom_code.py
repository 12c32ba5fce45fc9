"""Models that splice visual tokens in by themselves: the caller states the layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from permattn.core import TokenGrid, TokenRun
from permattn.models.families.llava_video import PLACEHOLDER, rows_of_prompt
from torch import nn
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from .checks import (
    BOUND,
    GREEDY,
    Recorder,
    assert_same_generation,
    generate,
    logits,
    patched,
)
from .tiny import TEXT, grids_of


class LlavaQwenConfig(Qwen2Config):
    model_type = "llava_qwen"


class LlavaQwenForCausalLM(Qwen2ForCausalLM):
    """One placeholder per video; a newline token after every row of a frame."""

    config_class = LlavaQwenConfig

    def __init__(self, config: LlavaQwenConfig) -> None:
        super().__init__(config)
        self.projector = nn.Linear(8, config.hidden_size)
        self.newline = nn.Parameter(torch.zeros(config.hidden_size))
        self.post_init()

    def splice(self, prompts, images):
        images = iter(images)
        rows = []
        for ids in prompts:
            parts, begin = [], 0
            for place in [*(ids == PLACEHOLDER).nonzero().flatten().tolist(), len(ids)]:
                parts.append(self.model.embed_tokens(ids[begin:place]))
                begin = place + 1
                if place < len(ids):
                    frames = self.projector(next(images))
                    newline = self.newline.expand(*frames.shape[:2], 1, -1)
                    parts.append(torch.cat((frames, newline), 2).flatten(0, 2))
            rows.append(torch.cat(parts))
        length = max(map(len, rows))
        pads = [length - len(row) for row in rows]
        embeds = torch.stack(
            [nn.functional.pad(row, (0, 0, n, 0)) for row, n in zip(rows, pads, strict=True)]
        )
        mask = torch.arange(length) >= torch.tensor(pads)[:, None]
        return embeds, mask

    @torch.no_grad()
    def generate(self, prompts, images, **options):
        embeds, mask = self.splice(prompts, images)
        return super().generate(inputs_embeds=embeds, attention_mask=mask, **options)


SIZES = [(6, 3, 3), (9, 2, 4)]


@pytest.fixture(scope="module")
def spliced():
    torch.manual_seed(0)
    model = LlavaQwenForCausalLM(LlavaQwenConfig(**TEXT)).eval()
    generator = torch.Generator().manual_seed(0)

    def text(n):
        return torch.randint(10, 90, (n,), generator=generator)

    video = torch.tensor([PLACEHOLDER])
    prompts = [torch.cat((text(5), video, text(6))), torch.cat((text(3), video, text(8)))]
    images = [torch.randn(*size, 8, generator=generator) for size in SIZES]
    return model, prompts, images


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 2}, {"cache_implementation": "static"}],
    ids=["plain", "beams", "static"],
)
def test_stated_layout(spliced, options):
    model, prompts, images = spliced
    want = model.generate(prompts, images, **GREEDY, **options)
    rows = rows_of_prompt(prompts, SIZES, padding_side="left")
    plans = Recorder()
    with patched(model, plans) as handle, handle.layout(rows):
        got = model.generate(prompts, images, **GREEDY, **options)
    assert_same_generation(got, want)
    copies = options.get("num_beams", 1)
    assert plans.calls[-1][0] == tuple(row for row in rows for _ in range(copies))


def test_stated_layout_in_chunks(spliced):
    """The caller's own chunks: rows are cut at the end of every chunk."""
    model, prompts, images = spliced
    with torch.no_grad():
        embeds, mask = model.splice(prompts, images)
    length = embeds.shape[1]

    def chunked():
        cache, out = DynamicCache(config=model.config), []
        for begin in range(0, length, 40):
            end = min(begin + 40, length)
            with torch.no_grad():
                chunk = model(
                    inputs_embeds=embeds[:, begin:end],
                    attention_mask=mask[:, :end],
                    past_key_values=cache,
                )
            out.append(chunk.logits)
        return torch.cat(out, 1)

    want = chunked()
    rows = rows_of_prompt(prompts, SIZES, padding_side="left")
    plans = Recorder()
    with patched(model, plans) as handle, handle.layout(rows):
        got = chunked()
        assert handle.stats["dense"] == 0
    assert (got - want)[mask].abs().max().item() <= BOUND
    assert [n for _, _, n in plans.passes] == [40, 80, length]
    assert plans.passes[-1][0] == rows


def test_layout_ends_with_its_block(spliced):
    model, prompts, images = spliced
    with patched(model) as handle:
        with handle.layout(rows_of_prompt(prompts, SIZES, padding_side="left")):
            pass
        model.generate(prompts, images, **GREEDY)
        assert handle.last_layout.rows == ((), ())
        assert handle.stats["no_labels"] == 1


def test_layout_of_another_batch_size(spliced):
    model, prompts, images = spliced
    with (
        patched(model) as handle,
        handle.layout([[], [], []]),
        pytest.raises(ValueError, match="one entry per batch row, got 3 for 2 rows"),
    ):
        model.generate(prompts, images, **GREEDY)


def generate_with(spliced, rows, **options):
    model, prompts, images = spliced
    with patched(model) as handle, handle.layout(rows):
        return model.generate(prompts, images, **GREEDY, **options)


def test_layout_without_a_video(spliced):
    """No visual token at all: text, and exact."""
    model, prompts, images = spliced
    want = model.generate(prompts, images, **GREEDY)
    assert_same_generation(generate_with(spliced, [[], []]), want)


def test_layout_past_the_prompt(spliced):
    """Known at the first decoding step: a prompt may come in chunks."""
    message = r"rows\[1\] has TokenGrid.*ends at 108, past the 101 tokens of the prompt"
    with pytest.raises(ValueError, match=message):
        generate_with(spliced, [[], [TokenGrid(60, 12, 2, 2)]])


def test_layout_past_the_prompt_without_a_cache(spliced):
    model, prompts, images = spliced
    with torch.no_grad():
        embeds, mask = model.splice(prompts, images)
    calls = Recorder()
    with (
        pytest.raises(ValueError, match="past the 101 tokens"),
        patched(model, calls) as handle,
        handle.layout([[], [TokenRun(0, 400)]]),
    ):
        model(inputs_embeds=embeds, attention_mask=mask)
    assert calls.calls == []


def test_layout_past_the_prompt_without_decoding(spliced):
    model, prompts, images = spliced
    with torch.no_grad():
        embeds, mask = model.splice(prompts, images)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="past the 101 tokens"),
        patched(model) as handle,
        handle.layout([[], [TokenRun(0, 400)]]),
    ):
        cache = DynamicCache(config=model.config)
        model(inputs_embeds=embeds, attention_mask=mask, past_key_values=cache)


def test_layout_in_the_padding(spliced):
    """The usual mistake: positions of the prompt without its padding."""
    rows = rows_of_prompt(spliced[1], SIZES, padding_side="right")
    message = r"rows\[0\] has TokenGrid\(start=5.* in the 18 tokens of padding"
    with pytest.raises(ValueError, match=message):
        generate_with(spliced, rows)


def test_layout_with_shared_tokens(spliced):
    model, _, _ = spliced
    with patched(model) as handle:
        for row in (
            [TokenGrid(10, 4, 2, 2), TokenRun(25, 3, "audio")],
            [TokenGrid(10, 2, 2, 2, (10, 20)), TokenRun(20, 3, "audio")],
        ):
            message = rf"rows\[1\]: TokenGrid.* and TokenRun.* share token {row[1].start}"
            with pytest.raises(ValueError, match=message), handle.layout([[], row]):
                pass
        between = [TokenGrid(10, 2, 2, 2, (10, 20)), TokenRun(14, 6, "audio")]
        with handle.layout([between]):
            pass


@pytest.mark.parametrize("name", ["internvl", "qwen2_5_vl"])
def test_layout_that_disagrees_with_the_ids(case_of, name):
    case = case_of(name)
    (grid,) = case.rows[0]
    moved = replace(grid, start=grid.start + 1, frame_starts=None, frames=2)
    wrong = "18|12"
    with patched(case.model) as handle:
        with (
            pytest.raises(ValueError, match=rf"whose ({wrong}) tokens in input_ids \d+ are no"),
            handle.layout([[replace(moved, start=0)]]),
        ):
            logits(case)
        with handle.layout(case.rows):
            logits(case)
            assert handle.last_layout.rows == case.rows


def test_two_videos_told_apart(case_of):
    """InternVL's frames are images: only the caller knows where a video ends."""
    case = case_of("internvl", "TWO")
    want = generate(case, prefill_chunk_size=50)
    plans = Recorder()
    with patched(case.model, plans) as handle, handle.layout(case.rows):
        got = generate(case, prefill_chunk_size=50)
    assert_same_generation(got, want)
    assert plans.calls[-1][0] == case.rows


def test_layout_of_wrong_things(spliced):
    model, _, _ = spliced
    with (
        patched(model) as handle,
        pytest.raises(TypeError, match="rows: wants TokenGrid and TokenRun segments, got int"),
        handle.layout([[3]]),
    ):
        pass


@pytest.mark.parametrize(
    ("newline", "want"),
    [
        ("grid", TokenGrid(3, 2, 3, 5)),
        ("frame", TokenGrid(3, 2, 3, 4, (3, 16))),
        ("one_token", TokenGrid(3, 2, 3, 4)),
        ("no_token", TokenGrid(3, 2, 3, 4)),
    ],
)
def test_rows_of_prompt(newline, want):
    prompt = torch.tensor([10, 11, 12, PLACEHOLDER, 13, PLACEHOLDER])
    (row,) = rows_of_prompt([prompt], [(2, 3, 4), (1, 3, 4)], newline=newline)
    first, second = grids_of(row)
    assert first == want
    spliced = {"grid": 30, "frame": 26, "one_token": 25, "no_token": 24}[newline]
    assert second.start == 3 + spliced + 1
    newlines = [(run.start, run.length) for run in row if run not in (first, second)]
    assert (
        newlines
        == {
            "grid": [],
            "frame": [(15, 1), (28, 1), (42, 1)],
            "one_token": [(27, 1), (41, 1)],
            "no_token": [],
        }[newline]
    )


@pytest.mark.parametrize(
    ("sizes", "newline", "message"),
    [
        ([(2, 3, 4)] * 2, "grid", "more sizes"),
        ([], "grid", "fewer sizes"),
        ([(2, 3, 4)], "row", "newline: wants one of"),
    ],
    ids=["more", "fewer", "newline"],
)
def test_rows_of_prompt_refuses(sizes, newline, message):
    with pytest.raises(ValueError, match=message):
        rows_of_prompt([torch.tensor([PLACEHOLDER])], sizes, newline=newline)
