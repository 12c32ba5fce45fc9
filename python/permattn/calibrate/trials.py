"""What the search measures in one layer of one sample, as JSON values that a state can keep.

A record is {"tokens", "budget", "tolerance", "causal", "modalities", "rows": {modality: n},
"norm2": {modality: [Hq]}, "trials": {name: trial}}. A trial is {"patterns": [Hq], "err2", "kept",
"pairs"}, in timed layers also "ms" per head, or {"same": name} where another trial ran the same
patterns. Names are "<boundary>/<candidate>".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from permattn.calibrate.align import Budget, fit
from permattn.calibrate.layer import Exact, Heads, LayerInput, score, time_patterns
from permattn.calibrate.space import Space, pattern_from_json, pattern_to_json
from permattn.patterns.mminference import HeadPattern
from permattn.patterns.mminference.config import Boundary

Record = dict[str, Any]
# Reports how much of the layer is done, in [0, 1].
OnShare = Callable[[float], object]

# A modality with fewer queries than a probe has rows gets no pattern of its own.
MIN_ROWS = 64


@dataclass(frozen=True)
class Plan:
    """What to try in a layer.

    Args:
        modalities: those that may have patterns of their own; fewer than two = no boundaries.
        timed: whether kernels are timed in this layer.
        rounds: of the timing.
    """

    space: Space
    budget: Budget
    modalities: tuple[str, ...]
    timed: bool
    rounds: int


def try_whole_heads(
    layer: LayerInput, exact: Exact, plan: Plan, first: Record | None, on_share: OnShare
) -> Record:
    """Every candidate over the whole prompt and, with two modalities, per query modality.

    Source: MMInference (arXiv 2504.16083), Algorithm 4, steps 1 and 3. Deviation: the queries of a
    modality are judged over all of their keys. Rows do not depend on each other, so one run in
    which every modality has the candidate judges it for each of them.

    Args:
        first: the record of the first sample, whose fitted sizes later samples take over: a config
            holds one size, whatever the prompt.
    """
    budget = plan.budget.pairs(layer)
    boundaries: tuple[Boundary, ...] = ("none", "q") if len(plan.modalities) > 1 else ("none",)
    trials: dict[str, Any] = {}
    seen: dict[tuple[HeadPattern, ...], str] = {}
    todo = [(b, c) for c in plan.space.candidates for b in boundaries]
    for i, (boundary, candidate) in enumerate(todo):
        name = f"{boundary}/{candidate.name}"
        if first is not None:
            patterns = patterns_of(first, name)
        else:
            sizes, _ = fit(candidate, layer, budget, plan.budget.tolerance, boundary)
            patterns = tuple(sizes)
        if patterns in seen:
            trials[name] = {"same": seen[patterns]}
        else:
            seen[patterns] = name
            trials[name] = _trial(layer, exact, patterns)
        on_share((i + 1) / len(todo) * (0.5 if plan.timed else 1.0))
    if plan.timed:
        _add_times(layer, trials, plan.rounds, lambda x: on_share(0.5 + 0.5 * x))
    return _record(layer, exact, plan, trials)


def try_pairs(
    layer: LayerInput,
    exact: Exact,
    plan: Plan,
    own: Mapping[str, Heads],
    fitted: Mapping[str, Heads],
    on_share: OnShare,
) -> Record:
    """For every pair of two modalities: the cross candidates in place of the query's own pattern.

    Source: MMInference, Algorithm 4, step 2. Deviation: pairs are tried on top of the patterns that
    the query modalities chose, not each alone.

    Args:
        own: per query modality the pattern of every head.
        fitted: per cross candidate the same.
    """
    trials = {}
    todo = list(_pair_trials(plan.modalities, own, fitted))
    for i, (name, patterns) in enumerate(todo):
        trials[name] = _trial(layer, exact, patterns)
        on_share((i + 1) / len(todo))
    return _record(layer, exact, plan, trials)


def try_final(layer: LayerInput, exact: Exact, plan: Plan, heads: Heads) -> Record:
    """The chosen patterns together: one trial, "final"."""
    trials = {"final": _trial(layer, exact, tuple(heads))}
    return _record(layer, exact, plan, trials)


def per_modality(own: Mapping[str, HeadPattern], main: str) -> HeadPattern:
    """One head whose query modalities have patterns of their own; `main` is every other's."""
    return replace(own[main], boundary="q", when=dict(own))


