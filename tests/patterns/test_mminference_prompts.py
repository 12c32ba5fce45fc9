"""Any prompt, any mix of heads: plans are legal, disjoint and what the reference mask says."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from permattn import HeadPattern, TokenGrid, TokenRun, plan_prefill
from permattn.testing import visible_pairs

from .reference_masks import lines_of, wanted

PATTERNS = ("auto", "dense", "a_shape", "tri_shape", "vertical_slash", "block_sparse", "grid")


@st.composite
def segments(draw):
    """Videos, images, audio and gaps of text, one after the other."""
    row, place = [], draw(st.integers(0, 20))
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(["video", "stamped", "image", "audio"]))
        height, width = draw(st.integers(1, 6)), draw(st.integers(1, 6))
        frames = 1 if kind == "image" else draw(st.integers(1, 9))
        if kind == "audio":
            row.append(TokenRun(place, draw(st.integers(0, 40)), "audio"))
            place = row[-1].stop
        elif kind == "stamped":
            starts = [place]
            for _ in range(frames - 1):
                starts.append(starts[-1] + height * width + draw(st.integers(0, 5)))
            row.append(TokenGrid(place, frames, height, width, frame_starts=tuple(starts)))
            place = row[-1].stop
        else:
            row.append(TokenGrid(place, frames, height, width))
            place = row[-1].stop
        place += draw(st.integers(0, 30))
    return row, place


@st.composite
def head_patterns(draw):
    def one(boundary="none"):
        return HeadPattern(
            draw(st.sampled_from(PATTERNS)),
            sink=draw(st.sampled_from([0, 1, 9, 70, 1000])),
            local=draw(st.sampled_from([1, 7, 64, 100, 1000])),
            last=draw(st.sampled_from([0, 5, 64, 1000])),
            vertical=draw(st.sampled_from([0, 3, 40, 1000])),
            slash=draw(st.sampled_from([0, 1, 5, 1000])),
            blocks=draw(st.sampled_from([0, 1, 3, 100])),
            coverage=draw(st.sampled_from([None, 0.5, 1.0])),
            strides=draw(st.sampled_from([("frame", "row"), ("frame",), (2, 7), (1000,), ()])),
            h=draw(st.booleans()),
            v=draw(st.booleans()),
            s=draw(st.booleans()),
            boundary=boundary,
            when=draw(st.sampled_from(WHEN.get(boundary, [()]))),
        )

    return [one(draw(st.sampled_from(["none", "k", "q", "2d"]))) for _ in range(2)]


SMALL = HeadPattern("a_shape", sink=2, local=3)
WHEN = {
    "q": [(), {"text": SMALL}, {"vision": SMALL, "audio": HeadPattern("dense")}],
    "2d": [(), {"text,vision": SMALL, "vision,text": HeadPattern("block_sparse", local=5)}],
}


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(st.data())
def test_any_prompt_is_planned_right(data):
    batch = data.draw(st.integers(1, 2))
    rows, ends = zip(*[data.draw(segments()) for _ in range(batch)], strict=True)
    skv = max(1, max(ends) + data.draw(st.integers(-30, 90)))
    rows = [[s for s in row if s.start <= skv] for row in rows]
    sq = data.draw(st.integers(0, skv))
    left = [data.draw(st.integers(0, skv // 3)) for _ in rows]
    right = [data.draw(st.integers(0, skv // 3)) for _ in rows]
    heads = data.draw(head_patterns())
    torch.manual_seed(skv)
    q, k = torch.randn(batch, 2, sq, 8) * 2, torch.randn(batch, 1, skv, 8) * 2
    plan = plan_prefill(q, k, rows, heads, left_pad=left, right_pad=right)
    plan.check_values()
    seen = visible_pairs(plan, batch, 2)
    prompt, chosen = lines_of(q, k, rows, heads, tuple(left), tuple(right))
    want, legal = wanted(q, k, rows, heads, prompt, chosen)
    assert seen.max() <= 1 if seen.numel() else True
    assert not ((seen > 0) & ~legal).any()
    assert not (want & (seen == 0)).any()
    itself = torch.arange(sq)
    assert torch.equal(
        seen[..., itself, itself + skv - sq] > 0, legal[..., itself, itself + skv - sq]
    )
