"""Shared tiny models: building one costs more than most tests."""

from __future__ import annotations

import copy
import warnings
from functools import lru_cache

import pytest
import torch
import transformers

from . import tiny, tiny_models

transformers.logging.set_verbosity_error()


@lru_cache(maxsize=32)
def _built(name: str, videos: str) -> tiny.Case:
    return tiny_models.build(name, getattr(tiny, videos))


@pytest.fixture
def case_of():
    """`case_of("qwen2_5_vl", "BATCH")`: a shared model and inputs of its own to every test."""

    def get(name: str, videos: str = "ONE") -> tiny.Case:
        case = _built(name, videos)
        return tiny.Case(case.model, dict(case.inputs), case.rows)

    return get


@pytest.fixture
def own_case():
    """A model that the test may change (training, compiling, refusals)."""

    def get(name: str, videos: str = "ONE", **text) -> tiny.Case:
        case = (
            tiny_models.build(name, getattr(tiny, videos), **text) if text else _built(name, videos)
        )
        return tiny.Case(copy.deepcopy(case.model), dict(case.inputs), case.rows)

    return get


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Matrices of 64 columns: a second thread waits more than it works."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="transformers")
        yield
