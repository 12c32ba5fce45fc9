"""The state folder: whole files, equal arguments, damage."""

from __future__ import annotations

import json

import pytest
from permattn.calibrate import StateError
from permattn.calibrate.state import State

ARGUMENTS = {"layers": (0, 1), "budget": {"density": 0.1}}


def test_values_outlive_the_process(tmp_path):
    State(tmp_path / "s", ARGUMENTS).put("a", {"x": [1.5]})
    again = State(tmp_path / "s", ARGUMENTS)
    assert again.get("a") == {"x": [1.5]} and again.get("b") is None
    assert not list((tmp_path / "s").glob("*.part"))


def test_without_a_folder_values_live_in_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = State(None, ARGUMENTS)
    state.put("a", 1)
    assert state.get("a") == 1 and list(tmp_path.iterdir()) == []


def test_other_arguments_are_refused_by_name(tmp_path):
    State(tmp_path, ARGUMENTS)
    with pytest.raises(StateError, match=r"budget\.density = 0\.1, this one has 0\.2"):
        State(tmp_path, {**ARGUMENTS, "budget": {"density": 0.2}})


def test_a_folder_of_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(StateError, match="holds files that no search left"):
        State(tmp_path, ARGUMENTS)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_half_written_value_counts_as_missing(tmp_path):
    state = State(tmp_path, ARGUMENTS)
    state.put("a", [1, 2, 3])
    (tmp_path / "a.json").write_text("[1, 2")
    assert State(tmp_path, ARGUMENTS).get("a") is None


@pytest.mark.parametrize("text", ["{", "[]"], ids=["cut", "not-a-dict"])
def test_damaged_arguments(tmp_path, text):
    State(tmp_path, ARGUMENTS)
    (tmp_path / "arguments.json").write_text(text)
    with pytest.raises(StateError, match="damaged"):
        State(tmp_path, ARGUMENTS)


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="cannot be used"):
        State(tmp_path / "file", ARGUMENTS)


def test_a_failed_write_leaves_no_part(tmp_path):
    state = State(tmp_path, ARGUMENTS)
    with pytest.raises(TypeError):
        state.put("a", object())
    assert json.loads((tmp_path / "arguments.json").read_text())
    assert [p.name for p in tmp_path.iterdir()] == ["arguments.json"]
