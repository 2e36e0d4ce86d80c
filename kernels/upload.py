"""Small tables on their way to a GPU, without a wait: pinned memory, asynchronous copies, a ring of buffers."""

from __future__ import annotations

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

# As many steps may be under way on the device before the host waits for the oldest.
_SLOTS = 4
# Steps that may be captured before the next one outside of a capture.
_CAPTURED_STEPS = 4


class Slot:
    """One pinned buffer and the device's copy of it."""

    def __init__(self, words: int, device: torch.device) -> None:
        with torch.inference_mode(False):  # they outlive the mode
            self.pinned = torch.empty(words, dtype=torch.int64, device="cpu", pin_memory=True)
            self.on_device = torch.empty(words, dtype=torch.int64, device=device)
        self.event: torch.cuda.Event | None = None
        self.length = 0

    def split(self, lengths: list[int]) -> tuple[Tensor, ...]:
        """Return consecutive parts of the copy on the device."""
        # torch.split would ask each time whether it is overridden, for 3 microseconds.
        return torch.split_with_sizes(self.on_device[: self.length], lengths)

    def in_use(self) -> None:
        """Note that work launched so far on the current stream reads this slot."""
        if not torch.cuda.is_current_stream_capturing():
            self.event = torch.cuda.Event() if self.event is None else self.event
            self.event.record()


class HostSlot:
    """What serves in place of a slot where the device is the host."""

    def __init__(self, words: NDArray[numpy.int64]) -> None:
        self._words = torch.from_numpy(words)

    def split(self, lengths: list[int]) -> tuple[Tensor, ...]:
        """Return consecutive parts."""
        return torch.split_with_sizes(self._words, lengths)

    def in_use(self) -> None:
        """Do nothing: the host's own work is done when the call returns."""


class Ring:
    """Slots that are filled in turn.

    Args:
        device: where the tables go.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._slots: list[Slot] = []
        # Set aside beforehand: during a capture nothing can be allocated or waited for.
        self._spare: list[Slot] = []
        self._captured: list[Slot] = []

    def upload(self, words: NDArray[numpy.int64]) -> Slot | HostSlot:
        """Start the copy of ``words`` on the current stream; return the slot that receives it.

        Raises:
            RuntimeError: during the capture of a CUDA graph, if no step has been taken before.
        """
        if self._device.type != "cuda":
            return HostSlot(words)
        slot = self._captured_slot(len(words)) if torch.cuda.is_current_stream_capturing() else self._next_slot(len(words))
        slot.length = len(words)
        slot.pinned[: slot.length].copy_(torch.from_numpy(words))
        slot.on_device[: slot.length].copy_(slot.pinned[: slot.length], non_blocking=True)
        return slot

    def _next_slot(self, words: int) -> Slot:
        if self._slots and self._slots[0].pinned.numel() < words:
            self._slots, self._spare = [], []
        while len(self._spare) < _CAPTURED_STEPS:
            self._spare.append(Slot(words, self._device))
        if len(self._slots) < _SLOTS:
            self._slots.append(Slot(words, self._device))
            return self._slots[-1]
        slot = self._slots.pop(0)
        self._slots.append(slot)
        if slot.event is not None:
            slot.event.synchronize()  # the host may overwrite what has been copied, and read
        return slot

    def _captured_slot(self, words: int) -> Slot:
        if not self._spare or self._spare[-1].pinned.numel() < words:
            raise RuntimeError(
                "a step under capture found no buffer for its tables: take a step outside of captures first, and another "
                f"after each {_CAPTURED_STEPS} captured ones"
            )
        # A replay copies this slot's pinned memory anew each time, so nothing else may ever be written to it.
        self._captured.append(self._spare.pop())
        return self._captured[-1]
