"""Shared tiny models: building one costs more than running it."""

from __future__ import annotations

import copy
from functools import lru_cache

import pytest

from . import tiny


@lru_cache(maxsize=16)
def _built(name: str) -> tiny.Case:
    return tiny.build(name)


@pytest.fixture
def case_of():
    """`case_of("wan")`: a shared model that the test leaves as it was, and inputs of its own."""

    def get(name: str) -> tiny.Case:
        case = _built(name)
        return tiny.Case(case.model, dict(case.inputs), case.grid, case.num_text)

    return get


@pytest.fixture
def own_case(case_of):
    """A model that the test may change."""

    def get(name: str) -> tiny.Case:
        case = case_of(name)
        case.model = copy.deepcopy(case.model)
        return case

    return get
