"""What calibration leaves behind: orders and block masks of every head, and what they were made
for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from permattn.core import AttnPlan, TokenGrid
from permattn.core.axis_order import ORDER_NAMES
from permattn.core.plan import ceil_div
from permattn.core.quant import QuantSpec
from permattn.patterns.paro.bits import unpack_bits
from permattn.patterns.paro.plan import plan_paro

TextPlace = Literal["none", "prefix", "suffix"]
TEXT_PLACES: tuple[TextPlace, ...] = ("none", "prefix", "suffix")


@dataclass(frozen=True)
class ParoOrigin:
    """What a plan was calibrated on and how: compared with a pipeline, and shown in reports.

    Args:
        model_class: the transformer's class name.
        head_dim: D.
        num_steps: denoising steps of the calibration runs.
        scheduler: its class name; "" = unknown.
        fingerprint: of the transformer's weights; "" = unknown.
        metric, scope, density: see `permattn.paro.calibrate`.
        text_tokens: joint text tokens of the calibration prompts, for the record: text is dense.
        version: of permattn.
    """

    model_class: str
    head_dim: int
    num_steps: int
    scheduler: str = ""
    fingerprint: str = ""
    metric: str = ""
    scope: str = ""
    density: float = 1.0
    text_tokens: int = 0
    version: str = ""


@dataclass(frozen=True, eq=False)
class ParoPlan:
    """Axis orders and block masks for all layers and heads and for ranges of noise levels.

    Source: PAROAttention (arXiv 2506.16054): orders are fixed over steps; masks are kept for each
    of the early steps and shared by the late ones.

    Args:
        grid: (frames, height, width) in tokens.
        text: where joint text tokens stand; "none" = self-attention sees vision alone.
        axis_orders: uint8 [L, H], numbers of `ORDER_NAMES`.
        packed_masks: uint8 [bins, L, H, bytes], `pack_bits` of vision block masks.
        sigma_edges: bins - 1 noise levels, descending: bin b serves sigma <= sigma_edges[b - 1]
            and > sigma_edges[b]. Sigma is 1 at pure noise and 0 at the end.
        block: (block_q, block_kv), slots.
        empty_heads: bool [L, H]: heads whose vision queries see text alone.
        native_cells: see `plan_paro`.
        recall: float32 [bins, L, H], share of the attention mass that every mask kept when it was
            calibrated, text included; None = unknown.
        origin: what it was made on.
        validate: check every mask now.

    Raises:
        ValueError: fields that do not fit each other, orders out of range, or a mask with an empty
            row in a head that is not empty.
    """

    grid: tuple[int, int, int]
    text: TextPlace
    axis_orders: Tensor
    packed_masks: Tensor
    sigma_edges: tuple[float, ...]
    empty_heads: Tensor
    origin: ParoOrigin
    block: tuple[int, int] = (64, 64)
    native_cells: Tensor | None = None
    recall: Tensor | None = None
    num_blocks: Tensor = field(init=False, repr=False)
    """int32 [bins, L, H]: vision blocks that every mask lists."""
    validate: InitVar[bool] = True

    def __post_init__(self, validate: bool) -> None:
        self._check_fields()
        object.__setattr__(self, "num_blocks", self._count_blocks(validate))

    @property
    def num_bins(self) -> int:
        return self.packed_masks.shape[0]

    @property
    def num_layers(self) -> int:
        return self.axis_orders.shape[0]

    @property
    def num_heads(self) -> int:
        return self.axis_orders.shape[1]

    @property
    def num_vision_tokens(self) -> int:
        frames, height, width = self.grid
        return frames * height * width

    @property
    def mask_shape(self) -> tuple[int, int]:
        """(query blocks, key blocks) of the vision tokens."""
        block_q, block_kv = self.block
        return ceil_div(self.num_vision_tokens, block_q), ceil_div(self.num_vision_tokens, block_kv)

    @property
    def num_bytes(self) -> int:
        """Of orders and masks."""
        return self.axis_orders.numel() + self.packed_masks.numel() + self.empty_heads.numel()

    def bin_of(self, sigma: float) -> int:
        """The bin that serves a noise level."""
        return sum(sigma <= edge for edge in self.sigma_edges)

    def block_mask(self, layer: int, bin: int) -> Tensor:
        """bool [H, nq, nk], on the device of the masks."""
        return unpack_bits(self.packed_masks[bin, layer], *self.mask_shape)

    def density(self) -> Tensor:
        """float32 [bins, L, H]: share of the vision blocks that is computed."""
        nq, nk = self.mask_shape
        return self.num_blocks / (nq * nk)

    def attn_plan(
        self,
        layer: int,
        bin: int,
        *,
        num_text_tokens: int = 0,
        heads: slice = slice(None),
        packed: Tensor | None = None,
        text_visible: Tensor | None = None,
        quant: QuantSpec = QuantSpec(),
        device: torch.device | str | None = None,
    ) -> AttnPlan:
        """The plan of one layer at one bin.

        Args:
            layer, bin: which.
            num_text_tokens: joint text tokens of this call.
            heads: the heads that run here (tensor and sequence parallelism).
            packed: `packed_masks[bin, layer, heads]` where it lies on the device already.
            text_visible: bool [B, text tokens]; see `plan_paro`.
            quant: numerics.
            device: of the plan; None = the CPU, or packed's.

        Raises:
            ValueError: a layer, bin or text that this plan does not have; names what it has.
        """
        self._check_call(layer, bin, num_text_tokens)
        if packed is None:
            packed = self.packed_masks[bin, layer, heads].to(device or "cpu")
        mask = unpack_bits(packed, *self.mask_shape)
        start = num_text_tokens if self.text == "prefix" else 0
        text_rows = ceil_div(num_text_tokens, self.block[0])
        fullest = int(self.num_blocks[bin, layer, heads].max())
        return plan_paro(
            TokenGrid(start, *self.grid),
            self.axis_orders[layer, heads].to(packed.device),
            mask,
            num_tokens=self.num_vision_tokens + num_text_tokens,
            block=self.block,
            text_visible=text_visible,
            native_cells=self.native_cells,
            quant=quant,
            capacity=fullest + text_rows * mask.shape[-1],
        )

    def _check_call(self, layer: int, bin: int, num_text_tokens: int) -> None:
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer: wants 0 to {self.num_layers - 1}, got {layer}")
        if not 0 <= bin < self.num_bins:
            raise ValueError(f"bin: wants 0 to {self.num_bins - 1}, got {bin}")
        if (num_text_tokens > 0) and self.text == "none":
            raise ValueError(
                f"num_text_tokens: wants 0 (the plan has no joint text), got {num_text_tokens}"
            )
        if num_text_tokens == 0 and bool(self.empty_heads[layer].any()):
            raise ValueError("num_text_tokens: a head of this plan sees text alone, got 0")

    def _check_fields(self) -> None:
        if len(self.grid) != 3 or min(self.grid) < 1:
            raise ValueError(f"ParoPlan.grid: wants three sizes >= 1, got {self.grid}")
        if len(self.block) != 2 or min(self.block) < 1:
            raise ValueError(f"ParoPlan.block: wants two sizes >= 1, got {self.block}")
        if self.text not in TEXT_PLACES:
            raise ValueError(f"ParoPlan.text: wants one of {TEXT_PLACES}, got {self.text!r}")
        orders, masks = self.axis_orders, self.packed_masks
        if orders.dtype != torch.uint8 or orders.dim() != 2 or 0 in orders.shape:
            raise ValueError(
                f"ParoPlan.axis_orders: wants uint8 [L, H], got {orders.dtype} {list(orders.shape)}"
            )
        if int(orders.max()) >= len(ORDER_NAMES):
            raise ValueError(
                f"ParoPlan.axis_orders: wants numbers below {len(ORDER_NAMES)}, got {orders.max()}"
            )
        nq, nk = self.mask_shape
        want = (*orders.shape, -(-nq * nk // 8))
        if masks.dtype != torch.uint8 or masks.dim() != 4 or tuple(masks.shape[1:]) != want:
            raise ValueError(
                f"ParoPlan.packed_masks: wants uint8 [bins, {want[0]}, {want[1]}, {want[2]}], got "
                f"{masks.dtype} {list(masks.shape)}"
            )
        _check_edges(self.sigma_edges, masks.shape[0])
        if self.empty_heads.dtype != torch.bool or self.empty_heads.shape != orders.shape:
            raise ValueError(
                f"ParoPlan.empty_heads: wants bool {list(orders.shape)}, got "
                f"{self.empty_heads.dtype} {list(self.empty_heads.shape)}"
            )
        if bool(self.empty_heads.any()) and self.text == "none":
            raise ValueError("ParoPlan.empty_heads: without text a head cannot be empty")
        recall = self.recall
        if recall is not None and recall.shape != masks.shape[:3]:
            raise ValueError(
                f"ParoPlan.recall: wants {list(masks.shape[:3])}, got {list(recall.shape)}"
            )
        cells = self.native_cells
        if cells is None:
            return
        in_order = cells.sort().values.tolist() if cells.dim() == 1 else []
        if in_order != list(range(self.num_vision_tokens)):
            raise ValueError(
                "ParoPlan.native_cells: wants every raster cell once, "
                f"[{self.num_vision_tokens}], got {list(cells.shape)}"
            )

    def _count_blocks(self, validate: bool) -> Tensor:
        """Blocks of every mask; checks that no row is empty on the way."""
        counts = torch.zeros(self.packed_masks.shape[:3], dtype=torch.int32)
        for bin in range(self.num_bins):
            for layer in range(self.num_layers):
                per_row = self.block_mask(layer, bin).sum(-1)
                counts[bin, layer] = per_row.sum(-1)
                if not validate:
                    continue
                empty = (per_row == 0).any(-1) & ~self.empty_heads[layer]
                if bool(empty.any()):
                    head = int(empty.nonzero()[0])
                    raise ValueError(
                        f"ParoPlan.packed_masks: bin {bin}, layer {layer}, head {head} has a row "
                        "of query blocks without any key block"
                    )
        return counts


def _check_edges(edges: Sequence[float], num_bins: int) -> None:
    in_order = all(a > b for a, b in pairwise(edges))
    if len(edges) != num_bins - 1 or not in_order or not all(0 <= e <= 1 for e in edges):
        raise ValueError(
            f"ParoPlan.sigma_edges: wants {num_bins - 1} descending numbers in [0, 1] for "
            f"{num_bins} bins, got {tuple(edges)}"
        )
