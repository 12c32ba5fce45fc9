"""The prefill config: one small file per model that says which pattern every head runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from permattn.patterns.mminference import HeadPattern


def _no_unknown_keys(value: Any) -> Any:
    if isinstance(value, dict):
        known = {field.name for field in dataclasses.fields(HeadPattern)}
        unknown = sorted(set(value) - known)
        if unknown:
            raise ValueError(f"unknown keys {unknown}; wants some of {sorted(known)}")
    return value


Pattern = Annotated[HeadPattern, BeforeValidator(_no_unknown_keys)]


class LayerConfig(BaseModel):
    """Patterns of one layer.

    Args:
        heads: one pattern per query head, in the model's own (global) numbering.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    heads: tuple[Pattern, ...]


class PrefillConfig(BaseModel):
    """Which pattern every head of a model runs in prefill.

    Args:
        format: version of the file format; this release reads 1.
        base_model: where the config was made, for people; never checked.
        model_type, num_layers, num_heads, num_kv_heads: what it was made for; checked when a model
            is patched; None = any.
        min_q_len: passes with fewer queries run dense: there planning costs more than it saves.
        dense_layers: layers that always run dense.
        default: the pattern of every head that `layers` does not name.
        layers: patterns per layer number.

    Raises:
        ValidationError (a ValueError): unknown keys, wrong types, head counts that disagree.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    base_model: str | None = None
    model_type: str | None = None
    num_layers: int | None = Field(default=None, ge=1)
    num_heads: int | None = Field(default=None, ge=1)
    num_kv_heads: int | None = Field(default=None, ge=1)
    min_q_len: int = Field(default=4096, ge=2)
    dense_layers: tuple[int, ...] = ()
    default: Pattern = HeadPattern()
    layers: dict[int, LayerConfig] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _sizes_agree(self) -> PrefillConfig:
        if self.num_heads is not None:
            for number, layer in self.layers.items():
                if len(layer.heads) != self.num_heads:
                    raise ValueError(
                        f"layers.{number}.heads: wants num_heads = {self.num_heads} patterns, "
                        f"got {len(layer.heads)}"
                    )
        return self

    @classmethod
    def load(cls, config: PrefillConfig | dict[str, Any] | str | Path | None) -> PrefillConfig:
        """From any form that `permattn.patch` takes; None is the default config.

        Raises:
            ValueError: what is wrong in the config, in one line.
            TypeError: none of the forms.
        """
        if config is None:
            return cls()
        if isinstance(config, cls):
            return config
        if isinstance(config, (str, Path)):
            return cls.from_json(config)
        if isinstance(config, dict):
            return cls._checked(config, "config")
        raise TypeError(
            f"config: wants a PrefillConfig, dict, path or None, got {type(config).__name__}"
        )

    @classmethod
    def from_json(cls, path: str | Path) -> PrefillConfig:
        """From a file that `to_json` wrote, or that a person did.

        Raises:
            ValueError: no such file, not JSON, or not a valid config; names the file and the field.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as e:
            raise ValueError(f"config {path}: cannot be read: {e.strerror}") from e
        except ValueError as e:
            raise ValueError(f"config {path}: not a JSON file: {e}") from e
        return cls._checked(data, f"config {path}")

    def to_json(self, path: str | Path) -> None:
        """Writes the config as indented JSON; fields at their default are left out."""
        data = self.model_dump(mode="json", exclude_defaults=True)
        text = json.dumps({"format": self.format, **data}, indent=2)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def _checked(cls, data: Any, what: str) -> PrefillConfig:
        try:
            return cls.model_validate(data)
        except ValidationError as e:
            first = e.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"])) or "top level"
            message = first["msg"].removeprefix("Value error, ")
            got = f", got {first['input']!r}" if first["type"] != "value_error" else ""
            raise ValueError(f"{what}: {place}: {message}{got}") from e

    def check_model(
        self, *, model_type: str, num_layers: int, num_heads: int, num_kv_heads: int
    ) -> None:
        """Raises ValueError unless the config was made for a model of these sizes."""
        got = {
            "model_type": model_type,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
        }
        for name, value in got.items():
            want = getattr(self, name)
            if want is not None and want != value:
                raise ValueError(f"config.{name}: made for {want!r}, got a model with {value!r}")
        for number in (*self.dense_layers, *self.layers):
            if not 0 <= number < num_layers:
                raise ValueError(
                    f"config: names layer {number}, got a model with layers 0..{num_layers - 1}"
                )
        for number, layer in self.layers.items():
            if len(layer.heads) != num_heads:
                raise ValueError(
                    f"config.layers.{number}.heads: got {len(layer.heads)} patterns, the model "
                    f"wants {num_heads}"
                )

    def heads_of(self, layer: int, num_heads: int) -> tuple[HeadPattern, ...]:
        """The pattern of every query head of a layer."""
        if layer in self.dense_layers:
            return (HeadPattern("dense"),) * num_heads
        named = self.layers.get(layer)
        return named.heads if named is not None else (self.default,) * num_heads
