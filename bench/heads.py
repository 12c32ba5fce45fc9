"""Heads whose attention is known: what a planner is there to find, and how much of it a plan keeps.

Every score of a head is a structure (a whole number of logits on its pairs) plus unit normal noise.
Structures and noise use dimensions of their own, so that the two add up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from permattn import sparse_attention_with_lse
from permattn.core import AttnPlan, Segment, TokenGrid, TokenRun
from torch import Tensor

HEAD_DIM = 128
# Two constants (columns and the like), and codes that tell positions or places apart.
_FLAGS, _CODES = 2, 62
_NOISE = HEAD_DIM - _FLAGS - _CODES


@dataclass(frozen=True)
class Prompt:
    """Text, one video of 10 x 28 tokens a frame, text: `segments` says where."""

    num_tokens: int
    height: int = 10
    width: int = 28
    start: int = 40

    @property
    def video(self) -> TokenGrid:
        frames = (self.num_tokens - self.start - 24) // (self.height * self.width)
        return TokenGrid(self.start, frames, self.height, self.width)

    @property
    def segments(self) -> tuple[Segment, ...]:
        video = self.video
        tail = TokenRun(video.stop, self.num_tokens - video.stop)
        return TokenRun(0, self.start), video, tail

    def on_line(self, stride: int, phase: int) -> Tensor:
        """bool [N]: visual tokens of rank `phase` modulo `stride`."""
        token = torch.zeros(self.num_tokens, dtype=torch.bool)
        token[self.video.token_of_rank()[phase::stride]] = True
        return token


@dataclass(frozen=True, eq=False)
class Sketch:
    """q and k of one head without noise, [N, HEAD_DIM] each, filled by structures."""

    prompt: Prompt
    q: Tensor
    k: Tensor
    generator: torch.Generator

    def columns(self, logits: float, keys: Tensor, flag: int = 0) -> None:
        """Every query sees some keys (bool [N]) by that many logits above the others."""
        size = _size(logits)
        self.q[:, flag] = size
        self.k[keys, flag] = size

    def match(self, logits: float, q_code: Tensor, k_code: Tensor) -> None:
        """Adds codes (rows of length 1) whose equality is worth that many logits."""
        codes = slice(_FLAGS, _FLAGS + _CODES)
        self.q[:, codes] += _size(logits) * q_code
        self.k[:, codes] = _size(logits) * k_code

    def codes(self, count: int) -> Tensor:
        """Random directions [count, codes]: two of them differ by noise of 1 / sqrt(62)."""
        x = torch.randn(count, _CODES, generator=self.generator)
        return torch.nn.functional.normalize(x, dim=-1)

    def local(self, logits: float, reach: float) -> None:
        """Near keys: logits fall like a bell over `reach` tokens."""
        n = self.prompt.num_tokens
        frequency = torch.randn(_CODES // 2, generator=self.generator) / reach
        angle = torch.arange(n)[:, None] * frequency
        code = torch.cat((angle.cos(), angle.sin()), -1) / (_CODES // 2) ** 0.5
        self.match(logits, code, code)

    def diagonals(self, logits: float, *lags: int) -> None:
        """Every query sees the keys exactly `lags` tokens before it."""
        n = self.prompt.num_tokens
        code = self.codes(n + max(lags))
        first = max(lags)
        for lag in lags:
            self.match(logits, code[first - lag : first - lag + n], code[first : first + n])

    def places(self, logits: float, stride: int, shift: int) -> None:
        """Visual queries see visual keys whose rank is `shift` less, modulo `stride`."""
        code, token = self.codes(stride), self.prompt.video.token_of_rank()
        rank = torch.arange(len(token))
        q_code, k_code = (torch.zeros(self.prompt.num_tokens, _CODES) for _ in range(2))
        q_code[token], k_code[token] = code[(rank - shift) % stride], code[rank % stride]
        self.match(logits, q_code, k_code)


def _size(logits: float) -> float:
    """Length of two equal vectors whose product is worth that many logits."""
    return (logits * HEAD_DIM**0.5) ** 0.5


def _first(s: Sketch, count: int = 4) -> Tensor:
    return torch.arange(s.prompt.num_tokens) < count


def _some(s: Sketch, count: int = 20) -> Tensor:
    """Some columns of the first quarter, so that most queries come after them."""
    n = s.prompt.num_tokens
    keys = torch.zeros(n, dtype=torch.bool)
    keys[torch.randperm(n // 4, generator=s.generator)[:count]] = True
    return keys


def _sink(s: Sketch) -> None:
    s.columns(12.0, _first(s))


def _local(s: Sketch) -> None:
    s.local(14.0, 32.0)


def _vertical(s: Sketch) -> None:
    s.columns(11.0, _some(s))
    s.columns(9.0, _first(s), flag=1)


def _diagonal(s: Sketch) -> None:
    s.diagonals(18.0, 430, 611)


def _v_frame(s: Sketch) -> None:
    s.columns(10.0, s.prompt.on_line(s.prompt.video.tokens_per_frame, 41))


def _v_row(s: Sketch) -> None:
    s.columns(9.0, s.prompt.on_line(s.prompt.width, 5))


def _s_frame(s: Sketch) -> None:
    s.places(12.0, s.prompt.video.tokens_per_frame, 0)


def _s_shifted(s: Sketch) -> None:
    s.places(12.0, s.prompt.video.tokens_per_frame, 37)


def _v_and_h(s: Sketch) -> None:
    """Rows on the line see everything; the others see the line."""
    _v_frame(s)
    s.q[s.prompt.on_line(s.prompt.video.tokens_per_frame, 41), : _FLAGS + _CODES] = 0.0


def _sink_local(s: Sketch) -> None:
    s.columns(13.0, _first(s))
    _local(s)


def _vertical_diagonal(s: Sketch) -> None:
    s.columns(15.0, _some(s))
    s.diagonals(18.0, 430)


def _v_frame_local(s: Sketch) -> None:
    s.columns(12.0, s.prompt.on_line(s.prompt.video.tokens_per_frame, 199))
    _local(s)


def _sink_s_frame(s: Sketch) -> None:
    s.columns(14.0, _first(s))
    _s_frame(s)


HEADS: dict[str, Callable[[Sketch], None]] = {
    "local": _local,
    "sink": _sink,
    "vertical": _vertical,
    "diagonal": _diagonal,
    "v-frame": _v_frame,
    "v-row": _v_row,
    "s-frame": _s_frame,
    "s-shifted": _s_shifted,
    "v-and-h": _v_and_h,
    "sink-local": _sink_local,
    "vertical-diagonal": _vertical_diagonal,
    "v-frame-local": _v_frame_local,
    "sink-s-frame": _sink_s_frame,
}


def constructed(
    names: Sequence[str], prompt: Prompt, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of the named heads, [1, H, N, 128] each."""
    g = torch.Generator().manual_seed(seed)
    shape = (1, len(names), prompt.num_tokens, HEAD_DIM)
    q, k, v = torch.zeros(shape), torch.zeros(shape), torch.randn(shape, generator=g)
    for h, name in enumerate(names):
        HEADS[name](Sketch(prompt, q[0, h], k[0, h], g))
    # A sum of _NOISE products over sqrt(HEAD_DIM), of unit variance.
    size = (HEAD_DIM / _NOISE) ** 0.25
    for x in (q, k):
        noise = torch.randn(*shape[:3], _NOISE, generator=g)
        x[..., -_NOISE:] = size * noise
    return q.to(dtype), k.to(dtype), v.to(dtype)


def recall(
    plan: AttnPlan, q: Tensor, k: Tensor, v: Tensor, *, backend: str = "auto", every: int = 61
) -> Tensor:
    """Share of the true attention mass that a causal plan keeps, mean over every n-th query: [Hq].

    exp(lse of the plan - lse of all keys), lower-right causal.
    """
    rows = torch.arange(q.shape[2] - 1, -1, -every, device=q.device)
    _, kept = sparse_attention_with_lse(q, k, v, plan, backend=backend)
    key = torch.arange(k.shape[2], device=q.device)
    hidden = key > rows[:, None] + (k.shape[2] - q.shape[2])
    group, found = q.shape[1] // k.shape[1], []
    for h in range(q.shape[1]):
        score = q[:, h, rows].float() @ k[:, h // group].float().mT * q.shape[3] ** -0.5
        everything = score.masked_fill_(hidden, float("-inf")).logsumexp(-1)
        found.append((kept[:, h, rows].float() - everything).exp().mean())
    return torch.stack(found)
