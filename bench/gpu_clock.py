"""Times on a device: CUDA events, the L2 cache flushed, medians with their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

# A call of more than 100 ms is sampled less often, as its budget allows, and says how often.
WANTED = 30
BUDGET_S = 3.0
LEAST = 3
# More than twice any L2 cache.
_FLUSH_BYTES = 256 << 20


@dataclass(frozen=True)
class Times:
    """Milliseconds: median, tenth and ninetieth percentile, of how many samples; the first call,
    which may compile, apart."""

    ms: float
    p10: float
    p90: float
    reps: int
    first_ms: float = 0.0


class Clock:
    """Times calls on a device; on a CPU by the wall, for rehearsals.

    Args:
        budget_s: of the samples of a call, all together.
    """

    def __init__(
        self, device: torch.device, budget_s: float = BUDGET_S, wanted: int = WANTED
    ) -> None:
        self.device, self.budget_s, self.wanted = device, budget_s, wanted
        self.flush: torch.Tensor | None = None

    def __call__(self, call: Callable[[], object]) -> Times:
        """Warmed up twice; what is compiled, is compiled in the first call."""
        begin = time.perf_counter()
        call()
        self._wait()
        first_ms = 1e3 * (time.perf_counter() - begin)
        self._once(call)
        samples: list[float] = []
        while len(samples) < LEAST or (
            len(samples) < self.wanted and sum(samples) < 1e3 * self.budget_s
        ):
            samples.append(self._once(call))
        return replace(times_of(samples), first_ms=first_ms)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _once(self, call: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            begin = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - begin)
        if self.flush is None:
            self.flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=self.device)
        self.flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)


def times_of(samples: list[float]) -> Times:
    ordered = sorted(samples)

    def quantile(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return Times(statistics.median(ordered), quantile(0.1), quantile(0.9), len(ordered))
