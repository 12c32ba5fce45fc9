"""Packed masks from pinned memory to the device, one layer ahead of the attention that reads them.

Source: PAROAttention (arXiv 2506.16054), its mask prefetch. Deviation: bits are expanded to lists
on the copying stream too, so nothing but the wait for an event is left on the main one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from permattn.core import AttnPlan

K = TypeVar("K", bound=Hashable)
P = TypeVar("P")


class Lane(Protocol):
    """The stream that copies, as the order of work sees it."""

    def side(self) -> AbstractContextManager[Any]:
        """Work inside goes to the copying stream."""
        ...

    def record(self) -> Any:
        """An event at the end of the copying stream."""
        ...

    def wait(self, event: Any, made: Any) -> None:
        """The main stream waits for it, and uses `made` from then on."""
        ...


@dataclass
class _Slot(Generic[K, P]):
    key: K
    made: P
    ready: Any


class Prefetcher(Generic[K, P]):
    """Two slots: what runs now, and what runs next.

    Args:
        load: makes what a key stands for, into the buffer of slot 0 or 1; runs on the copying
            stream. A buffer is filled again only by the stream that has read it, so that no event
            guards it.
        lane: the copying stream.
    """

    def __init__(self, load: Callable[[K, int], P], lane: Lane) -> None:
        self._load, self._lane = load, lane
        self._slots: list[_Slot[K, P] | None] = [None, None]
        self._current = 0

    def start(self, key: K) -> None:
        """Begins to load what will be taken next, beside what was taken last."""
        ahead = 1 - self._current
        slot = self._slots[ahead]
        if slot is None or slot.key != key:
            self._fill(ahead, key)

    def take(self, key: K) -> P:
        """What the key stands for; the main stream waits until it is there, the host does not."""
        found = (n for n, slot in enumerate(self._slots) if slot is not None and slot.key == key)
        number = next(found, None)
        if number is None:
            number = 1 - self._current
            self._fill(number, key)
        slot = self._slots[number]
        assert slot is not None
        self._current = number
        self._lane.wait(slot.ready, slot.made)
        return slot.made

    def _fill(self, number: int, key: K) -> None:
        with self._lane.side():
            made = self._load(key, number)
            self._slots[number] = _Slot(key, made, self._lane.record())

    @classmethod
    def on_cuda(
        cls,
        packed_masks: Tensor,
        device: torch.device,
        build: Callable[[Any, Tensor], AttnPlan],
    ) -> Prefetcher[Any, AttnPlan]:
        """A prefetcher of plans whose bits lie in host memory, which is pinned once.

        Args:
            packed_masks: uint8 [bins, L, H, bytes], on the CPU.
            device: of the plans.
            build: makes the plan of a key (with .bin and .layer) from uint8 [H, bytes].
        """
        host = packed_masks.pin_memory()
        lane = CudaLane(device)
        with lane.side():
            buffers = [torch.empty_like(host[0, 0], device=device) for _ in range(2)]

        def load(key: Any, number: int) -> AttnPlan:
            buffers[number].copy_(host[key.bin, key.layer], non_blocking=True)
            return build(key, buffers[number])

        return Prefetcher(load, lane)


class CudaLane:
    """A CUDA stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def side(self) -> AbstractContextManager[Any]:
        """See `Lane`."""
        return torch.cuda.stream(self._stream)

    def record(self) -> torch.cuda.Event:
        """See `Lane`."""
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def wait(self, event: torch.cuda.Event, made: AttnPlan) -> None:
        """See `Lane`. The allocator learns that the main stream reads these tensors too."""
        main = torch.cuda.current_stream(self._device)
        main.wait_event(event)
        for part in made.parts:
            for x in part.tensors():
                x.record_stream(main)
