"""The measuring pass on a model without a network: right, resumable, and small."""

from __future__ import annotations

import importlib
from dataclasses import replace

import permattn as pa
import pytest
import torch
from permattn.calibrate.paro import MeasureOptions, SelectOptions, measure_runs
from permattn.calibrate.paro.select import BlockMeans
from permattn.calibrate.state import StateError
from permattn.core.axis_order import cells_in_order
from permattn.patterns.paro import ParoPlan

from .fakes import FakeFacts, FakeModel

OPTIONS = MeasureOptions(block=(16, 16), density=0.3)
HALF = SelectOptions(density=0.4)


def all_sums(means: BlockMeans) -> torch.Tensor:
    bins, layers = means.shape[:2]
    return torch.stack([means.mean(b, n) for b in range(bins) for n in range(layers)])


def equal(a: ParoPlan, b: ParoPlan) -> bool:
    return (
        torch.equal(a.axis_orders, b.axis_orders)
        and torch.equal(a.packed_masks, b.packed_masks)
        and torch.equal(a.recall, b.recall)  # type: ignore[arg-type]
        and a.sigma_edges == b.sigma_edges
        and a.origin == b.origin
    )


@pytest.mark.parametrize("text", [0, 11], ids=["no-text", "text"])
def test_sums_are_those_of_the_dense_softmax_in_the_chosen_order(text):
    facts = FakeFacts(text="prefix" if text else "none")
    model = FakeModel(facts, text=text, guided=True, num_steps=2)
    found = measure_runs(model.run, 2, facts, replace(OPTIONS, bins="shared"))
    assert model.runs == 4 and found.text_tokens == text
    want = torch.zeros(facts.num_layers, facts.num_heads, 16, 16, dtype=torch.double)
    order = cells_in_order(model.grid, found.axis_orders)
    for number in range(2):
        for sigma in (1.0, 0.5):
            for guidance in range(2):
                for layer in range(facts.num_layers):
                    q = model.rows(number, layer, sigma, guidance)[0].double()
                    p = torch.softmax(q @ q.mT * facts.head_dim**-0.5, -1)[:, text:, text:]
                    for h in range(facts.num_heads):
                        at = order[layer, h].long()
                        want[layer, h] += p[h][at][:, at].view(16, 16, 16, 16).sum((1, 3)) / 8
    torch.testing.assert_close(all_sums(found.means).double(), want, rtol=1e-4, atol=1e-5)


def test_padded_text_takes_no_mass():
    """Sums with text of which a part is padding are those with the other part alone."""
    facts = FakeFacts(text="prefix", num_layers=1)
    model = FakeModel(facts, text=9, num_steps=1)
    visible = torch.arange(9)[None] < 4

    def loud(seen):
        q = seen.q.clone()
        q[:, :, 4:9] *= 8.0
        return replace(seen, q=q, k=q)

    def padded(number, on_seen):
        model.run(number, lambda seen: on_seen(replace(loud(seen), text_visible=visible)))

    def whole(number, on_seen):
        model.run(number, lambda seen: on_seen(loud(seen)))

    def cut(number, on_seen):
        def short(seen):
            q = torch.cat((seen.q[:, :, :4], seen.q[:, :, 9:]), 2)
            grid = replace(seen.grid, start=4)
            on_seen(replace(seen, q=q, k=q, grid=grid, num_tokens=seen.num_tokens - 5))

        model.run(number, short)

    ours, want, other = (
        all_sums(measure_runs(run, 1, facts, OPTIONS).means) for run in (padded, cut, whole)
    )
    torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-6)
    assert float((other - want).abs().max()) > 1e-3


def test_every_head_gets_the_order_it_aggregates_along():
    model = FakeModel()
    found = measure_runs(model.run, 1, model.facts, OPTIONS)
    assert found.axis_orders.tolist() == [[0, 1, 2], [3, 4, 5]]
    plan = found.plan(HALF)
    assert plan.sigma_edges == (0.875, 0.625) and plan.num_bins == 3
    assert plan.recall is not None and float(plan.recall.min()) > 0.99
    assert abs(float(plan.density().mean()) - 0.4) < 0.01
    assert plan.origin.metric == "mass" and plan.origin.scope == "model"
    assert plan.origin.num_steps == 4 and plan.origin.version == pa.__version__


def test_a_reordered_plan_keeps_more_than_one_in_raster_order():
    model = FakeModel(grid=(16, 4, 4), num_steps=1)
    found = measure_runs(model.run, 1, model.facts, OPTIONS)
    raster = replace(found, axis_orders=torch.zeros_like(found.axis_orders))
    # The same masks mean nothing in another order; measure in raster order instead.
    sums = measure_runs(
        model.run, 1, model.facts, replace(OPTIONS, alpha=1.0, density=1.0)
    )  # nothing is lost at full density, so every order ties and the raster wins
    assert torch.equal(sums.axis_orders, raster.axis_orders)
    ours, theirs = (x.plan(SelectOptions(density=0.25)).recall for x in (found, sums))
    assert float(ours.mean()) > float(theirs.mean()) + 0.05


def test_one_measurement_gives_plans_of_all_densities():
    model = FakeModel()
    found = measure_runs(model.run, 1, model.facts, OPTIONS)
    recalls = [float(found.plan(SelectOptions(density=d)).recall.mean()) for d in (0.2, 0.4, 0.8)]
    assert recalls == sorted(recalls) and model.runs == 2


