"""The search through a real model class: consistent numbers, resumption, refusals."""

from __future__ import annotations

import pytest
import torch
from permattn.calibrate import (
    Budget,
    Sample,
    SearchOptions,
    Space,
    StateError,
    search,
    search_prefill,
)
from permattn.calibrate.layer import LayerInput
from permattn.calibrate.measure import measure_prefill
from permattn.core import TokenGrid
from permattn.models import PrefillConfig, patch
from permattn.patterns.mminference import HeadPattern

SPACE = Space().only(("a_shape 128+1024", "vertical_slash 1000+1024", "grid frame hvs"))
OPTIONS = SearchOptions(space=SPACE, budget=Budget(density=0.6), rounds=1)


@pytest.fixture(scope="module")
def found(subject, sample, tmp_path_factory):
    """(result, state folder) of one whole search."""
    folder = tmp_path_factory.mktemp("search") / "state"
    return search_prefill(subject.model, [sample], OPTIONS, state=folder), folder


def test_every_head_gets_its_best_affordable_candidate(found):
    result, _ = found
    assert sorted(result.layers) == [0, 1]
    names = {c.name for c in SPACE.candidates}
    for row in result.layers.values():
        assert len(row) == 4
        for choice in row:
            assert choice.name in names and choice.pattern.boundary == "none"
            assert 0.0 <= choice.error < 1.0 and 0.0 < choice.recall <= 1.0 + 1e-6
            assert choice.ms is not None
        assert sum(c.density for c in row) <= 4 * 0.6 * 1.05
    assert result.facts["budget_density"] == pytest.approx(0.6)
    assert result.facts["samples"][0]["rows"]["vision"] == 24 * 6 * 10


def test_the_config_does_what_the_search_measured(found, subject, sample, tmp_path):
    result, _ = found
    result.config(base_model="a test").to_json(tmp_path / "config.json")
    config = PrefillConfig.from_json(tmp_path / "config.json")
    assert config.model_type == "qwen2_5_vl" and config.num_layers == 2 and config.num_heads == 4
    again = measure_prefill(subject.model, sample, config)
    for number, row in result.layers.items():
        for choice, check in zip(row, again.layers[number], strict=True):
            assert check.pattern == choice.pattern
            assert check.error == pytest.approx(choice.error, rel=0.01, abs=1e-5)
            assert check.recall == pytest.approx(choice.recall, rel=1e-3)
            assert check.density == pytest.approx(choice.density, rel=0.02)


def test_the_config_patches_the_model(found, subject):
    config = found[0].config().model_copy(update={"min_q_len": 64})
    with patch(subject.model, config) as handle, torch.no_grad():
        subject.model(**subject.inputs, use_cache=False, logits_to_keep=1)
    assert handle.stats["sparse"] == 2 and handle.stats["dense"] == 0


def test_the_family_default_names_no_sizes(found):
    default = found[0].family_default(base_model="constructed weights")
    assert default.num_layers is None and default.num_heads is None and not default.layers
    assert default.model_type == "qwen2_5_vl" and default.base_model == "constructed weights"
    assert default.default == found[0].shared.pattern


def test_a_rerun_measures_nothing_again(found, subject, sample, monkeypatch):
    result, folder = found

    def refuse(*args, **keywords):
        assert not args[2], "a layer is measured again"

    monkeypatch.setattr(search, "run_pass", refuse)
    again = search_prefill(subject.model, [sample], OPTIONS, state=folder)
    assert again.to_json() == result.to_json()


def test_an_interrupted_search_goes_on(found, subject, sample, tmp_path):
    def interrupt(stage: str, done: float) -> None:
        if done > 0.75:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search_prefill(
            subject.model, [sample], OPTIONS, state=tmp_path / "s", on_progress=interrupt
        )
    kept = {p.name for p in (tmp_path / "s").iterdir()}
    assert kept == {"arguments.json", "heads-sample0-layer0.json"}
    # The model is whole again.
    assert subject.model.get_decoder().config._attn_implementation == "sdpa"
    seen = []
    result = search_prefill(
        subject.model,
        [sample],
        OPTIONS,
        state=tmp_path / "s",
        on_progress=lambda stage, done: seen.append(done),
    )
    assert min(x for x in seen if x) > 0.5
    for number, row in found[0].layers.items():
        for a, b in zip(row, result.layers[number], strict=True):
            # A layer that is not searched again runs torch's own dense attention: other roundings.
            assert a.error == pytest.approx(b.error, rel=1e-3) or a.name != b.name


def test_other_arguments_are_refused(found, subject, sample):
    other = SearchOptions(space=SPACE, budget=Budget(density=0.5), rounds=1)
    with pytest.raises(StateError, match="budget"):
        search_prefill(subject.model, [sample], other, state=found[1])