def per_pair(
    own: Mapping[str, HeadPattern], cross: Mapping[tuple[str, str], HeadPattern], main: str
) -> HeadPattern:
    """One head whose pairs run the query's own pattern, except those that `cross` names."""
    when = {f"{m},{x}": cross.get((m, x), own[m]) for m in own for x in own}
    return replace(own[main], boundary="2d", when=when)


def others(modalities: tuple[str, ...], modality: str) -> tuple[str, ...]:
    """The key modalities that a query modality meets beside its own."""
    return tuple(m for m in modalities if m != modality)


def patterns_of(record: Record, name: str) -> tuple[HeadPattern, ...]:
    """The patterns of a trial, one per head."""
    return tuple(pattern_from_json(p) for p in trial_of(record, name)["patterns"])


def trial_of(record: Record, name: str) -> dict[str, Any]:
    """A trial, or the one that ran the same patterns."""
    trial = record["trials"][name]
    return record["trials"][trial["same"]] if "same" in trial else trial


def modalities_of(exact: Exact) -> tuple[str, ...]:
    """The modalities with enough queries for patterns of their own."""
    return tuple(m for m, mask in exact.rows.items() if int(mask.sum()) >= MIN_ROWS)


def main_modality(record: Record) -> str:
    """The modality with most queries."""
    return max(sorted(record["rows"]), key=lambda name: record["rows"][name])


def _pair_trials(
    modalities: tuple[str, ...], own: Mapping[str, Heads], fitted: Mapping[str, Heads]
) -> Iterator[tuple[str, tuple[HeadPattern, ...]]]:
    """Trial i changes the i-th other modality of every query modality: rows are independent."""
    num_heads = len(own[modalities[0]])
    for i in range(len(modalities) - 1):
        for name in (*([""] if i == 0 else []), *fitted):
            heads = []
            for h in range(num_heads):
                mine = {m: own[m][h] for m in modalities}
                changed = modalities if name else ()
                cross = {(m, others(modalities, m)[i]): fitted[name][h] for m in changed}
                heads.append(per_pair(mine, cross, modalities[0]))
            yield f"2d/{i}/{name or 'own'}", tuple(heads)


def _trial(layer: LayerInput, exact: Exact, patterns: tuple[HeadPattern, ...]) -> dict[str, Any]:
    found = score(layer, exact, layer.plan(patterns))
    return {"patterns": [pattern_to_json(p) for p in patterns], **found.to_json()}


def _add_times(layer: LayerInput, trials: dict[str, Any], rounds: int, on_share: OnShare) -> None:
    timed = {
        name: tuple(pattern_from_json(p) for p in trial["patterns"])
        for name, trial in trials.items()
        if "same" not in trial
    }
    steps = rounds * len(timed)
    done = iter(range(1, steps + 1))
    took = time_patterns(layer, timed, rounds=rounds, on_step=lambda: on_share(next(done) / steps))
    for name, ms in took.items():
        trials[name]["ms"] = ms


def _record(layer: LayerInput, exact: Exact, plan: Plan, trials: dict[str, Any]) -> Record:
    return {
        "tokens": layer.num_kv,
        "budget": plan.budget.pairs(layer),
        "tolerance": plan.budget.tolerance,
        "causal": layer.causal_pairs(),
        "modalities": list(plan.modalities),
        "rows": {name: int(mask.sum()) for name, mask in exact.rows.items()},
        "norm2": {name: x.tolist() for name, x in exact.norm2.items()},
        "trials": trials,
    }
