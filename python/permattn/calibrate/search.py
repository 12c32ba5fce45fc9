"""The offline search: which pattern every head of a model should run in prefill."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from permattn._version import __version__
from permattn.calibrate.align import Budget
from permattn.calibrate.choose import (
    Choice,
    alone,
    check_affordable,
    choose_boundary,
    choose_layer,
    choose_own,
    choose_shared,
    mean_times,
    measured,
    own_patterns,
)
from permattn.calibrate.layer import Exact, LayerInput
from permattn.calibrate.passes import Sample, model_facts, run_pass, sample_facts
from permattn.calibrate.result import SearchResult
from permattn.calibrate.space import Candidate, Space, pattern_to_json
from permattn.calibrate.state import State
from permattn.calibrate.trials import (
    OnShare,
    Plan,
    Record,
    modalities_of,
    patterns_of,
    try_final,
    try_pairs,
    try_whole_heads,
)

STAGES = ("heads", "pairs", "final")

# Called with the stage, and how much of it is done in [0, 1].
OnProgress = Callable[[str, float], object]


@dataclass(frozen=True)
class _Place:
    """Where a stage is."""

    sample: int
    layer: int
    on_share: OnShare


_TryLayer = Callable[[_Place, LayerInput, Exact], Record]


@dataclass(frozen=True)
class SearchOptions:
    """How to search.

    Args:
        space: the candidates.
        budget: what a head may compute.
        layers: those to search; None = all. Others run the pattern that won most often.
        boundaries: whether to look for patterns per modality and per pair of modalities.
        rounds: of timing; 0 = cost is counted in pairs alone.
        pooled: whether heads share the budget of their layer (see `choose_layer`), or each has its
            own, as in the paper.
        max_error: heads whose best pattern errs by more than this stay dense; None = none do.
        backend: see `permattn.sparse_attention`.
    """

    space: Space = field(default_factory=Space)
    budget: Budget = field(default_factory=Budget)
    layers: tuple[int, ...] | None = None
    boundaries: bool = True
    rounds: int = 3
    pooled: bool = True
    max_error: float | None = None
    backend: str = "auto"


def search_prefill(
    model: nn.Module,
    samples: Sequence[Sample],
    options: SearchOptions = SearchOptions(),
    *,
    state: Path | None = None,
    on_progress: OnProgress = lambda stage, done: None,
) -> SearchResult:
    """Finds the prefill pattern of every head: least output error at one budget, then least time.

    Source: MMInference (arXiv 2504.16083), Algorithm 4; MInference (2407.02490), Algorithm 1.
    Deviations: the error is a mean over samples; sizes are fitted head by head, to pairs that the
    kernel really computes; heads may share the budget of their layer; kernel time breaks near ties;
    recall is measured beside.

    Layer after layer is searched inside one forward pass per sample and stage. Every layer gets the
    exact output of those before it, and nothing of size tokens x tokens is made.

    Args:
        model: see `permattn.patch`; not patched.
        samples: prompts with visual tokens; sizes are fitted to the first.
        state: a folder for what has been measured; a rerun with equal arguments goes on there.

    Returns: choices per layer and head, and the config that states them.

    Raises:
        ValueError: no samples, no visual tokens, layers that do not exist, a budget over the
            length, a state of another search, or a model that cannot be patched.
    """
    if not samples:
        raise ValueError("samples: wants at least one, got none")
    search = _Search(model, samples, options, state, on_progress)
    return search.run()


class _Search:
    """One search; every stage is a forward pass per sample."""

    def __init__(
        self,
        model: nn.Module,
        samples: Sequence[Sample],
        options: SearchOptions,
        folder: Path | None,
        on_progress: OnProgress,
    ) -> None:
        self._model = model
        self._samples = samples
        self._options = options
        self._on_progress = on_progress
        self._facts = model_facts(model)
        self._layers = self._facts.check_layers(options.layers)
        # Cost grows with nothing but the layer's data; two layers tell.
        self._timed = {self._layers[0], self._layers[len(self._layers) // 2]}
        self._state = State(folder, self._arguments())

    def run(self) -> SearchResult:
        heads = self._stage("heads", self._try_heads)
        check_affordable([records[0] for records in heads.values()])
        times = mean_times([r for records in heads.values() for r in records])
        modalities = tuple(heads[self._layers[0]][0]["modalities"])
        choices = {
            n: choose_layer(records, self._facts.num_heads, times, pooled=self._options.pooled)
            for n, records in heads.items()
        }
        if len(modalities) > 1:
            choices = self._across_boundaries(choices, heads, modalities, times)
        facts = self._facts.to_json() | {
            "samples": [{"tokens": r["tokens"], "rows": r["rows"]} for r in heads[self._layers[0]]],
            "modalities": list(modalities),
            "budget": asdict(self._options.budget),
            "budget_density": heads[self._layers[0]][0]["budget"]
            / heads[self._layers[0]][0]["causal"],
            "backend": self._options.backend,
            "permattn": __version__,
            "ms_per_head": times,
        }
        shared = choose_shared(list(heads.values()), self._options.space)
        return SearchResult.of(choices, facts, shared=shared, max_error=self._options.max_error)

    def _across_boundaries(
        self,
        whole: dict[int, list[Choice]],
        heads: dict[int, list[Record]],
        modalities: tuple[str, ...],
        times: Mapping[str, float],
    ) -> dict[int, list[Choice]]:
        """The choices with boundaries where those are better; measured together at the end."""
        pairs = self._stage("pairs", lambda *args: self._try_pairs(heads, times, *args))
        choices = {
            n: [
                choose_boundary(c, heads[n], pairs[n], h, modalities, times)
                for h, c in enumerate(row)
            ]
            for n, row in whole.items()
        }
        if all(c.pattern.boundary == "none" for row in choices.values() for c in row):
            return whole
        patterns = {n: tuple(c.pattern for c in row) for n, row in choices.items()}
        final = self._stage(
            "final",
            lambda place, layer, exact: try_final(
                layer, exact, self._plan(place, modalities), patterns[place.layer]
            ),
        )
        return {
            n: [measured(c, whole[n][h], final[n], h) for h, c in enumerate(row)]
            for n, row in choices.items()
        }

    def _stage(self, stage: str, try_layer: _TryLayer) -> dict[int, list[Record]]:
        """Records per layer, one per sample."""
        total = len(self._samples) * len(self._layers)
        self._on_progress(stage, 0.0)
        for s, sample in enumerate(self._samples):
            missing = [n for n in self._layers if self._state.get(_name(stage, s, n)) is None]

            def on_layer(n: int, layer: LayerInput, exact: Exact, s: int = s) -> None:
                before = s * len(self._layers) + self._layers.index(n)

                def on_share(share: float) -> None:
                    self._on_progress(stage, (before + share) / total)

                record = try_layer(_Place(s, n, on_share), layer, exact)
                self._state.put(_name(stage, s, n), record)
                on_share(1.0)

            backend = self._options.backend
            run_pass(self._model, sample, missing, on_layer, what=f"samples[{s}]", backend=backend)
        return {
            n: [self._record(stage, s, n) for s in range(len(self._samples))] for n in self._layers
        }

    def _record(self, stage: str, sample: int, layer: int) -> Record:
        record = self._state.get(_name(stage, sample, layer))
        assert record is not None
        return record

    def _try_heads(self, place: _Place, layer: LayerInput, exact: Exact) -> Record:
        if place.sample == 0:
            first = None
            modalities = modalities_of(exact) if self._options.boundaries else ()
        else:
            first = self._record("heads", 0, place.layer)
            modalities = tuple(first["modalities"])
        return try_whole_heads(layer, exact, self._plan(place, modalities), first, place.on_share)

    def _try_pairs(
        self,
        heads: dict[int, list[Record]],
        times: Mapping[str, float],
        place: _Place,
        layer: LayerInput,
        exact: Exact,
    ) -> Record:
        records = heads[place.layer]
        modalities = tuple(records[0]["modalities"])
        chosen = [
            own_patterns(records, choose_own(records, h, modalities, times), h)
            for h in range(layer.num_heads)
        ]
        own = {m: tuple(c[m] for c in chosen) for m in modalities}
        fitted = {
            c.name: tuple(map(alone, patterns_of(records[0], f"q/{c.name}")))
            for c in self._options.space.cross
        }
        plan = self._plan(place, modalities)
        return try_pairs(layer, exact, plan, own, fitted, place.on_share)

    def _plan(self, place: _Place, modalities: tuple[str, ...]) -> Plan:
        options = self._options
        timed = options.rounds > 0 and place.sample == 0 and place.layer in self._timed
        return Plan(options.space, options.budget, modalities, timed, options.rounds)

    def _arguments(self) -> dict[str, Any]:
        options = self._options
        return {
            "permattn": __version__,
            "model": self._facts.to_json(),
            "samples": [sample_facts(s) for s in self._samples],
            "candidates": {c.name: _candidate(c) for c in options.space.candidates},
            "cross": {c.name: _candidate(c) for c in options.space.cross},
            "budget": asdict(options.budget),
            "layers": list(self._layers),
            "boundaries": options.boundaries,
            "rounds": options.rounds,
            "backend": options.backend,
        }


def _name(stage: str, sample: int, layer: int) -> str:
    return f"{stage}-sample{sample}-layer{layer}"


def _candidate(candidate: Candidate) -> dict[str, Any]:
    return {"pattern": pattern_to_json(candidate.pattern), "scaled": list(candidate.scaled)}
