"""What a search found: numbers per head, and the config that states the choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from permattn.calibrate.choose import Choice, Shared
from permattn.calibrate.space import pattern_to_json
from permattn.patterns.mminference import HeadPattern

if TYPE_CHECKING:
    from permattn.models.config import PrefillConfig


@dataclass(frozen=True)
class SearchResult:
    """Choices per layer and head.

    Args:
        layers: per searched layer one choice per query head.
        shared: the best pattern for all heads alike; None where nothing was searched.
        facts: the model, the prompts and the budget, as JSON values.
    """

    layers: dict[int, tuple[Choice, ...]]
    facts: dict[str, Any]
    shared: Shared | None = None

    @classmethod
    def of(
        cls,
        layers: Mapping[int, Sequence[Choice]],
        facts: dict[str, Any],
        *,
        shared: Shared | None = None,
        max_error: float | None = None,
    ) -> SearchResult:
        """The result; heads that err by more than `max_error` stay dense."""
        kept = {
            n: tuple(_dense_if_bad(choice, max_error) for choice in row)
            for n, row in sorted(layers.items())
        }
        return cls(kept, facts, shared)

    def config(self, *, base_model: str | None = None) -> PrefillConfig:
        """The prefill config of this model: every searched head by name, the rest alike."""
        from permattn.models.config import LayerConfig, PrefillConfig

        return PrefillConfig(
            base_model=base_model,
            **{n: self.facts[n] for n in ("model_type", "num_layers", "num_heads", "num_kv_heads")},
            default=HeadPattern() if self.shared is None else self.shared.pattern,
            layers={
                n: LayerConfig(heads=tuple(c.pattern for c in row))
                for n, row in self.layers.items()
            },
        )

    def family_default(self, *, base_model: str) -> PrefillConfig:
        """A config without sizes, for every model of the type: one pattern for all heads.

        Raises:
            ValueError: nothing was searched.
        """
        if self.shared is None:
            raise ValueError("result: nothing was searched")
        from permattn.models.config import PrefillConfig

        return PrefillConfig(
            base_model=base_model,
            model_type=self.facts["model_type"],
            default=self.shared.pattern,
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
        shared = None
        if self.shared is not None:
            shared = {
                "candidate": self.shared.name,
                "pattern": pattern_to_json(self.shared.pattern),
                "mean_errors": self.shared.errors,
            }
        return {**self.facts, "shared": shared, "heads": heads}


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
