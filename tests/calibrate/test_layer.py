"""Errors, recall and cost of a pattern against dense float64 attention with its mask."""

from __future__ import annotations

import pytest
import torch
from permattn.calibrate.layer import Exact, LayerInput, score, time_patterns
from permattn.core import TokenGrid, TokenRun
from permattn.patterns.mminference import HeadPattern
from permattn.testing import masked_attention, visible_pairs

GRID = TokenGrid(40, 5, 4, 6, tuple(40 + 40 * i for i in range(5)))
HEADS = (
    HeadPattern("vertical_slash", local=64, vertical=32, slash=2),
    HeadPattern("grid", local=64, last=0),
    HeadPattern("a_shape", sink=8, local=32),
    HeadPattern("dense"),
)


def small_layer(num_q: int = 300, *, scale: float | None = None) -> LayerInput:
    """300 keys, two rows; the first has padding on the left, audio, and text between frames."""
    torch.manual_seed(1)
    q, k, v = torch.randn(2, 4, num_q, 16), torch.randn(2, 2, 300, 16), torch.randn(2, 2, 300, 8)
    rows = ((GRID, TokenRun(250, 20, "audio")), (TokenGrid(0, 10, 3, 10),))
    return LayerInput(q, k, v, rows, (11, 0), (0, 0), scale)


CASES = {"whole": (300, None), "last-rows": (120, None), "own-scale": (300, 0.4)}


@pytest.mark.parametrize("num_q, scale", CASES.values(), ids=CASES.keys())
def test_score_matches_dense_masks(num_q, scale):
    layer = small_layer(num_q, scale=scale)
    plan = layer.plan(HEADS)
    found = score(layer, Exact.of(layer), plan)
    used = 0.25 if scale is None else scale
    q, k, v = (x.double() for x in (layer.q, layer.k, layer.v))
    causal = torch.ones(num_q, 300, dtype=torch.bool).tril(300 - num_q).expand(2, 4, -1, -1).clone()
    causal[0, :, :, :11] = False
    if num_q == 300:
        causal[0, :, :11] = False
    truth, total = masked_attention(q, k, v, causal, used)
    kept = visible_pairs(plan, 2, 4).bool()
    assert not (kept & ~causal).any()
    ours, part = masked_attention(q, k, v, kept, used)
    share = (part - total).exp().nan_to_num(0.0)
    rows = layer.modality_rows()
    assert set(rows) == {"text", "vision", "audio"} & set(rows)
    for name, mask in rows.items():
        err2 = ((ours - truth).square().sum(-1) * mask[:, None]).sum((0, 2))
        torch.testing.assert_close(
            torch.tensor(found.err2[name], dtype=torch.float64), err2, rtol=1e-3, atol=1e-6
        )
        mass = (share * mask[:, None]).sum((0, 2))
        torch.testing.assert_close(
            torch.tensor(found.kept[name], dtype=torch.float64), mass, rtol=1e-4, atol=1e-4
        )
    assert layer.causal_pairs() == int(causal[:, 0].sum()) // 2


def test_rows_are_told_apart():
    rows = small_layer().modality_rows()
    assert [int(x) for x in rows["vision"].sum(1)] == [5 * 24, 300]
    assert [int(x) for x in rows["audio"].sum(1)] == [20, 0]
    # The padding of the first row is in no modality.
    assert int(sum(rows.values()).sum()) == 2 * 300 - 11
    assert rows["vision"][0, 40:64].all() and not rows["vision"][0, 64:80].any()


def test_dense_is_exact_and_free_of_error():
    layer = small_layer()
    exact = Exact.of(layer)
    found = score(layer, exact, layer.plan([HeadPattern("dense")] * 4))
    counts = {name: int(mask.sum()) for name, mask in exact.rows.items()}
    for name, n in counts.items():
        assert found.err2[name] == [0.0] * 4
        assert found.kept[name] == pytest.approx([n] * 4, rel=1e-5)


def test_a_model_with_its_own_scale_is_probed_with_it():
    layer = small_layer(scale=0.4)
    torch.testing.assert_close(layer.probed, layer.q * (0.4 / 0.25))
    assert small_layer().probed is not None
    plain = small_layer()
    assert plain.probed is plain.q


def test_times_are_per_head_and_in_turns():
    layer = small_layer()
    steps = []
    times = time_patterns(
        layer,
        {"a": HEADS, "b": [HEADS[2]] * 4},
        rounds=2,
        on_step=lambda: steps.append(1),
    )
    assert set(times) == {"a", "b"} and len(steps) == 4
    assert all(0 < ms < 1000 for ms in times.values())
