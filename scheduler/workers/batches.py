"""Batches for workers: read by all in turn, and moved to where their model is."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

import torch


class Batches:
    """Batches of an iterable, which the threads of several workers read in turn."""

    def __init__(self, batches: Iterable[Any]) -> None:
        """Reads nothing yet.

        Args:
            batches: An iterator, or an iterable that is begun anew when it has ended.

        Raises:
            TypeError: If it is not iterable.
        """
        if not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
            raise TypeError(f"batches must be iterable, got {batches!r}")
        self._batches = batches
        self._reading = threading.Lock()
        self._iterator: Iterator[Any] | None = None

    def read(self) -> Any:
        """The next batch.

        Raises:
            RuntimeError: If there is none.
        """
        with self._reading:
            begun = self._iterator is not None
            if self._iterator is not None:
                for batch in self._iterator:
                    return batch
            self._iterator = iter(self._batches)
            for batch in self._iterator:
                return batch
            raise RuntimeError(
                "batches must last for every update, but ran out"
                if begun
                else "batches must hold at least one batch, got none"
            )

    def close(self) -> None:
        """Forgets how far an iterable was read: so processes of a ``DataLoader`` end."""
        self._iterator = None


def moved(batch: Any, device: torch.device) -> Any:
    """A batch on a device: tensors, and what has them in tuples, lists and dicts.

    What has a ``to`` is moved by that; anything else is left as it is.

    Args:
        batch: Tensors in pinned memory are copied in the order of the current CUDA stream, and not
            waited for.
        device: Where.
    """
    if isinstance(batch, torch.Tensor):
        return batch if batch.device == device else batch.to(device, non_blocking=_queues(device))
    if callable(getattr(batch, "to", None)):
        return batch.to(device)
    if isinstance(batch, (tuple, list)):
        parts = [moved(each, device) for each in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    if isinstance(batch, MutableMapping):
        result = copy.copy(batch)
        for key, value in batch.items():
            result[key] = moved(value, device)
        return result
    return batch


def _queues(device: torch.device) -> bool:
    """Whether what is done there waits for a copy that is under way; a CPU does not."""
    return device.type != "cpu"
