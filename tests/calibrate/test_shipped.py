"""The configs that ship: valid, for any size, and honest about what they were built on."""

from __future__ import annotations

import pytest
import torch
from permattn.cli.demo.circuits import Grid
from permattn.cli.demo.subject import CONSTRUCTED
from permattn.models import PrefillConfig, patch
from permattn.models.config import shipped_configs


def test_there_are_some():
    assert set(CONSTRUCTED) <= set(shipped_configs())


def test_they_fit_any_size_and_say_what_they_were_built_on():
    for name in shipped_configs():
        config = PrefillConfig.load("shipped", name)
        assert config.model_type == name
        assert config.num_heads is None and config.num_layers is None and not config.layers
        assert "constructed weights, not a released checkpoint" in config.base_model
        assert config.default.pattern != "dense"


@pytest.mark.parametrize("name", CONSTRUCTED)
def test_a_shipped_config_runs(name, make_subject):
    subject = make_subject(name, Grid(12, 8, 8))
    shipped = PrefillConfig.load("shipped", name).model_copy(update={"min_q_len": 64})
    with patch(subject.model, shipped) as handle, torch.no_grad():
        subject.model(**subject.inputs, use_cache=False, logits_to_keep=1)
    assert handle.stats["sparse"] == 2 and handle.stats["dense"] == 0
