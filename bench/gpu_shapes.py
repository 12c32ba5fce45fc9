"""The fixed shapes of the GPU bench, the densities of its sweep, and what datasheets promise."""

from __future__ import annotations

from dataclasses import dataclass, replace

BF16, INT8, INT8_INT8, INT8_FP8 = "bf16", "int8", "int8+int8", "int8+fp8"
SWEEP = (1.0, 0.9, 0.8, 0.5, 0.3, 0.2, 0.1, 0.05)
WIDE = (BF16, INT8, INT8_FP8, INT8_INT8)


@dataclass(frozen=True)
class Shape:
    """Attention of one layer, bf16, batch 1.

    Args:
        name: in results; its first letter is that of the protocol.
        title: where it comes from.
        grid: frames, rows, columns of a video whose heads have an order each (PAROAttention);
            None = token order, random lists.
        tokens: S, text among them.
        top: listed key blocks of a row, in place of densities.
        peer_density: the density at which other packages run the same blocks; None = none do.
    """

    name: str
    title: str
    heads: int
    kv_heads: int
    tokens: int
    head_dim: int
    blocks: tuple[int, ...]
    densities: tuple[float, ...]
    formats: tuple[str, ...] = (BF16,)
    grid: tuple[int, int, int] | None = None
    top: int | None = None
    peer_density: float | None = None

    @property
    def text(self) -> int:
        if self.grid is None:
            return 0
        frames, height, width = self.grid
        return self.tokens - frames * height * width

    @property
    def dense_flops(self) -> float:
        return 4.0 * self.tokens**2 * self.heads * self.head_dim

    def __str__(self) -> str:
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        return f"{self.name}: {self.title}, {self.tokens} tokens, H {heads}, D {self.head_dim}"

    def tiny(self) -> Shape:
        """Of the same kind, for a rehearsal."""
        densities = tuple(d for d in self.densities if d == self.peer_density) or (0.2,)
        small = replace(self, heads=2, kv_heads=2, blocks=(64,), densities=densities)
        if self.grid is None:
            top = None if self.top is None else 2
            return replace(small, tokens=256, top=top, formats=self.formats[:1])
        text = 20 if self.text else 0
        return replace(small, grid=(3, 8, 10), tokens=240 + text)


def _random(name: str, title: str, **facts: object) -> Shape:
    made = {"heads": 24, "kv_heads": 24, "head_dim": 128, "blocks": (128, 64), "densities": SWEEP}
    return Shape(name, title, **{**made, **facts})  # type: ignore[arg-type]


def _paro(name: str, title: str, heads: int, grid: tuple[int, int, int], **facts: object) -> Shape:
    tokens = grid[0] * grid[1] * grid[2] + int(facts.pop("text", 0))  # type: ignore[call-overload]
    made = {"head_dim": 128, "blocks": (64,), "densities": (0.5, 0.3, 0.2), "formats": WIDE}
    sizes = {"heads": heads, "kv_heads": heads, "tokens": tokens, "grid": grid}
    return Shape(name, title, **{**made, **sizes, **facts})


SHAPES = (
    _random(
        "a",
        "flashinfer PR 5326",
        heads=7,
        kv_heads=7,
        tokens=109_632,
        blocks=(64,),
        top=64,
        densities=(64 * 64 / 109_632,),
        formats=WIDE,
        peer_density=64 * 64 / 109_632,
    ),
    _paro("b", "Hunyuan", 24, (30, 48, 80), blocks=(128,), densities=(0.09, 0.1)),
    _paro("c", "Wan", 40, (21, 45, 80)),
    _paro("d", "CogVideoX", 48, (13, 30, 45), head_dim=64, text=226),
    _random("e-4k", "Flux", tokens=4_096 + 512, densities=(0.5, 0.2)),
    _random("e-16k", "Flux", tokens=16_384 + 512, peer_density=0.3),
)
# The protocol's (f) is bench.gpu_prefill with these heads, (g) bench.gpu_bilevel at this batch.
PREFILL_HEADS = (32, 8)
PREFILL_LENGTHS = ("32k", "128k", "512k")
BILEVEL_BATCH = 128


@dataclass(frozen=True)
class Peak:
    """What a datasheet says: dense TFLOP/s of 16 bits and of 8, and TB/s."""

    bf16: float
    eight_bits: float
    memory: float

    def of(self, fmt: str) -> float:
        """Of attention, half of whose products are Q K^T: the harmonic mean of both formats."""
        qk, _, pv = fmt.partition("+")
        rates = [self.bf16 if x in ("", "none", BF16) else self.eight_bits for x in (qk, pv or "")]
        if qk == BF16:
            rates = [self.bf16, self.bf16]
        return 2 / (1 / rates[0] + 1 / rates[1])


# By the name that the driver gives.
PEAKS = {
    "NVIDIA H200": Peak(989.0, 1979.0, 4.8),
    "NVIDIA H100 80GB HBM3": Peak(989.0, 1979.0, 3.35),
}
