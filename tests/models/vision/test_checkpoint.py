"""Checkpoints: every name and shape fits, or nothing is loaded."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from permattn.models.vision import (
    BiFormer,
    BiLevelRoutingAttention,
    load_biformer,
    nchw_from_legacy,
)
from safetensors.torch import save_file

SIZES = {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 24), "head_dim": 8, "num_classes": 5}


def net(seed: int) -> BiFormer:
    torch.manual_seed(seed)
    return BiFormer(**SIZES)


def same(a: BiFormer, b: BiFormer) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return all(torch.equal(x, right[k]) for k, x in left.items())


@pytest.mark.parametrize(
    "form", ["plain", "released", "pth", "pth-with-command-line", "safetensors"]
)
def test_loads_every_form(form: str, tmp_path: Path):
    there, here = net(0), net(1)
    state = there.state_dict()
    source: object = state
    if form == "released":
        source = {"model": state, "epoch": 299}
    elif form.startswith("pth"):
        source = tmp_path / "weights.pth"
        args = {"args": argparse.Namespace(lr=0.1)} if form.endswith("line") else {}
        torch.save({"model": state, **args}, source)
    elif form == "safetensors":
        source = str(tmp_path / "weights.safetensors")
        save_file(state, source)
    assert not same(here, there)
    assert load_biformer(source, here) is here
    assert same(here, there)


def test_foreign_names_are_all_listed_and_nothing_is_loaded():
    here, before = net(1), net(1)
    state = net(0).state_dict()
    del state["norm.weight"], state["stages.0.0.mlp.0.bias"]
    state["pos_embed"] = torch.zeros(1)
    state["head.weight"] = torch.zeros(1000, 24)
    with pytest.raises(ValueError) as error:
        load_biformer(state, here)
    told = str(error.value)
    assert told.startswith("checkpoint: does not fit BiFormer. missing: ")
    assert "norm.weight" in told and "stages.0.0.mlp.0.bias" in told
    assert "unexpected: pos_embed" in told
    assert "of another shape: head.weight ([1000, 24], wants [5, 24])" in told
    assert same(here, before)


def test_long_lists_are_cut():
    with pytest.raises(ValueError, match=r"missing: .* and \d+ more; unexpected: a$"):
        load_biformer({"a": torch.zeros(1)}, net(0))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"model": 3}, "wants a state dict, got int"),
        ({}, "wants a state dict"),
        ({"a": 1}, "wants tensors by name, got int at 'a'"),
    ],
    ids=["number", "empty", "no-tensor"],
)
def test_what_is_no_state_dict_is_refused(source: dict, message: str):
    with pytest.raises(ValueError, match=message):
        load_biformer(source, net(0))


def test_a_file_that_is_not_there_or_holds_something_else(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        load_biformer(tmp_path / "none.pth", net(0))
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list\.pth holds list"):
        load_biformer(tmp_path / "list.pth", net(0))


def test_converter_knows_its_names_inside_a_network():
    state = {
        "stages.0.blocks.0.attn.qkv.qkv.weight": torch.zeros(24, 8),
        "stages.0.blocks.0.attn.wo.bias": torch.zeros(8),
        "stages.3.blocks.0.attn.qkv.weight": torch.zeros(24, 8),
        "two.weight": torch.zeros(8, 8),
    }
    new = {k: tuple(x.shape) for k, x in nchw_from_legacy(state).items()}
    assert new == {
        "stages.0.blocks.0.attn.qkv_linear.weight": (24, 8, 1, 1),
        "stages.0.blocks.0.attn.output_linear.bias": (8,),
        "stages.3.blocks.0.attn.qkv.weight": (24, 8),
        "two.weight": (8, 8),
    }
    other = BiLevelRoutingAttention(16, 2, qk_dim=8).state_dict()
    with pytest.raises(ValueError, match=r"qkv\.qkv\.weight: wants \[3 \* dim, dim\]"):
        nchw_from_legacy(other)
