"""Kernels on the CPU under a checker of races, copies in flight and reads of what nothing wrote."""

from __future__ import annotations

import build
import pytest
import recorded_cases
import replays
from recorded_cases import recorded, shim_path  # noqa: F401

WHY_NOT = build.why_no_program("races")
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
FOUND = 3  # the status of replay/replay.cpp

PLANTED = {
    "no-wait": "a read of bytes that a copy still writes",
    "no-first-barrier": "a read that nothing orders after a write",
    "no-second-barrier": "a write that nothing orders after a read",
    "no-warp-barrier": "a read that nothing orders after a write",
    "barrier-of-one-warp": "a read that nothing orders after a write",
    "uninitialised-shared": "a read of what nothing wrote",
    "uninitialised-scratch": "a read of what nothing wrote",
    "two-blocks-write": "a write that nothing orders after a write",
    "a-block-reads": "a read that nothing orders after a write",
}
WAYS = {"late": (), "early": ("--eager", "--seed", "2")}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))

# Of a case: (what, how many of them every thread comes to, which of these nothing needs). A barrier
# that nothing needs stands behind another one, or before a last turn that does not come.
NEEDED = {
    # The last wait is for groups that hold no copies.
    "attention-causal-tails": [("barrier", 7, ()), ("warp-barrier", 1, ()), ("wait", 5, (4,))],
    "attention-int8-int8": [("barrier", 5, ()), ("warp-barrier", 1, ()), ("wait", 4, (3,))],
    # Q is read from shared memory only after the first tile of keys was waited for.
    "attention-dim-128-gqa-different-orders": [("barrier", 5, ()), ("wait", 3, (0,))],
    "prepare-fragments": [("barrier", 4, ())],
    "prepare-norm-rope": [("barrier", 3, ()), ("warp-barrier", 6, (0,))],
    "statistics": [("barrier", 2, ()), ("warp-barrier", 4, (0,))],
    "order": [("barrier", 11, (0, 3))],
    "strongest": [("warp-barrier", 6, ())],
    "scores": [("barrier", 5, ())],
    "pool": [("barrier", 1, ())],
    # Queries are not written over before the barrier that follows the first keys.
    "probe": [("barrier", 5, (1,)), ("wait", 2, ())],
    "compact": [("barrier", 1, ())],
}


@pytest.mark.parametrize("name", PLANTED)
@ways
def test_planted_faults_are_told_with_their_line(name, way):
    outcome = replays.replay_planted("races", name, *way)
    assert outcome.status == FOUND
    assert PLANTED[name] in outcome.told
    assert "planted.cpp:" in outcome.told or "fixtures.h:" in outcome.told


@pytest.mark.parametrize("name", ["right", "right-in-a-warp"])
@ways
def test_what_is_right_passes(name, way):
    outcome = replays.replay_planted("races", name, *way)
    assert (outcome.status, outcome.told) == (0, "")


@pytest.mark.parametrize("name", recorded_cases.MADE)
@ways
def test_shipped_kernels_have_no_races(recorded, name, way):  # noqa: F811
    for recording in recorded(name):
        outcome = replays.replay("races", recording, *way)
        assert (outcome.status, outcome.told) == (0, "")
        assert outcome.memory == recording.after


@pytest.mark.parametrize("name", NEEDED)
def test_a_shipped_kernel_without_one_of_its_barriers_is_caught(recorded, name):  # noqa: F811
    recording = recorded(name)[0]
    missed = []
    for what, count, idle in NEEDED[name]:
        for number in range(count):
            outcome = replays.replay("races", recording, "--leave-out", f"{what}:{number}")
            # Numbers that make no sense may end the program.
            if (outcome.status == 0) != (number in idle) or (
                outcome.status != 0 and "race checker: " not in outcome.told
            ):
                missed.append((what, number, outcome.status, outcome.told))
    assert not missed
