import pytest
import torch
from permattn.core import TokenGrid, TokenRun, rank_of_visual_token


def test_grid_without_gaps():
    grid = TokenGrid(5, 3, 2, 4)
    assert (grid.tokens_per_frame, grid.num_tokens, grid.stop) == (8, 24, 29)
    assert torch.equal(grid.token_of_rank(), torch.arange(5, 29))


def test_grid_with_text_between_frames_squeezes_it_out():
    grid = TokenGrid(5, 3, 1, 2, frame_starts=(5, 9, 14))
    assert grid.stop == 16
    assert grid.token_of_rank().tolist() == [5, 6, 9, 10, 14, 15]
    rank = rank_of_visual_token([TokenRun(0, 5), grid], 16)
    assert rank.tolist() == [-1] * 5 + [0, 1, -1, -1, 2, 3, -1, -1, -1, 4, 5]


def test_rank_is_cut_at_the_prompt_end():
    assert rank_of_visual_token([TokenGrid(1, 2, 1, 2)], 4).tolist() == [-1, 0, 1, 2]


@pytest.mark.parametrize(
    "make",
    [
        lambda: TokenRun(-1, 3),
        lambda: TokenRun(0, -1),
        lambda: TokenGrid(-1, 1, 1, 1),
        lambda: TokenGrid(0, 0, 1, 1),
        lambda: TokenGrid(0, 2, 1, 2, frame_starts=(0,)),
        lambda: TokenGrid(0, 2, 1, 2, frame_starts=(1, 3)),
        lambda: TokenGrid(0, 2, 1, 2, frame_starts=(0, 1)),
    ],
    ids=["start", "length", "grid-start", "frames", "count", "first", "overlap"],
)
def test_bad_segments_raise(make):
    with pytest.raises(ValueError, match=r"TokenRun|TokenGrid"):
        make()
