"""Forward passes of a model that show every layer's tensors and go on with exact outputs."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from permattn.calibrate.layer import Exact, LayerInput
from permattn.core import Segment, TokenGrid
from permattn.patterns.mminference import HeadPattern

if TYPE_CHECKING:
    from permattn.models.layout import TokenLayout

# Called as (layer number, its tensors, exact attention).
OnLayer = Callable[[int, LayerInput, Exact], object]


@dataclass(frozen=True)
class Sample:
    """One prompt.

    Args:
        inputs: keyword arguments of the model's forward.
        rows: segments per batch row, for code that splices visual tokens in by itself; None = the
            model's family tells.
    """

    inputs: Mapping[str, Any]
    rows: tuple[tuple[Segment, ...], ...] | None = None


class _Enough(Exception):
    """The last wanted layer is done: the rest of the pass would be for nothing."""


def run_pass(
    model: nn.Module,
    sample: Sample,
    layers: Sequence[int],
    on_layer: OnLayer,
    *,
    what: str,
    backend: str = "auto",
) -> None:
    """One prefill up to the last of `layers`, exact throughout.

    Args:
        on_layer: called for every wanted layer, in order.
        what: names the sample in errors.

    Raises:
        ValueError: no visual tokens, or a layer whose attention no plan can run; says why.
    """
    from permattn.models import PrefillConfig, patch

    missing = set(layers)
    if not missing:
        return

    def see(
        number: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: TokenLayout,
        scale: float,
        module: nn.Module,
    ) -> Tensor | None:
        if number not in missing:
            return None
        if not any(isinstance(s, TokenGrid) for row in layout.rows for s in row):
            raise ValueError(
                f"{what}: {type(module).__name__} sees no visual tokens in this prompt; give one "
                "with a video or images"
            )
        if q.shape[1] != handle.sizes["num_heads"]:
            raise ValueError(
                f"{what}: layer {number} holds {q.shape[1]} of {handle.sizes['num_heads']} heads; "
                "use a model that is not split (tensor parallel)"
            )
        layer = LayerInput(
            *(q, k, v, layout.rows, layout.left_pad, layout.right_pad, scale, backend)
        )
        exact = Exact.of(layer)
        on_layer(number, layer, exact)
        missing.discard(number)
        if not missing:
            raise _Enough
        return exact.out.transpose(1, 2)

    config = PrefillConfig(default=HeadPattern("dense"))
    with patch(model, config, backend=backend) as handle, handle.observe(see):
        stated = contextlib.nullcontext() if sample.rows is None else handle.layout(sample.rows)
        with stated, torch.inference_mode(), contextlib.suppress(_Enough):
            model(**sample.inputs, **_savings(model))
        reasons = ", ".join(handle.stats["dense_reasons"]) or "no attention call was seen"
    if missing:
        raise ValueError(f"{what}: layers {sorted(missing)} cannot be sparse ({reasons})")


@dataclass(frozen=True)
class ModelFacts:
    """What is searched.

    Args:
        sizes: see `permattn.models.Handle.sizes`.
        layers: numbers of the layers with softmax attention.
        model_class, dtype, weights: names, and a fingerprint.
    """

    sizes: dict[str, Any]
    layers: tuple[int, ...]
    model_class: str
    dtype: str
    weights: str

    @property
    def num_heads(self) -> int:
        return int(self.sizes["num_heads"])

    def to_json(self) -> dict[str, Any]:
        names = ("model_class", "dtype", "weights")
        return {**self.sizes, **{name: getattr(self, name) for name in names}}

    def check_layers(self, wanted: Sequence[int] | None) -> tuple[int, ...]:
        """Layers in order; None = all. Raises ValueError for layers that are not there."""
        if wanted is None:
            return self.layers
        bad = sorted(set(wanted) - set(self.layers))
        if bad or not wanted:
            known = ", ".join(map(str, self.layers))
            raise ValueError(f"layers: wants some of {known}, got {list(wanted)}")
        return tuple(sorted(set(wanted)))


def model_facts(model: nn.Module) -> ModelFacts:
    """Looks a model over.

    Raises:
        TypeError, ValueError: what `permattn.patch` says of it.
    """
    from permattn.models import PrefillConfig, patch

    with patch(model, PrefillConfig(default=HeadPattern("dense"))) as handle:
        sizes, layers = handle.sizes, handle.attention_layers
    return ModelFacts(
        sizes,
        layers,
        type(model).__name__,
        str(next(model.parameters()).dtype).removeprefix("torch."),
        _fingerprint(p.detach().flatten()[:16] for p in model.parameters()),
    )


def sample_facts(sample: Sample) -> dict[str, Any]:
    """A fingerprint of a prompt."""
    tensors = {n: x for n, x in sorted(sample.inputs.items()) if torch.is_tensor(x)}
    return {
        "shapes": {n: list(x.shape) for n, x in tensors.items()},
        "values": _fingerprint(tensors.values()),
        "rows": None if sample.rows is None else repr(sample.rows),
    }


def _fingerprint(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for x in tensors:
        # As bytes: numpy has no bfloat16.
        digest.update(x.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _savings(model: nn.Module) -> dict[str, Any]:
    """Keywords that keep a forward from making what a search never reads."""
    known = inspect.signature(model.forward).parameters
    return {n: x for n, x in (("use_cache", False), ("logits_to_keep", 1)) if n in known}
