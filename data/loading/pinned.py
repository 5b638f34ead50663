"""Shared buffers in page-locked memory, from which CUDA copies asynchronously. Imported only for a GPU."""

from __future__ import annotations

import logging
import weakref
from collections import deque

import torch
from torch import Tensor
from torch.cuda._pin_memory_utils import pin_memory, unpin_memory

from data.loading.batch import SharedBuffers


class PinnedBuffers(SharedBuffers):
    """Shared buffers that are page-locked when they are first read, after the workers have been started.

    A buffer whose tensors are deleted returns to the pool after the copies that were issued until then. If the system
    locks no more memory, buffers stay pageable, and `to_device` makes a copy.
    """

    def __init__(self, count: int, shape: tuple[int, int, int]) -> None:
        super().__init__(count, shape)
        self._unlocked = set(range(count))
        self._copying: deque[tuple[torch.cuda.Event, int]] = deque()

    def take(self) -> int | None:
        """Index of a buffer from which no copy is under way, or None."""
        while self._free:
            event = torch.cuda.Event()
            event.record()
            self._copying.append((event, self._free.popleft()))
        return self._copying.popleft()[1] if self._copying and self._copying[0][0].query() else None

    def tensor(self, buffer: int) -> Tensor:
        """Tensor over a buffer, see `SharedBuffers`."""
        if buffer in self._unlocked:
            self._unlocked.remove(buffer)
            self._lock(self.buffers[buffer])
        return super().tensor(buffer)

    def _lock(self, tensor: Tensor) -> None:
        try:
            pin_memory(tensor.data_ptr(), tensor.nbytes)
        except RuntimeError as error:
            logging.getLogger(__name__).warning("batches are copied through pinned memory: %s", error)
            self._unlocked.clear()
        else:
            weakref.finalize(tensor, unpin_memory, tensor.data_ptr()).atexit = False
