import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from permattn import Permutation, permute_tokens
from permattn.testing import random_permutation


@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 70), holes=st.integers(0, 9), keep=st.floats(0.1, 1.0), seed=st.integers(0))
def test_both_maps_are_inverse(n, holes, keep, seed):
    g = torch.Generator().manual_seed(seed % 2**31)
    perm = random_permutation(n, batch=2, heads=3, holes=holes, keep=keep, generator=g)
    perm.validate()
    token, slot = perm.token_of_slot, perm.slot_of_token
    for b in range(2):
        for h in range(3):
            for i, t in enumerate(token[b, h].tolist()):
                assert t == -1 or slot[b, h, t] == i
            assert (slot[b, h] >= 0).sum() == (token[b, h] >= 0).sum()


def test_round_trip_is_bit_exact():
    perm = random_permutation(33, heads=2, holes=4)
    x = torch.randn(3, 2, 33, 5)
    there = permute_tokens(x, perm.token_of_slot)
    assert torch.equal(there[:, perm.token_of_slot[0] < 0], torch.zeros(3, 8, 5))
    assert torch.equal(permute_tokens(there, perm.slot_of_token), x)


def test_without_tokens_leaves_holes_and_other_slots():
    perm = Permutation.identity(6)
    dropped = torch.tensor([[[True, False], [False, True]]]).repeat(1, 1, 3)
    out = perm.without_tokens(dropped)
    assert out.token_of_slot[0].tolist() == [[-1, 1, -1, 3, -1, 5], [0, -1, 2, -1, 4, -1]]
    out.validate()


@pytest.mark.parametrize(
    ("token", "match"),
    [([0, 1, 3], r"\[-1, 3\)"), ([0, -2, 1], r"\[-1, 3\)"), ([0, 1, 1], "more than one slot")],
    ids=["too-large", "negative", "repeated"],
)
def test_bad_tokens_raise(token, match):
    with pytest.raises(ValueError, match=match):
        Permutation.from_token_of_slot(torch.tensor(token), 3)


def test_wrong_hints_and_inverses_raise():
    token = torch.tensor([[[1, 0]]], dtype=torch.int32)
    with pytest.raises(ValueError, match="is_identity"):
        Permutation(token, token, is_identity=True).validate()
    with pytest.raises(ValueError, match="not the inverse"):
        Permutation(token, torch.tensor([[[0, 1]]], dtype=torch.int32)).validate()
    with pytest.raises(ValueError, match="int32"):
        Permutation(token.long(), token.long())


def test_permute_tokens_names_the_axis_that_does_not_fit():
    with pytest.raises(ValueError, match="head axis must be 1 or 2, got 3"):
        permute_tokens(torch.zeros(1, 2, 4, 1), torch.zeros(1, 3, 4, dtype=torch.int32))
