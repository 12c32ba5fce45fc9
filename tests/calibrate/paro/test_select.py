"""From sums to masks: density is reached, rules hold, equals are broken the same way."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from permattn.calibrate.paro.options import SCOPES, SelectOptions
from permattn.calibrate.paro.select import (
    Selected,
    forced_blocks,
    free_density,
    largest,
    select_blocks,
)
from permattn.patterns.paro import unpack_bits
from torch import Tensor


@dataclass
class Means:
    """Block sums in one tensor [bins, L, H, nq, nk]."""

    sums: Tensor

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        a, b, c, d, e = self.sums.shape
        return a, b, c, d, e

    def mean(self, bin: int, layer: int) -> Tensor:
        return self.sums[bin, layer]


def means(
    tokens: int, block: tuple[int, int], bins: int, layers: int, heads: int, seed: int, ties: bool
) -> Means:
    """Random sums whose rows hold as much mass as their queries have."""
    generator = torch.Generator().manual_seed(seed)
    nq, nk = (-(-tokens // size) for size in block)
    x = torch.rand(bins, layers, heads, nq, nk, generator=generator)
    x = (4 * x).round() / 4 if ties else x**4
    rows = (tokens - torch.arange(nq) * block[0]).clamp_max(block[0])
    return Means(x / x.sum(-1, keepdim=True).clamp_min(1e-9) * rows[:, None])


def masks(found: Selected, shape: tuple[int, ...]) -> Tensor:
    return unpack_bits(found.packed_masks, shape[3], shape[4])


def select(x: Means, tokens: int, block=(16, 16), *, has_text=False, **options) -> Selected:
    wanted = SelectOptions(**options)
    return select_blocks(x, wanted, num_tokens=tokens, block=block, has_text=has_text)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 400),
    block=st.sampled_from([(16, 16), (32, 16), (16, 48)]),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    density=st.floats(0.01, 1.0),
    scope=st.sampled_from(["model", "layer", "head"]),
    seed=st.integers(0, 99),
    ties=st.booleans(),
)
def test_density_is_reached_and_rules_hold(tokens, block, sizes, density, scope, seed, ties):
    x = means(tokens, block, *sizes, seed, ties)
    found = select(x, tokens, block, density=density, scope=scope)
    mask = masks(found, x.shape)
    forced = forced_blocks(tokens, block)
    assert bool(mask[..., forced].all()) and bool(mask.any(-1).all())
    blocks = forced.numel()
    group = {"model": 5, "layer": 3, "head": 2}[scope]
    kept = mask.flatten(5 - group).sum(-1)
    part = mask[..., 0, 0].numel() // max(kept.numel(), 1)
    want = max(round(density * blocks * part), int(forced.sum()) * part)
    assert bool((kept == want).all())
    # No free block left out outweighs one that is kept.
    free = x.sums.masked_fill(forced, float("nan"))
    if scope == "model" and bool((mask & ~forced).any()) and bool((~mask).any()):
        assert float(free[mask & ~forced].min()) >= float(free[~mask].max())
    again = select(x, tokens, block, density=density, scope=scope)
    assert torch.equal(again.packed_masks, found.packed_masks)


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(40, 300), share=st.floats(0.05, 1.0), bound=st.floats(0.2, 1.0),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_coverage_is_reached_with_the_fewest_blocks(tokens, share, bound, seed):
    x = means(tokens, (16, 16), 1, 1, 3, seed, False)
    mask = masks(select(x, tokens, scope="coverage", coverage=share, density=bound), x.shape)
    forced = forced_blocks(tokens, (16, 16))
    most = max(round(bound * forced.numel()), int(forced.sum()))
    for head, kept in zip(x.sums[0, 0].double(), mask[0, 0], strict=True):
        held = float(head[kept].sum() / head.sum())
        assert int(kept.sum()) <= most
        if int(kept.sum()) < most:
            assert held >= share * (1 - 1e-6)
        extra = kept & ~forced
        if bool(extra.any()):
            assert held - float(head[extra].min() / head.sum()) < share


def test_one_threshold_gives_peaked_heads_fewer_blocks_than_flat_ones():
    """The point of a threshold over heads: blocks go where they hold mass."""
    tokens = 320
    flat = means(tokens, (16, 16), 1, 1, 1, 0, False).sums
    peaked = torch.eye(20).expand(1, 1, 1, 20, 20) * 16
    x = Means(torch.cat((flat, peaked), 2))
    counts = masks(select(x, tokens, density=0.3), x.shape).sum((-2, -1))[0, 0]
    assert int(counts[1]) == 20 and int(counts.sum()) == round(0.3 * 800)
    per_head = masks(select(x, tokens, density=0.3, scope="head"), x.shape).sum((-2, -1))
    assert per_head.flatten().tolist() == [120, 120]


def test_recall_is_one_less_the_mass_left_out():
    x = means(320, (16, 16), 2, 2, 3, 1, False)
    found = select(x, 320, density=0.4)
    lost = (x.sums * ~masks(found, x.shape)).sum((-2, -1)) / 320
    torch.testing.assert_close(found.recall, 1 - lost, rtol=0, atol=1e-6)


def test_full_density_keeps_everything():
    x = means(100, (16, 16), 1, 2, 2, 0, True)
    for scope in SCOPES:
        found = select(x, 100, density=1.0, scope=scope, coverage=1.0)
        assert float(found.recall.min()) > 1 - 1e-6
    assert bool(masks(select(x, 100, density=1.0), x.shape).all())


def test_forced_blocks():
    assert forced_blocks(64, (16, 16)).tolist() == torch.eye(4).bool().tolist()
    ragged = forced_blocks(50, (16, 16))
    assert bool(ragged[-1].all()) and bool(ragged[:, -1].all()) and int(ragged.sum()) == 10
    wide = forced_blocks(64, (16, 32))
    assert wide.tolist() == [[True, False]] * 2 + [[False, True]] * 2
    assert bool(forced_blocks(1, (16, 16)).all())


def test_free_density_leaves_forced_blocks_out():
    kept = torch.tensor([4, 10, 16])
    assert free_density(kept, 64, (16, 16)).tolist() == [0.0, 0.5, 1.0]
    assert free_density(torch.tensor([1]), 9, (16, 16)).tolist() == [1.0]


def test_empty_heads_are_asked_for_and_need_text():
    x = means(96, (16, 16), 2, 1, 3, 0, False)
    x.sums[:, :, 1] *= 0.005
    assert not bool(select(x, 96, has_text=True).empty_heads.any())
    assert not bool(select(x, 96, empty_below=0.01).empty_heads.any())
    found = select(x, 96, has_text=True, empty_below=0.01)
    assert found.empty_heads.tolist() == [[False, True, False]]
    assert int(masks(found, x.shape)[:, :, 1].sum()) == 0
    torch.testing.assert_close(found.recall[:, 0, 1], torch.full((2,), 0.995), rtol=0, atol=1e-4)


def test_a_recall_below_the_floor_is_refused():
    x = means(320, (16, 16), 1, 2, 1, 0, False)
    with pytest.raises(ValueError, match=r"min_recall: layer \d keeps 0\.\d+ .* density 0.2"):
        select(x, 320, density=0.2, min_recall=0.99)
    select(x, 320, density=1.0, min_recall=0.99)


def test_sums_that_are_not_finite_are_refused():
    x = means(96, (16, 16), 1, 1, 1, 0, False)
    x.sums[0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer 0: block sums are not finite"):
        select(x, 96)


@given(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0]), min_size=1, max_size=20), st.integers(0, 9))
def test_largest_breaks_ties_by_place(values, count):
    x = torch.tensor(values)
    ranked = sorted((i for i, v in enumerate(values) if v >= 0), key=lambda i: (-values[i], i))
    assert largest(x, count).nonzero().flatten().tolist() == sorted(ranked[:count])
