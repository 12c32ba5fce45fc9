"""Offline searches: which pattern every head of a model should run, and what a prompt costs."""

from permattn.calibrate.align import Budget
from permattn.calibrate.passes import Sample
from permattn.calibrate.result import SearchResult
from permattn.calibrate.search import SearchOptions, search_prefill
from permattn.calibrate.space import Candidate, Space
from permattn.calibrate.state import StateError

__all__ = [
    "Budget",
    "Candidate",
    "Sample",
    "SearchOptions",
    "SearchResult",
    "Space",
    "StateError",
    "search_prefill",
]
