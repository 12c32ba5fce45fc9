"""The prefill config: one small file per model that says which pattern every head runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from permattn.patterns.mminference import HeadPattern

# Loads the config that ships with the package for the model's type.
SHIPPED = "shipped"
_SHIPPED_FOLDER = Path(__file__).with_name("configs")


def shipped_configs() -> tuple[str, ...]:
    """Model types that a config ships for; `patch(model, "shipped")` loads it."""
    return tuple(sorted(path.stem for path in _SHIPPED_FOLDER.glob("*.json")))


def _no_unknown_keys(value: Any, place: str = "") -> Any:
    """Raises ValueError unless a dict, and every dict of its `when`, has keys of `HeadPattern`."""
    if isinstance(value, dict):
        known = {field.name for field in dataclasses.fields(HeadPattern)}
        unknown = sorted(set(value) - known)
        if unknown:
            raise ValueError(f"{place}unknown keys {unknown}; wants some of {sorted(known)}")
        nested = value.get("when")
        if isinstance(nested, dict):
            for name, pattern in nested.items():
                _no_unknown_keys(pattern, f"{place}when.{name}: ")
    return value


def _written(head: HeadPattern) -> dict[str, Any]:
    """The fields that are not at their default, as JSON has them."""
    data: dict[str, Any] = {}
    for field in dataclasses.fields(HeadPattern):
        value = getattr(head, field.name)
        if value != field.default:
            data[field.name] = list(value) if isinstance(value, tuple) else value
    if head.when:
        data["when"] = {name: _written(pattern) for name, pattern in dict(head.when).items()}
    return data


Pattern = Annotated[HeadPattern, BeforeValidator(_no_unknown_keys), PlainSerializer(_written)]


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
        heads_per_pass: query heads that are planned and attended at a time, rounded down to whole
            groups of one key head; plans and running sums then cost memory for these heads only.
            None = all at once. The results are the same.
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
    heads_per_pass: int | None = Field(default=None, ge=1)
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
    def load(
        cls,
        config: PrefillConfig | dict[str, Any] | str | Path | None,
        model_type: str | None = None,
    ) -> PrefillConfig:
        """From any form that `permattn.patch` takes; None is the default config.

        Args:
            model_type: whose config "shipped" names.

        Raises:
            ValueError: what is wrong in the config, in one line; "shipped", and none ships.
            TypeError: none of the forms.
        """
        if config is None:
            return cls()
        if config == SHIPPED and model_type is not None:
            return cls.shipped(model_type)
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

    @classmethod
    def shipped(cls, model_type: str) -> PrefillConfig:
        """The config that comes with the package.

        Raises:
            ValueError: none does for this `model_type`; names those that do.
        """
        known = shipped_configs()
        if model_type not in known:
            raise ValueError(
                f"config: none is shipped for model_type {model_type!r}, only for {list(known)}"
            )
        return cls.from_json(_SHIPPED_FOLDER / f"{model_type}.json")

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
            # pydantic names the branch of a union too ("dict[str,...]"), which is in no file.
            steps = [str(step) for step in first["loc"] if "[" not in str(step)]
            place = ".".join(steps) or "top level"
            message = first["msg"].removeprefix("Value error, ")
            got = f", got {first['input']!r}" if first["type"] != "value_error" else ""
            raise ValueError(f"{what}: {place}: {message}{got}") from e

    def check_model(
        self, *, model_type: str, num_layers: int, num_heads: int, num_kv_heads: int
    ) -> None:
        """Raises ValueError unless the config fits a model of these sizes."""
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
        group = num_heads // num_kv_heads
        if self.heads_per_pass is not None and self.heads_per_pass < group:
            raise ValueError(
                f"config.heads_per_pass: wants at least the {group} query heads that share a key "
                f"head, got {self.heads_per_pass}"
            )
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