def test_bad_heads_stay_dense(found, subject, sample):
    result, folder = found
    limit = sorted(c.error for row in result.layers.values() for c in row)[4]
    options = SearchOptions(
        space=SPACE, budget=OPTIONS.budget, rounds=OPTIONS.rounds, max_error=limit
    )
    strict = search_prefill(subject.model, [sample], options, state=folder)
    for before, after in zip(result.layers.values(), strict.layers.values(), strict=True):
        for a, b in zip(before, after, strict=True):
            assert b == a if a.error <= limit else b.pattern == HeadPattern("dense")


def test_text_between_frames_searches_boundaries(subject, sample):
    """The caller states frames with gaps: two modalities have queries enough."""
    length = subject.inputs["input_ids"].shape[1]
    starts = tuple(range(40, length - 120, 90))
    rows = ((TokenGrid(starts[0], len(starts), 6, 10, starts),),)
    options = SearchOptions(
        space=Space().only(("a_shape 128+1024", "vertical_slash 1000+1024")),
        budget=Budget(density=0.9),
        layers=(1,),
        rounds=0,
    )
    stages = []
    result = search_prefill(
        subject.model,
        [Sample(sample.inputs, rows)],
        options,
        on_progress=lambda stage, done: stages.append(stage),
    )
    assert result.facts["modalities"] == ["text", "vision"]
    assert list(dict.fromkeys(stages))[:2] == ["heads", "pairs"]
    boundaries = {c.pattern.boundary for c in result.layers[1]}
    assert "final" in stages or boundaries == {"none"}
    assert all(c.ms is None and c.density <= 0.95 for c in result.layers[1])


def test_sizes_are_fitted_to_the_first_sample(subject, sample):
    pixels = subject.inputs["pixel_values_videos"]
    other = Sample({**sample.inputs, "pixel_values_videos": pixels.flip(0)})
    options = SearchOptions(space=SPACE, budget=Budget(density=0.6), layers=(0,), rounds=0)
    two = search_prefill(subject.model, [sample, other], options)
    one = search_prefill(subject.model, [sample], options)
    assert [s["tokens"] for s in two.facts["samples"]] == 2 * [one.facts["samples"][0]["tokens"]]
    same = [(a, b) for a, b in zip(one.layers[0], two.layers[0], strict=True) if a.name == b.name]
    assert same and all(a.pattern == b.pattern for a, b in same)
    assert any(a.error != b.error for a, b in same)


def text_only(sample: Sample) -> Sample:
    ids = sample.inputs["input_ids"]
    plain = torch.where(ids == 4, 70, ids)
    return Sample({"input_ids": plain, "attention_mask": torch.ones_like(plain)})


BAD = {
    "no-samples": (lambda s: [], SearchOptions(), "at least one"),
    "layers": (lambda s: [s], SearchOptions(layers=(0, 9)), r"layers: wants some of 0, 1"),
    "no-video": (lambda s: [text_only(s)], OPTIONS, "no visual tokens"),
    "over-the-length": (lambda s: [s], SearchOptions(), "holds all of the"),
    "below-everything": (
        lambda s: [s],
        SearchOptions(space=SPACE, budget=Budget(density=0.01), layers=(0,), rounds=0),
        "less than any candidate",
    ),
}  # fmt: skip


@pytest.mark.parametrize("samples, options, message", BAD.values(), ids=BAD.keys())
def test_bad_input(samples, options, message, subject, sample):
    with pytest.raises(ValueError, match=message):
        search_prefill(subject.model, samples(sample), options)
    assert subject.model.get_decoder().config._attn_implementation == "sdpa"


def test_a_model_of_another_library_is_refused(sample):
    with pytest.raises(TypeError, match="PreTrainedModel"):
        search_prefill(torch.nn.Linear(2, 2), [sample])


def test_a_config_of_another_model_is_refused(subject, sample):
    with pytest.raises(ValueError, match="num_heads"):
        measure_prefill(subject.model, sample, PrefillConfig(num_heads=12))


def test_planted_heads_get_what_fits_them(layer: LayerInput):
    """Head 2 looks at one place in every frame: diagonals or lines keep it, windows do not."""
    from permattn.calibrate.choose import choose_layer
    from permattn.calibrate.layer import Exact
    from permattn.calibrate.trials import Plan, try_whole_heads

    space = Space().only(("a_shape 128+1024", "grid frame s", "vertical_slash 1024+8"))
    plan = Plan(space, Budget(density=0.75), (), False, 0)
    record = try_whole_heads(layer, Exact.of(layer), plan, None, lambda share: None)
    shapes = choose_layer([record], 4, {}, pooled=False)[2]
    assert shapes.name.split()[0] in ("grid", "vertical_slash")
    window = record["trials"]["none/a_shape 128+1024"]["err2"]["vision"][2]
    assert shapes.error**2 < 0.5 * window / record["norm2"]["vision"][2]
