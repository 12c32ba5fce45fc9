"""Time and memory of one prefill, and the errors of the sparse one."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Attention = Callable[..., Any]

_STATM = Path("/proc/self/statm")
_SAMPLE_SECONDS = 0.004
_M_MMAP_THRESHOLD = -3


@dataclass
class Times:
    """Milliseconds of one pass, and its peak memory.

    Args:
        first_token: from pixels to the logits of the next token.
        vision: up to the decoder's start: vision tower and embedding.
        prefill: the text decoder.
        attention: all attention calls of the decoder, planning included.
        plan: planning alone; 0 in a dense pass.
        peak_bytes: see `MEMORY_NOTE`.
    """

    first_token: float = 0.0
    vision: float = 0.0
    prefill: float = 0.0
    attention: float = 0.0
    plan: float = 0.0
    peak_bytes: int = 0


@dataclass
class Result:
    """What one pass computed."""

    times: Times = field(default_factory=Times)
    hidden: Tensor | None = None
    logits: Tensor | None = None


def memory_note(device: torch.device) -> str:
    """How `peak_bytes` is measured."""
    if device.type == "cuda":
        return "peak of torch's allocator during the pass"
    if _STATM.exists():
        return (
            "resident memory above that before the pass, sampled every "
            f"{1000 * _SAMPLE_SECONDS:.0f} ms; freed blocks go back to the system at once; the "
            "lowest peak of the passes"
        )
    return "largest resident memory of the process so far (no sampling on this system)"


class Meter:
    """Runs passes of one model and measures each."""

    def __init__(self, model: Any, inputs: dict[str, Any], device: torch.device) -> None:
        self._model = model
        self._inputs = inputs
        self._device = device
        self._decoder = model.get_decoder()
        self._layers = {
            id(module)
            for module in self._decoder.modules()
            if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "is_causal")
        }
        self.times = Times()

    def run(self, instead: Callable[..., Any] | None = None) -> Result:
        """One pass.

        Args:
            instead: called as (attention, module, q, k, v, *rest, **keywords) in place of every
                attention call of the decoder.
        """
        result = Result()
        self.times = result.times
        marks: dict[str, float] = {}

        def before(*_: Any) -> None:
            marks["start"] = self._now()

        def after(_module: nn.Module, _inputs: Any, output: Any) -> None:
            marks["stop"] = self._now()
            result.hidden = output[0]

        hooks = [
            self._decoder.register_forward_pre_hook(before),
            self._decoder.register_forward_hook(after),
        ]
        try:
            with (
                torch.inference_mode(),
                self._timed_attention(instead),
                _Peak(self._device) as peak,
            ):
                begin = self._now()
                out = self._model(**self._inputs, logits_to_keep=64, use_cache=True)
                end = self._now()
        finally:
            for hook in hooks:
                hook.remove()
        result.logits = out.logits[0].float()
        times = result.times
        times.first_token = 1000 * (end - begin)
        times.vision = 1000 * (marks["start"] - begin)
        times.prefill = 1000 * (marks["stop"] - marks["start"])
        times.peak_bytes = peak.bytes
        return result

    def planner(self, plan: Callable[..., Any]) -> Callable[..., Any]:
        """The planner, its time added to the pass that runs."""

        def timed(*args: Any, **keywords: Any) -> Any:
            start = self._now()
            made = plan(*args, **keywords)
            self.times.plan += 1000 * (self._now() - start)
            return made

        return timed

    @contextmanager
    def _timed_attention(self, instead: Callable[..., Any] | None) -> Iterator[None]:
        """The decoder's attention function, wrapped; the vision tower's calls pass through."""
        name = self._decoder.config._attn_implementation
        original = ALL_ATTENTION_FUNCTIONS[name]

        def wrapped(module: nn.Module, *args: Any, **keywords: Any) -> Any:
            if id(module) not in self._layers:
                return original(module, *args, **keywords)
            start = self._now()
            if instead is None:
                out = original(module, *args, **keywords)
            else:
                out = instead(original, module, *args, **keywords)
            self.times.attention += 1000 * (self._now() - start)
            return out

        AttentionInterface.register(name, wrapped)
        try:
            yield
        finally:
            AttentionInterface.register(name, original)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class _Peak:
    """Peak memory of a `with` block."""

    def __init__(self, device: torch.device) -> None:
        self.bytes = 0
        self._rest = 0
        self._device = device
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> _Peak:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            _return_free_memory()
            self._rest = resident_bytes()
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self._device)
            return
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.bytes = max(self.bytes, resident_bytes() - self._rest)
            if self._done.wait(_SAMPLE_SECONDS):
                return


def resident_bytes() -> int:
    """Resident memory now; its high-water mark where the system tells no more."""
    import resource

    if _STATM.exists():
        return int(_STATM.read_text().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _return_free_memory() -> None:
    """Makes glibc return freed memory, now and from now on.

    It keeps freed blocks below a threshold that it raises to 32 MiB by itself; resident memory then
    tells how a heap is fragmented, not what a pass needs. A fixed threshold costs no time here.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim"):
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 20)
        libc.malloc_trim(0)


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of the exact value."""
    ours, exact = ours.double(), exact.double()
    return float((ours - exact).norm() / exact.norm().clamp_min(1e-30))
