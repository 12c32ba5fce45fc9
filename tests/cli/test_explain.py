"""The memory part of `permattn info --explain`."""

from __future__ import annotations

import json

import pytest
from permattn import cli

BASE = ["info", "--explain", "--json", "--heads", "8", "--kv-heads", "2", "--head-dim", "64"]


def explain(capsys, *argv: str) -> dict:
    assert cli.main([*BASE, *argv]) == 0
    return json.loads(capsys.readouterr().out)["explain"]["memory"]


def test_bytes_of_the_call(capsys):
    found = explain(capsys, "--tokens", "4000", "--pattern", "grid", "--frame", "8x8")
    assert found["q"] == found["out"] == 4000 * 8 * 64 * 2
    assert found["k"] == found["v"] == 4000 * 2 * 64 * 2
    assert found["peak"] >= 2 * found["q"] + 2 * found["k"] + found["plan"]
    assert found["total"] == found["peak"] and "fits" not in found


def test_other_layers_and_weights_count(capsys):
    argv = ["--tokens", "4000", "--layers", "10", "--weights-gb", "1.5"]
    found = explain(capsys, *argv)
    assert found["beside"] == 9 * 2 * found["k"] + 1_500_000_000


def test_it_says_how_many_heads_fit(capsys):
    argv = ["--tokens", "20000", "--pattern", "grid"]
    whole = explain(capsys, *argv)
    half = explain(capsys, *argv, "--heads-per-pass", "4")
    assert half["heads_per_pass"] == 4 and half["peak"] < whole["peak"]
    between = (half["peak"] + whole["peak"]) / 2 / 1e9
    found = explain(capsys, *argv, "--memory-gb", str(between))
    assert found["fits"] is False and found["most_heads_per_pass"] == 4
    assert cli.main([x for x in BASE if x != "--json"] + [*argv, "--memory-gb", str(between)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "set heads_per_pass" in text and "alive while planning" in text
    assert explain(capsys, *argv, "--memory-gb", "1000")["fits"] is True
    assert explain(capsys, *argv, "--memory-gb", "0.001")["most_heads_per_pass"] is None


BAD = {
    "pattern": (["--pattern", "fancy"], "--pattern"),
    "frame": (["--frame", "16"], "--frame"),
    "frame-zero": (["--frame", "0x4"], "--frame"),
    "heads-per-pass": (["--heads-per-pass", "3"], "at least the 4 query heads"),
}


@pytest.mark.parametrize("argv, hint", BAD.values(), ids=BAD.keys())
def test_bad_input(argv, hint, capsys):
    assert cli.main([*BASE, *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and hint in captured.err and captured.err.count("\n") == 1
