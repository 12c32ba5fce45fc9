"""Timing on a machine that others use too: interleaved rounds, disturbed samples dropped."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

_STAT = Path("/proc/stat")
# A sample is disturbed when other processes used more than this share of one core meanwhile.
FOREIGN_LIMIT = 0.10
MIN_QUIET = 3


@dataclass
class Samples:
    """Milliseconds per call of one contender; `quiet` ones were measured undisturbed."""

    quiet: list[float] = field(default_factory=list)
    noisy: list[float] = field(default_factory=list)

    @property
    def is_quiet(self) -> bool:
        return len(self.quiet) >= MIN_QUIET

    @property
    def used(self) -> list[float]:
        """The quiet samples where there are enough, else all of them."""
        return self.quiet if self.is_quiet else self.quiet + self.noisy

    @property
    def tried(self) -> int:
        return len(self.quiet) + len(self.noisy)

    def quantile(self, share: float) -> float:
        ordered = sorted(self.used)
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    @property
    def median(self) -> float:
        return statistics.median(self.used)


@dataclass(frozen=True)
class Timing:
    """How long to measure.

    Args:
        rounds: quiet samples wanted of every contender.
        max_rounds: rounds after which disturbed samples have to do.
        min_seconds: a sample repeats its call for at least that long (/proc/stat ticks in 10 ms).
        patience: seconds in all that may be spent waiting for other programs to pause.
        cpu_time: count the process's CPU time, not the wall's. Right for one thread, where it stays
            true on a busy machine; no sample is dropped then.
    """

    rounds: int = 7
    max_rounds: int = 21
    min_seconds: float = 0.2
    patience: float = 0.0
    cpu_time: bool = False


def measure(
    contenders: Mapping[str, Callable[[], object]],
    timing: Timing,
    on_sample: Callable[[str], None] = lambda name: None,
) -> dict[str, Samples]:
    """Times contenders A B A B in one process, each warmed up once before."""
    samples = {name: Samples() for name in contenders}
    for call in contenders.values():
        call()
    waited = 0.0
    for _ in range(max(timing.max_rounds, timing.rounds)):
        wanting = [n for n in contenders if len(samples[n].quiet) < timing.rounds]
        if not wanting:
            break
        for name in wanting:
            if not timing.cpu_time:
                waited += _wait_for_quiet(timing.patience - waited)
            milliseconds, foreign = sample(contenders[name], timing)
            mine = samples[name]
            is_quiet = timing.cpu_time or foreign <= FOREIGN_LIMIT
            (mine.quiet if is_quiet else mine.noisy).append(milliseconds)
            on_sample(name)
    return samples


def sample(call: Callable[[], object], timing: Timing) -> tuple[float, float]:
    """(milliseconds per call, CPU that other processes used meanwhile, in cores)."""
    count = 0
    busy, own, start = _busy_seconds(), time.process_time(), time.perf_counter()
    while True:
        call()
        count += 1
        wall = time.perf_counter() - start
        if wall >= timing.min_seconds:
            break
    used = time.process_time() - own
    foreign = (_busy_seconds() - busy) - used
    return 1e3 * (used if timing.cpu_time else wall) / count, foreign / wall


def _wait_for_quiet(patience: float) -> float:
    """Waits until other programs use less than the limit, at most `patience` s; seconds waited."""
    start = time.perf_counter()
    while time.perf_counter() - start < patience:
        busy, own, begin = _busy_seconds(), time.process_time(), time.perf_counter()
        time.sleep(0.1)
        wall = time.perf_counter() - begin
        if (_busy_seconds() - busy) - (time.process_time() - own) <= FOREIGN_LIMIT * wall:
            break
        time.sleep(0.2)
    return time.perf_counter() - start


def _busy_seconds() -> float:
    """CPU seconds that the machine has worked; our own where the kernel does not tell."""
    if not _STAT.exists():
        return time.process_time()
    with _STAT.open() as stream:
        ticks = [int(x) for x in stream.readline().split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = ticks
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
