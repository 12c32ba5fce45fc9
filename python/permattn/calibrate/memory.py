"""What one attention layer needs in memory: counted on the meta device, before anything is run."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from permattn.core import AttnPlan, Segment, TokenGrid
from permattn.patterns.mminference import HeadPattern, plan_prefill
from permattn.patterns.mminference.prompt import describe_prompt

# Parts of one query order that the Triton kernel takes in one launch; more launches, or more
# orders, keep their softmax state in memory between them.
_PARTS_PER_LAUNCH = 4


@dataclass(frozen=True)
class LayerShape:
    """The sizes of one causal prefill.

    Args:
        num_tokens: prompt length; queries and keys are the same tokens.
        frame: height and width of a video frame in tokens; the video fills the prompt.
        pattern: what every head runs.
        device_type: "cpu" or "cuda": their kernels keep different state.

    Raises:
        ValueError: names the field.
    """

    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    pattern: HeadPattern = field(default_factory=HeadPattern)
    frame: tuple[int, int] = (16, 16)
    device_type: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("num_tokens", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"LayerShape.{name}: wants >= 1, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"LayerShape.num_heads: wants a multiple of num_kv_heads ({self.num_kv_heads}), "
                f"got {self.num_heads}"
            )
        if min(self.frame) < 1:
            raise ValueError(f"LayerShape.frame: wants sizes >= 1, got {self.frame}")

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.num_heads // self.num_kv_heads

    def segments(self) -> tuple[Segment, ...]:
        """One video over the whole prompt; none where not even a frame fits."""
        frames = self.num_tokens // (self.frame[0] * self.frame[1])
        return (TokenGrid(0, frames, *self.frame),) if frames else ()


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of one attention layer. All but the planner's peak are exact.

    Args:
        q, k, v, out: the tensors of the call.
        heads_per_pass: query heads that are planned and attended at a time.
        plan: tensors of the plan of one pass.
        prompt: what the planner keeps per prompt, for all layers.
        planner_peak: the most that is alive while the plan is made, the plan included; an upper
            bound where the probe runs in a kernel.
        pass_out: output and log-sum-exp of one pass, where it is not the whole call's.
        state: float32 softmax state between kernels of one pass.
        peak: the most that is alive at any time, q, k, v and out included.
    """

    q: int
    k: int
    v: int
    out: int
    heads_per_pass: int
    plan: int
    prompt: int
    planner_peak: int
    pass_out: int
    state: int
    peak: int

    def to_json(self) -> dict[str, int]:
        return asdict(self)


def layer_memory(shape: LayerShape, heads_per_pass: int | None = None) -> LayerMemory:
    """Counts what a layer needs. Nothing of the prompt's size is allocated on any device.

    Args:
        heads_per_pass: see `PrefillConfig.heads_per_pass`; None = all heads at once.

    Raises:
        ValueError: fewer heads per pass than share a key head.
    """
    heads = _rounded(shape, heads_per_pass)
    plan, prompt, planner_peak = _planned(shape, heads)
    size = shape.dtype.itemsize * shape.num_tokens * shape.head_dim
    q, kv = size * shape.num_heads, size * shape.num_kv_heads
    lse = 4 * shape.num_tokens * heads
    # A pass that is the whole call writes its own output.
    pass_out = lse if heads == shape.num_heads else lse + size * heads
    state = state_bytes(plan, shape.head_dim, heads, shape.device_type)
    plan_size = plan_bytes(plan)
    base = q + 2 * kv + prompt + (0 if heads == shape.num_heads else q)
    attending = plan_size + pass_out + state + (q if heads == shape.num_heads else 0)
    return LayerMemory(
        q=q,
        k=kv,
        v=kv,
        out=q,
        heads_per_pass=heads,
        plan=plan_size,
        prompt=prompt,
        planner_peak=planner_peak,
        pass_out=pass_out,
        state=state,
        peak=base + max(planner_peak, attending),
    )


