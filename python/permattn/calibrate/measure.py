"""What a config does to one prompt, head by head."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from torch import nn

from permattn.calibrate.choose import Choice
from permattn.calibrate.layer import Exact, LayerInput, score
from permattn.calibrate.passes import Sample, model_facts, run_pass
from permattn.calibrate.result import SearchResult
from permattn.calibrate.space import describe
from permattn.patterns.mminference import HeadPattern

if TYPE_CHECKING:
    from permattn.models.config import PrefillConfig


def measure_prefill(
    model: nn.Module,
    sample: Sample,
    config: PrefillConfig,
    *,
    layers: Sequence[int] | None = None,
    backend: str = "auto",
    on_layer: Callable[[int], object] = lambda layer: None,
) -> SearchResult:
    """Pattern, density, recall of attention mass and output error of every head.

    Every layer gets the exact output of those before it: errors do not add up across layers.

    Args:
        model: see `permattn.patch`; not patched.
        layers: those to measure; None = all.
        on_layer: called after every layer.

    Raises:
        ValueError: a config for another model, no visual tokens, or attention no plan can run.
    """
    facts = model_facts(model)
    config.check_model(**facts.sizes)
    wanted = facts.check_layers(layers)
    found: dict[int, list[Choice]] = {}
    lengths: list[dict[str, object]] = []

    def measure(number: int, layer: LayerInput, exact: Exact) -> None:
        heads = config.heads_of(number, facts.num_heads)
        found[number] = _choices(layer, exact, heads)
        if not lengths:
            rows = {name: int(mask.sum()) for name, mask in exact.rows.items()}
            lengths.append({"tokens": layer.num_kv, "rows": rows})
        on_layer(number)

    run_pass(model, sample, wanted, measure, what="sample", backend=backend)
    return SearchResult.of(found, {**facts.to_json(), "samples": lengths, "backend": backend})


def capture_layers(
    model: nn.Module, sample: Sample, layers: Collection[int], *, backend: str = "auto"
) -> dict[int, LayerInput]:
    """The tensors of a few layers, for a closer look."""
    seen: dict[int, LayerInput] = {}

    def keep(number: int, layer: LayerInput, exact: Exact) -> None:
        seen[number] = layer

    run_pass(model, sample, sorted(layers), keep, what="sample", backend=backend)
    return seen


def _choices(layer: LayerInput, exact: Exact, heads: Sequence[HeadPattern]) -> list[Choice]:
    found = score(layer, exact, layer.plan(heads))
    rows = max(sum(int(mask.sum()) for mask in exact.rows.values()), 1)
    pairs = max(layer.causal_pairs(), 1)
    choices = []
    for h, pattern in enumerate(heads):
        err2 = sum(x[h] for x in found.err2.values())
        norm2 = float(sum(x[h] for x in exact.norm2.values()))
        error = (err2 / norm2) ** 0.5 if norm2 > 0.0 else 0.0
        recall = sum(x[h] for x in found.kept.values()) / rows
        choices.append(
            Choice(describe(pattern), pattern, error, recall, found.pairs[h] / pairs, None)
        )
    return choices
