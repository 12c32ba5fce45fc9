"""Timing: interleaved, disturbed samples dropped, honest about it when they cannot be."""

from __future__ import annotations

import itertools
import time

import pytest

from bench import clock
from bench.clock import Samples, Timing, measure


def test_rounds_are_interleaved():
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    measure(calls, Timing(rounds=2, max_rounds=2, min_seconds=0.0))
    assert "".join(order) == "abababab"[: len(order)]
    assert len(order) == 6  # one warm-up each, two rounds


def test_disturbed_samples_are_dropped_where_enough_remain(monkeypatch):
    readings = iter([(1.0, 0.0), (9.0, 0.5), (2.0, 0.0), (3.0, 0.05)])
    monkeypatch.setattr(clock, "sample", lambda call, timing: next(readings))
    samples = measure({"a": lambda: None}, Timing(rounds=3, max_rounds=9))["a"]
    assert samples.quiet == [1.0, 2.0, 3.0]
    assert (samples.median, samples.tried, samples.is_quiet) == (2.0, 4, True)


def test_a_busy_machine_is_admitted(monkeypatch):
    readings = iter([(1.0, 0.9), (2.0, 0.0), (3.0, 0.9)])
    monkeypatch.setattr(clock, "sample", lambda call, timing: next(readings))
    samples = measure({"a": lambda: None}, Timing(rounds=2, max_rounds=3))["a"]
    assert not samples.is_quiet
    assert sorted(samples.used) == [1.0, 2.0, 3.0]


def test_quantiles_interpolate():
    samples = Samples(quiet=[4.0, 1.0, 2.0, 3.0, 5.0])
    assert samples.quantile(0.5) == samples.median == 3.0
    assert samples.quantile(0.1) == pytest.approx(1.4)


def test_sample_measures_milliseconds_per_call():
    milliseconds, _ = clock.sample(lambda: time.sleep(0.004), Timing(min_seconds=0.02))
    assert 4.0 <= milliseconds < 40.0


def test_cpu_time_does_not_count_what_others_do():
    timing = Timing(min_seconds=0.02, cpu_time=True)
    milliseconds, _ = clock.sample(lambda: time.sleep(0.02), timing)
    assert milliseconds < 4.0


def test_patience_is_bounded(monkeypatch):
    counter = itertools.count()
    monkeypatch.setattr(clock, "_busy_seconds", lambda: 100.0 * next(counter))
    start = time.perf_counter()
    assert clock._wait_for_quiet(0.4) >= 0.4
    assert time.perf_counter() - start < 3.0
