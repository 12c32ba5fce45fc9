"""Kernels on the CPU under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import build
import pytest
import recorded_cases
import replays
from recorded_cases import recorded, shim_path  # noqa: F401

WHY_NOT = build.why_no_program("memory")
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

PLANTED = {
    "load-out-of-bounds": "heap-buffer-overflow",
    "shared-store-out-of-bounds": "heap-buffer-overflow",
    "misaligned": "misaligned address",
    "signed-overflow": "signed integer overflow",
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults_are_seen_where_they_are(name):
    outcome = replays.replay_planted("memory", name)
    assert outcome.status != 0
    assert PLANTED[name] in outcome.told
    assert "planted.cpp:" in outcome.told


def test_what_is_right_passes():
    for name in ("right", "right-in-a-warp"):
        outcome = replays.replay_planted("memory", name)
        assert (outcome.status, outcome.told) == (0, "")


@pytest.mark.parametrize("name", recorded_cases.MADE)
def test_shipped_kernels_touch_what_is_theirs(recorded, name):  # noqa: F811
    for recording in recorded(name):
        outcome = replays.replay("memory", recording)
        assert (outcome.status, outcome.told) == (0, "")
        assert outcome.memory == recording.after
