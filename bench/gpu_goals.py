"""What was aimed at, as data, and the rooflines: both are read off a record's timed calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from bench.gpu_record import Goal, Record, Run
from bench.gpu_shapes import BF16, INT8_FP8, PEAKS

MET, NOT_MET, NOT_MEASURED = "met", "not met", "not measured"
_RATED = (0.5, 0.3, 0.2)


@dataclass(frozen=True, eq=False)
class Times:
    """The timed calls of one backend, to look up."""

    backend: str
    runs: Sequence[Run]

    def some(self, shape: str, what: str = "total", **facts: object) -> list[Run]:
        """Ours, with a time."""
        return [
            run
            for run in self.runs
            if run.contender == self.backend
            and run.shape == shape
            and run.what == what
            and run.ms is not None
            and all(getattr(run, name) == value for name, value in facts.items())
        ]

    def ms(self, shape: str, what: str = "total", **facts: object) -> float | None:
        found = self.some(shape, what, **facts)
        return found[0].ms if found else None

    def dense(self, shape: str, contender: str = "") -> float | None:
        """Milliseconds of the fastest dense kernel of others, or of one of them."""
        found = [
            run.ms
            for run in self.runs
            if run.shape == shape
            and is_dense(run)
            and run.ms is not None
            and (not contender or run.contender == contender)
        ]
        return min(found, default=None)


def is_dense(run: Run) -> bool:
    """Another package's attention over all keys, in 16 bits."""
    return run.block is None and run.what == "total" and run.format == BF16


@dataclass(frozen=True)
class Aim:
    """One goal, of every backend that is measured. `value`: None = not measured."""

    id: str
    title: str
    target: float
    value: Callable[[Times], float | None]
    at_most: bool = False


def _least_rate(block: int) -> Callable[[Times], float | None]:
    def value(times: Times) -> float | None:
        found = [
            run.of_best_dense
            for density in _RATED
            for run in times.some("e-16k", block=block, density=density, format=BF16)
        ]
        known = [x for x in found if x is not None]
        return min(known) if len(known) == len(_RATED) else None

    return value


def _flashinfer(times: Times) -> float | None:
    found = times.some("a", format=BF16)
    return found[0].tflops if found else None


def _eight_bits(times: Times) -> float | None:
    gains = []
    for shape, density in (("b", 0.1), ("c", 0.3)):
        slow = times.ms(shape, density=density, format=BF16)
        fast = times.ms(shape, density=density, format=INT8_FP8)
        if slow is None or fast is None:
            return None
        gains.append(slow / fast)
    return min(gains)


def break_even(times: Times, block: int = 128) -> float | None:
    """The density at which our time is that of the fastest dense kernel; 1 = ours is never slower.

    Between measured densities times are taken to lie on a line; 0 = slower at every one of them.
    """
    dense = times.dense("e-16k")
    found = times.some("e-16k", block=block, format=BF16)
    points = sorted((r.density, r.ms) for r in found if r.density is not None and r.ms is not None)
    if dense is None or len(points) < 2:
        return None
    if points[-1][1] <= dense:
        return 1.0
    for (low, fast), (high, slow) in zip(reversed(points[:-1]), reversed(points[1:]), strict=True):
        if fast <= dense:
            return low + (high - low) * (dense - fast) / (slow - fast)
    return 0.0


def _preparing(times: Times) -> float | None:
    facts = {"density": 0.1, "format": INT8_FP8}
    prepare, kernel = (times.ms("b", what, **facts) for what in ("prepare", "kernel"))
    if prepare is None or kernel is None:
        return None
    return (prepare + (times.ms("b", "statistics", **facts) or 0.0)) / kernel


def _planning(times: Times) -> float | None:
    shares = []
    for shape, density in (("a", None), ("b", 0.1)):
        facts = {} if density is None else {"density": density}
        plan, total = (times.ms(shape, what, format=BF16, **facts) for what in ("plan", "total"))
        if plan is None or total is None:
            return None
        shares.append(plan / total)
    return max(shares)


def _over_flash(density: float) -> Callable[[Times], float | None]:
    def value(times: Times) -> float | None:
        dense = times.dense("c", "sdpa-flash")
        ours = times.ms("c", density=density, format=BF16)
        return None if dense is None or ours is None else dense / ours

    return value


AIMS = (
    Aim("rate-128", "rate of listed blocks of 128 over the best dense rate", 0.9, _least_rate(128)),
    Aim("rate-64", "rate of listed blocks of 64 over the best dense rate", 0.75, _least_rate(64)),
    Aim(
        "flashinfer",
        "TFLOP/s at shape (a), where flashinfer published 317",
        317.0,
        _flashinfer,
    ),
    Aim("int8+fp8", "INT8 and FP8, quantising counted, over our bf16", 1.3, _eight_bits),
    Aim("break-even", "density up to which we are not slower than dense", 0.8, break_even),
    Aim(
        "prepare",
        "permuting and quantising over attention, Hunyuan at 10 %",
        0.05,
        _preparing,
        True,
    ),
    Aim("plan", "making the lists over attention, shapes (a) and (b)", 0.03, _planning, True),
    Aim("paro-50", "PAROAttention at 50 % over SDPA's FlashAttention, Wan", 1.73, _over_flash(0.5)),
    Aim("paro-30", "PAROAttention at 30 % over SDPA's FlashAttention, Wan", 2.71, _over_flash(0.3)),
    Aim("paro-20", "PAROAttention at 20 % over SDPA's FlashAttention, Wan", 3.81, _over_flash(0.2)),
)


def judge(runs: Sequence[Run], backends: Iterable[str]) -> list[Goal]:
    """Every goal of every backend: met, not met, or not measured."""
    found = []
    for backend in backends:
        for aim in AIMS:
            value = aim.value(Times(backend, runs))
            status = NOT_MEASURED
            if value is not None:
                is_met = value <= aim.target if aim.at_most else value >= aim.target
                status = MET if is_met else NOT_MET
            facts = (aim.id, aim.title, backend, aim.target, aim.at_most, status, value)
            found.append(Goal(*facts))
    return found


def complete(record: Record) -> None:
    """Fills in the rooflines of every rate, and judges the goals."""
    peak = PEAKS.get(record.device)
    product = record.ceilings.get("matmul_tflops")
    best: dict[str, float] = {}
    for run in record.bench:
        if is_dense(run) and run.tflops is not None:
            best[run.shape] = max(run.tflops, best.get(run.shape, 0.0))
    for run in record.bench:
        if run.tflops is None:
            continue
        if run.shape in best:
            run.of_best_dense = run.tflops / best[run.shape]
        if peak is not None and run.format != "its own":
            run.of_nominal = run.tflops / peak.of(run.format)
        if product:
            run.of_measured = run.tflops / product
    backends = sorted({s.backend for s in record.sections if s.backend})
    record.goals = judge(record.bench, backends) if record.bench else []