@pytest.mark.parametrize("stop_at", [3, 9], ids=["first-step", "second-step"])
@pytest.mark.parametrize("stage", ["orders", "masks"])
def test_resumed_equals_uninterrupted(tmp_path, stop_at, stage):
    model = FakeModel(guided=True)
    whole = measure_runs(model.run, 2, model.facts, OPTIONS)
    stopped = replace(model, stop_at=stop_at)

    def run(number, on_seen):
        # Runs 0 and 1 compare orders, 2 and 3 sum blocks; the second of a stage is cut off.
        stopped.stop_at = stop_at if stopped.runs == (1 if stage == "orders" else 3) else None
        stopped.run(number, on_seen)

    with pytest.raises(KeyboardInterrupt):
        measure_runs(run, 2, model.facts, OPTIONS, resume=tmp_path)
    assert not list(tmp_path.glob("*.part"))
    again = FakeModel(guided=True)
    resumed = measure_runs(again.run, 2, model.facts, OPTIONS, resume=tmp_path)
    assert again.runs == (3 if stage == "orders" else 1)
    assert torch.equal(all_sums(resumed.means), all_sums(whole.means))
    assert equal(resumed.plan(HALF), whole.plan(HALF))
    third = FakeModel(guided=True)
    assert equal(
        measure_runs(third.run, 2, model.facts, OPTIONS, resume=tmp_path).plan(HALF),
        whole.plan(HALF),
    )
    assert third.runs == 0


def test_a_foreign_folder_is_refused(tmp_path):
    model = FakeModel(num_steps=1)
    measure_runs(model.run, 1, model.facts, OPTIONS, resume=tmp_path, identity={"prompt": "a"})
    with pytest.raises(StateError, match=r"made by a search with identity.prompt = \"a\""):
        measure_runs(model.run, 1, model.facts, OPTIONS, resume=tmp_path, identity={"prompt": "b"})
    other = replace(OPTIONS, block=(32, 16))
    with pytest.raises(StateError, match=r"block\.0"):
        measure_runs(model.run, 1, model.facts, other, resume=tmp_path, identity={"prompt": "a"})


def test_damaged_sums_are_refused(tmp_path):
    model = FakeModel(num_steps=1)
    found = measure_runs(model.run, 1, model.facts, OPTIONS, resume=tmp_path)
    path = next(tmp_path.glob("sums.*"))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(StateError, match="damaged"):
        found.plan(HALF)


def test_unknown_numbers_of_steps_are_measured_at_every_step():
    told, untold = FakeModel(num_steps=3), FakeModel(num_steps=3, states_steps=False)
    plans = [
        measure_runs(m.run, 1, m.facts, replace(OPTIONS, order_steps=9, bins="per_step")).plan(HALF)
        for m in (told, untold)
    ]
    assert equal(*plans) and plans[0].num_bins == 3


def peak_of(grid: tuple[int, int, int]) -> tuple[int, int]:
    """Bytes that a measurement allocates beside its inputs at most, and those of one map."""
    facts = FakeFacts(num_layers=1, num_heads=1)
    model = FakeModel(facts, grid=grid, num_steps=1)
    n = grid[0] * grid[1] * grid[2]
    options = MeasureOptions(block=(64, 64))
    with torch.profiler.profile(profile_memory=True) as profile:
        measure_runs(model.run, 1, facts, options)
    live = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most, 4 * n * n


def test_memory_does_not_grow_with_the_square_of_the_tokens(monkeypatch):
    """Twice the tokens, twice the bytes: maps would take four times as many."""
    home = importlib.import_module("permattn.backends.reference.block_mass")
    monkeypatch.setattr(home, "_CHUNK", {"cpu": 1 << 17})
    small, small_map = peak_of((4, 16, 32))
    large, large_map = peak_of((8, 16, 32))
    assert large < 2.6 * small and large < 0.4 * large_map and small < small_map


@pytest.mark.parametrize("what", ["grid", "steps", "heads", "layer", "nan", "no-call", "no-prompt"])
def test_runs_that_do_not_fit_are_refused(what):
    model = FakeModel(num_steps=2)
    other = FakeModel(
        FakeFacts(num_heads=2 if what == "heads" else 3, num_layers=3 if what == "layer" else 2),
        grid=(4, 4, 8) if what == "grid" else (4, 8, 8),
        num_steps=3 if what == "steps" else 2,
    )

    def run(number, on_seen):
        def broken(seen):
            bad = seen.q * (float("nan") if what == "nan" and number else 1.0)
            on_seen(replace(seen, q=bad))

        if what != "no-call":
            (other if number else model).run(number, broken)

    text = {
        "grid": r"prompts\[1\]: runs on a grid of \(4, 4, 8\)",
        "steps": r"prompts\[1\]: runs 3 steps at other noise levels",
        "heads": r"q: wants \[B, 3,",
        "layer": "layer: wants 0 to 1, got 2",
        "nan": "layer 0: attention is not finite",
        "no-call": r"prompts\[0\]: ran without a single self-attention call",
        "no-prompt": "prompts: wants at least one",
    }[what]
    with pytest.raises(ValueError, match=text):
        measure_runs(run, 0 if what == "no-prompt" else 2, model.facts, OPTIONS)
