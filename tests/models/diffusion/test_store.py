"""Which plans are kept, which are built again, and the order of work of the prefetcher."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from permattn.api import sparse_attention
from permattn.core import QuantSpec
from permattn.models.diffusion.prefetch import Prefetcher
from permattn.models.diffusion.store import PlanKey, PlanStore

from .tiny import HEADS, NUM_TEXT, build, plan_for

CPU = torch.device("cpu")
ALL = (0, HEADS)


def keys(bins: int = 2) -> list[PlanKey]:
    return [PlanKey(layer, bin, 0, ALL) for bin in range(bins) for layer in (0, 1)]


def test_plans_are_built_once():
    store = PlanStore(plan_for(build("wan")), QuantSpec())
    first = [store.get(key, CPU) for key in keys()]
    again = [store.get(key, CPU) for key in keys()]
    assert all(a is b for a, b in zip(first, again, strict=True))
    assert store.num_built == 4


def test_what_is_kept_is_bounded():
    plan = plan_for(build("wan"))
    size = PlanStore(plan, QuantSpec())
    size.get(keys()[0], CPU)
    one = size.num_bytes
    # Lists differ in length from mask to mask.
    store = PlanStore(plan, QuantSpec(), kept_bytes=int(2.5 * one))
    for key in keys():
        store.get(key, CPU)
        assert store.num_bytes <= 2.5 * one
    # The bin that runs pushed the other one out.
    assert {key.bin for key, _ in store._kept} == {1}
    none = PlanStore(plan, QuantSpec(), kept_bytes=0)
    none.get(keys()[0], CPU)
    assert none.num_bytes == 0


def test_layers_that_do_not_fit_leave_the_rest_of_their_bin():
    plan = plan_for(build("wan"))
    size = PlanStore(plan, QuantSpec())
    size.get(keys()[0], CPU)
    store = PlanStore(plan, QuantSpec(), kept_bytes=int(1.5 * size.num_bytes))
    for _ in range(3):
        for key in keys(bins=1):
            store.get(key, CPU)
    assert [key.layer for key, _ in store._kept] == [0]
    assert store.num_built == 4


@pytest.mark.parametrize("name", ["cogvideox", "hunyuan_video"], ids=["prefix", "suffix"])
def test_padded_text_is_not_seen(name: str):
    plan = plan_for(build(name))
    visible = torch.ones(2, NUM_TEXT, dtype=torch.bool)
    visible[1, 3:] = False
    key = PlanKey(0, 0, NUM_TEXT, ALL)
    made = PlanStore(plan, QuantSpec()).masked(key, CPU, visible)
    want = plan.attn_plan(0, 0, num_text_tokens=NUM_TEXT, text_visible=visible)
    q, k, v = torch.randn(3, 2, HEADS, 96 + NUM_TEXT, 16).unbind(0)
    assert torch.equal(sparse_attention(q, k, v, made), sparse_attention(q, k, v, want))


@dataclass
class FakeLane:
    """Writes down what is asked of the streams."""

    log: list[str] = field(default_factory=list)
    events: int = 0

    @contextmanager
    def side(self):
        self.log.append("side {")
        yield
        self.log.append("}")

    def record(self):
        self.events += 1
        self.log.append(f"record {self.events}")
        return self.events

    def wait(self, event, made):
        self.log.append(f"wait {event} for {made}")


def prefetcher() -> tuple[Prefetcher, FakeLane]:
    lane = FakeLane()

    def load(key, number):
        lane.log.append(f"load {key} into {number}")
        return f"<{key}>"

    return Prefetcher(load, lane), lane


def test_the_next_layer_loads_while_this_one_runs():
    fetch, lane = prefetcher()
    assert fetch.take("a") == "<a>"
    fetch.start("b")
    assert fetch.take("b") == "<b>"
    fetch.start("c")
    assert lane.log == [
        *("side {", "load a into 1", "record 1", "}", "wait 1 for <a>"),
        *("side {", "load b into 0", "record 2", "}"),
        # Nothing is loaded between: b is there.
        "wait 2 for <b>",
        *("side {", "load c into 1", "record 3", "}"),
    ]


def test_what_is_there_already_is_not_loaded_again():
    fetch, lane = prefetcher()
    fetch.take("a")
    fetch.start("b")
    fetch.start("b")
    fetch.take("a")
    fetch.take("b")
    assert [line for line in lane.log if line.startswith("load")] == [
        "load a into 1",
        "load b into 0",
    ]


def test_another_layer_than_the_one_foreseen_is_loaded():
    """A step cache skips layers: what was foreseen gives way."""
    fetch, lane = prefetcher()
    fetch.take("a")
    fetch.start("b")
    assert fetch.take("z") == "<z>"
    assert lane.log[-1] == "wait 3 for <z>"
    assert "load z into 0" in lane.log


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_plans_on_a_gpu_are_the_same():
    plan = plan_for(build("wan"))
    device = torch.device("cuda", 0)
    store, host = PlanStore(plan, QuantSpec(), kept_bytes=0), PlanStore(plan, QuantSpec())
    for key in keys() * 2:
        made, want = store.get(key, device), host.get(key, CPU)
        for a, b in zip(made.parts[0].tensors(), want.parts[0].tensors(), strict=True):
            assert torch.equal(a.cpu(), b)
