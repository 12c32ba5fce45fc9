"""What a search found: numbers per head, and the config that states the choices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from permattn.calibrate.choose import Choice
from permattn.calibrate.space import pattern_to_json
from permattn.patterns.mminference import HeadPattern

if TYPE_CHECKING:
    from permattn.models.config import PrefillConfig


@dataclass(frozen=True)
class SearchResult:
    """Choices per layer and head.

    Args:
        layers: per searched layer one choice per query head.
        facts: the model, the prompts and the budget, as JSON values.
    """

    layers: dict[int, tuple[Choice, ...]]
    facts: dict[str, Any]

    @classmethod
    def of(
        cls,
        layers: Mapping[int, Sequence[Choice]],
        facts: dict[str, Any],
        max_error: float | None,
    ) -> SearchResult:
        """The result; heads that err by more than `max_error` stay dense."""
        kept = {
            n: tuple(_dense_if_bad(choice, max_error) for choice in row)
            for n, row in sorted(layers.items())
        }
        return cls(kept, facts)

    def most_common(self) -> HeadPattern:
        """The pattern of the candidate that won most heads, at the size most of them have."""
        choices = [c for row in self.layers.values() for c in row]
        name = Counter(c.name for c in choices).most_common(1)[0][0]
        return Counter(c.pattern for c in choices if c.name == name).most_common(1)[0][0]

    def config(self, *, base_model: str | None = None) -> PrefillConfig:
        """The prefill config of this model: every searched head by name, the rest by majority."""
        from permattn.models.config import LayerConfig, PrefillConfig

        return PrefillConfig(
            base_model=base_model,
            **{n: self.facts[n] for n in ("model_type", "num_layers", "num_heads", "num_kv_heads")},
            default=self.most_common(),
            layers={
                n: LayerConfig(heads=tuple(c.pattern for c in row))
                for n, row in self.layers.items()
            },
        )

    def family_default(self, *, base_model: str) -> PrefillConfig:
        """A config without sizes, for every model of the type: the majority's pattern alone."""
        from permattn.models.config import PrefillConfig

        return PrefillConfig(
            base_model=base_model,
            model_type=self.facts["model_type"],
            default=self.most_common(),
        )

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        heads = [
            {
                "layer": n,
                "head": h,
                **{k: v for k, v in asdict(c).items() if k != "pattern"},
                "boundary": c.pattern.boundary,
                "pattern": pattern_to_json(c.pattern),
            }
            for n, row in self.layers.items()
            for h, c in enumerate(row)
        ]
        return {**self.facts, "heads": heads}


def _dense_if_bad(choice: Choice, max_error: float | None) -> Choice:
    if max_error is None or choice.error <= max_error:
        return choice
    return replace(
        choice,
        name="dense",
        pattern=HeadPattern("dense"),
        error=0.0,
        recall=1.0,
        density=1.0,
        ms=None,
    )
