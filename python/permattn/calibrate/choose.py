"""From measured errors to one pattern per head."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from permattn.calibrate.space import Space
from permattn.calibrate.trials import (
    Record,
    main_modality,
    others,
    patterns_of,
    per_modality,
    per_pair,
    trial_of,
)
from permattn.patterns.mminference import HeadPattern

# Errors this close are equal: the cheaper kernel wins.
NEAR = 0.05
# A pattern for all heads must be within the budget for that share of them.
MOST_HEADS = 0.75


@dataclass(frozen=True)
class Choice:
    """What one head got.

    Args:
        name: the candidate's name, or "<modality>: <name>, ..." across a boundary.
        error: relative error of its attention output, mean over samples.
        recall: share of the true attention mass that it keeps, mean over queries and samples.
        pairs: computed pairs over all causal pairs, mean over samples.
        ms: milliseconds of one such head where it was timed, planning included.
    """

    name: str
    pattern: HeadPattern
    error: float
    recall: float
    density: float
    ms: float | None


def check_affordable(records: Sequence[Record]) -> None:
    """Raises ValueError where the budget is below the cheapest candidate of every head."""
    share = float("inf")
    for r in records:
        most = r["budget"] * (1 + r["tolerance"])
        cheapest = min(min(trial_of(r, name)["pairs"]) for name in r["trials"])
        if cheapest <= most:
            return
        share = min(share, cheapest / max(r["causal"], 1))
    first = records[0]
    raise ValueError(
        f"budget: {first['budget'] / max(first['causal'], 1):.1%} of all pairs is less than any "
        f"candidate computes at {first['tokens']} tokens (blocks of 64 keys), the cheapest "
        f"{share:.1%}; use longer prompts or a larger budget"
    )


def choose_layer(
    records: Sequence[Record], num_heads: int, times: Mapping[str, float], *, pooled: bool
) -> list[Choice]:
    """The best pattern of every head of a layer, without boundaries.

    Args:
        pooled: heads that err most may spend what the others leave: then the budget holds for the
            layer, whose heads run in one launch, and not for each head.
    """
    names = [_best(records, "none/", h, None, times) for h in range(num_heads)]
    if pooled:
        names = _spend_the_rest(records, names)
    return [_choice(records, name, h, times) for h, name in enumerate(names)]


def _spend_the_rest(records: Sequence[Record], names: list[str]) -> list[str]:
    """Upgrades heads, most error per pair first, while their layer stays within its budget."""
    first, names = records[0], list(names)
    trials = [n for n in first["trials"] if n.startswith("none/")]

    def cost(name: str, head: int) -> float:
        return trial_of(first, name)["pairs"][head]

    def error(name: str, head: int) -> float:
        return error_of(records, name, head)

    rest = len(names) * first["budget"] * (1 + first["tolerance"])
    rest -= sum(cost(n, h) for h, n in enumerate(names))
    while True:
        options = []
        for h, now in enumerate(names):
            for name in trials:
                gain = error(now, h) * (1 - NEAR) - error(name, h)
                more = cost(name, h) - cost(now, h)
                if gain > 0.0 and 0.0 < more <= rest:
                    options.append((gain / more, h, name, more))
        if not options:
            return names
        _, h, name, more = max(options)
        names[h] = name
        rest -= more


def choose_own(
    records: Sequence[Record], head: int, modalities: Sequence[str], times: Mapping[str, float]
) -> dict[str, str]:
    """Per query modality the name of its best trial."""
    return {m: _best(records, "q/", head, m, times) for m in modalities}


def own_patterns(
    records: Sequence[Record], names: Mapping[str, str], head: int
) -> dict[str, HeadPattern]:
    """The patterns behind `choose_own`, without their boundary."""
    return {m: alone(patterns_of(records[0], name)[head]) for m, name in names.items()}


def alone(pattern: HeadPattern) -> HeadPattern:
    """The pattern as part of another one's boundary."""
    return replace(pattern, boundary="none")


def choose_boundary(
    whole: Choice,
    intra: Sequence[Record],
    pairs: Sequence[Record],
    head: int,
    modalities: tuple[str, ...],
    times: Mapping[str, float],
) -> Choice:
    """No boundary, one between queries, or one between pairs: the smallest output error.

    Errors of different query modalities add up exactly, because rows do not depend on each other.
    The simpler boundary wins where errors are near.
    """
    names = choose_own(intra, head, modalities, times)
    own = own_patterns(intra, names, head)
    main = main_modality(intra[0])
    label = ", ".join(f"{m}: {_plain(n)}" for m, n in names.items())
    by_query = _combined(intra, names, head, label, per_modality(own, main))
    picks = {m: _best(pairs, "2d/", head, m, {}) for m in modalities}
    cross = {}
    for m, name in picks.items():
        _, number, kind = name.split("/", 2)
        if kind != "own":
            other = others(modalities, m)[int(number)]
            cross[m, other] = alone(patterns_of(intra[0], f"q/{kind}")[head])
    label += "".join(f"; {m} to {x}: {_kind(picks[m])}" for m, x in cross)
    by_pair = _combined(pairs, picks, head, label, per_pair(own, cross, main))
    most = _most_density(intra[0])
    chosen = whole
    for option in (by_query, by_pair):
        affordable = option.density <= max(most, whole.density)
        if affordable and option.error * (1 + NEAR) < chosen.error:
            chosen = option
    return chosen