def most_heads_that_fit(shape: LayerShape, available: int) -> LayerMemory | None:
    """The largest `heads_per_pass` whose peak is within `available` bytes; None = not even one."""
    low, high = 0, shape.num_kv_heads
    found: dict[int, LayerMemory] = {}
    while low < high:
        middle = (low + high + 1) // 2
        found[middle] = layer_memory(shape, middle * shape.group)
        if found[middle].peak <= available:
            low = middle
        else:
            high = middle - 1
    return found.get(low)


def plan_bytes(plan: AttnPlan) -> int:
    """Bytes of the distinct tensors of a plan."""
    return storage_bytes(_pytree.tree_leaves(plan))


def state_bytes(plan: AttnPlan, head_dim_v: int, num_heads: int, device_type: str) -> int:
    """Float32 softmax state that a backend keeps between the query orders of a plan.

    The cpu backend keeps partial rows of every order but the largest; the Triton backend one row of
    every query as soon as there is more than one launch.
    """
    slots: dict[int, int] = {}
    parts: dict[int, int] = {}
    for part, group in zip(plan.parts, plan.q_groups(), strict=True):
        slots[group] = part.q_perm.num_slots
        parts[group] = parts.get(group, 0) + 1
    if device_type == "cuda":
        one_launch = len(parts) == 1 and max(parts.values()) <= _PARTS_PER_LAUNCH
        rows = 0 if one_launch else plan.num_q_tokens
        return 4 * num_heads * rows * (head_dim_v + 2)
    rows = sum(slots.values()) - max(slots.values())
    return 4 * num_heads * rows * (head_dim_v + 1)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes behind tensors, shared storage once."""
    storages = {x.untyped_storage()._cdata: x.untyped_storage() for x in tensors}
    return sum(s.nbytes() for s in storages.values())


class LiveBytes(TorchDispatchMode):
    """Counts the storage of one device that is alive, for as long as the mode is on.

    Attributes:
        now, peak: bytes of storage that was made under the mode.
    """

    def __init__(self, device_type: str = "meta") -> None:
        super().__init__()
        self.now = self.peak = 0
        self._device_type = device_type
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Any = (), kwargs: Any = None
    ) -> Any:
        before = {x.untyped_storage()._cdata for x in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for x in _tensors(out):
            if x.device.type == self._device_type:
                self._count(x.untyped_storage(), before)
        return out

    def _count(self, storage: torch.UntypedStorage, before: set[int]) -> None:
        key = storage._cdata
        # A view or an in-place result of what was there before is nothing new.
        if key in self._known or key in before:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in _pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def _planned(shape: LayerShape, heads: int) -> tuple[AttnPlan, int, int]:
    """The plan of one pass on the meta device, bytes kept per prompt, and the planner's peak."""
    size = (shape.num_tokens, shape.head_dim)
    q = torch.empty((1, heads, *size), device="meta", dtype=shape.dtype)
    k = torch.empty((1, heads // shape.group, *size), device="meta", dtype=shape.dtype)
    # What an earlier call left there would not be counted.
    describe_prompt.cache_clear()
    live = LiveBytes()
    with live:
        plan = plan_prefill(q, k, [shape.segments()], [shape.pattern] * heads)
    kept = live.now - plan_bytes(plan)
    describe_prompt.cache_clear()
    return plan, max(kept, 0), live.peak - max(kept, 0)


def _rounded(shape: LayerShape, heads_per_pass: int | None) -> int:
    """Whole groups of query heads that share a key head, as the models run them."""
    if heads_per_pass is None:
        return shape.num_heads
    if heads_per_pass < shape.group:
        raise ValueError(
            f"heads_per_pass: wants at least the {shape.group} query heads that share a key head, "
            f"got {heads_per_pass}"
        )
    return min(heads_per_pass // shape.group * shape.group, shape.num_heads)