def measured(choice: Choice, whole: Choice, records: Sequence[Record], head: int) -> Choice:
    """The choice with the numbers of the run in which all choices stood together ("final").

    Patterns that share blocks of keys when they stand alone may not when they are mixed: a boundary
    that turns out to be over the budget, or no better, gives way to `whole`.
    """
    if choice.pattern.boundary == "none":
        return choice
    found = _choice(records, "final", head, {})
    if found.density > max(_most_density(records[0]), whole.density) or found.error >= whole.error:
        return whole
    return replace(choice, error=found.error, recall=found.recall, density=found.density)


def _most_density(record: Record) -> float:
    return record["budget"] * (1 + record["tolerance"]) / max(record["causal"], 1)


@dataclass(frozen=True)
class Shared:
    """One pattern for every head: what layers and models that were not searched should run.

    Args:
        name: the candidate of least mean error.
        pattern: at the median of its sizes.
        errors: mean error over all heads, per candidate.
    """

    name: str
    pattern: HeadPattern
    errors: dict[str, float]


def choose_shared(layers: Sequence[Sequence[Record]], space: Space) -> Shared:
    """The candidate of least mean output error over all heads, were they all to run it.

    Not the one that wins most heads: a pattern that suits many heads may ruin the others.

    Args:
        layers: records per layer, one per sample each.
    """
    errors: dict[str, float] = {}
    affordable: dict[str, float] = {}
    patterns: dict[str, list[HeadPattern]] = {}
    for candidate in space.candidates:
        name = f"none/{candidate.name}"
        found, within = [], []
        for records in layers:
            first = records[0]
            most = first["budget"] * (1 + first["tolerance"])
            pairs = trial_of(first, name)["pairs"]
            within += [n <= most for n in pairs]
            found += [error_of(records, name, h) for h in range(len(pairs))]
            patterns.setdefault(candidate.name, []).extend(patterns_of(first, name))
        errors[candidate.name] = statistics.fmean(found)
        affordable[candidate.name] = statistics.fmean(within)
    # Where not even one candidate fits, the one that fits most heads.
    most_fit = min(max(affordable.values()), MOST_HEADS)
    name = min((n for n in errors if affordable[n] >= most_fit), key=lambda n: errors[n])
    scaled = next(c.scaled for c in space.candidates if c.name == name)
    sizes = {
        field: statistics.median_low(getattr(p, field) for p in patterns[name])
        for field in {*scaled, "local"}
    }
    return Shared(name, replace(patterns[name][0], **sizes), errors)


def mean_times(records: Sequence[Record]) -> dict[str, float]:
    """Milliseconds per head by trial, mean over the layers that were timed."""
    found: dict[str, list[float]] = {}
    for record in records:
        for name in record["trials"]:
            ms = trial_of(record, name).get("ms")
            if ms is not None:
                found.setdefault(name, []).append(ms)
    return {name: statistics.fmean(x) for name, x in found.items()}


def error_of(records: Sequence[Record], name: str, head: int, modality: str | None = None) -> float:
    """Relative error of a head's output in a trial, mean over samples."""
    errors = [
        _error(r, dict.fromkeys(r["rows"] if modality is None else (modality,), name), head)
        for r in records
        # A later sample may lack a modality.
        if modality is None or modality in r["rows"]
    ]
    return statistics.fmean(errors)


def _best(
    records: Sequence[Record],
    prefix: str,
    head: int,
    modality: str | None,
    times: Mapping[str, float],
) -> str:
    """The trial of least error within the budget; of near ones the cheapest."""
    first = records[0]
    names = [n for n in first["trials"] if n.startswith(prefix)]
    most = first["budget"] * (1 + first["tolerance"])
    cost = {n: trial_of(first, n)["pairs"][head] for n in names}
    # Where nothing fits, the cheapest.
    allowed = [n for n in names if cost[n] <= most] or [min(names, key=lambda n: cost[n])]
    errors = {n: error_of(records, n, head, modality) for n in allowed}
    least = min(errors.values())
    near = [n for n in allowed if errors[n] <= least * (1 + NEAR)]
    return min(near, key=lambda n: (times.get(n, cost[n]), errors[n]))


def _choice(records: Sequence[Record], name: str, head: int, times: Mapping[str, float]) -> Choice:
    names = dict.fromkeys(records[0]["rows"], name)
    pattern = patterns_of(records[0], name)[head]
    found = _combined(records, names, head, _plain(name), pattern)
    return Choice(found.name, pattern, found.error, found.recall, found.density, times.get(name))


def _combined(
    records: Sequence[Record],
    names: Mapping[str, str],
    head: int,
    label: str,
    pattern: HeadPattern,
) -> Choice:
    """A head whose query modalities take their rows from different trials."""
    fallback = next(iter(names.values()))
    errors, recalls, densities = [], [], []
    for r in records:
        mine = {m: names.get(m, fallback) for m in r["rows"]}
        rows = max(sum(r["rows"].values()), 1)
        recalls.append(sum(trial_of(r, n)["kept"][m][head] for m, n in mine.items()) / rows)
        # Near enough for a choice; the final run counts what the combination computes.
        share = sum(trial_of(r, n)["pairs"][head] * r["rows"][m] for m, n in mine.items()) / rows
        densities.append(share / max(r["causal"], 1))
        errors.append(_error(r, mine, head))
    mean = statistics.fmean
    return Choice(label, pattern, mean(errors), mean(recalls), mean(densities), None)


def _error(record: Record, names: Mapping[str, str], head: int) -> float:
    err2 = sum(trial_of(record, n)["err2"][m][head] for m, n in names.items())
    norm2 = sum(record["norm2"][m][head] for m in names)
    return math.sqrt(err2 / norm2) if norm2 > 0.0 else 0.0


def _plain(name: str) -> str:
    return name.split("/", 1)[-1]


def _kind(name: str) -> str:
    return name.split("/", 2)[-1]
