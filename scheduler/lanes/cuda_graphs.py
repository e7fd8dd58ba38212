"""CUDA graphs of updates: many launches in one, where a launch costs more than an update."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class RepeatCache(Generic[T]):
    """Keeps what is made for a key, and makes it only for a key that comes again.

    So those pay nothing whose keys never do. Keys and things not asked for longest are dropped.
    """

    def __init__(self, size: int) -> None:
        """An empty one.

        Args:
            size: How many things it holds at most; and how many keys that came once.
        """
        self._size = size
        self._kept: OrderedDict[Hashable, T] = OrderedDict()
        self._seen: OrderedDict[Hashable, None] = OrderedDict()

    def find(self, key: Hashable, make: Callable[[], T]) -> T | None:
        """What was made for a key, or is made now; None the first time."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        if key not in self._seen:
            self._seen[key] = None
            if len(self._seen) > self._size:
                self._seen.popitem(last=False)
            return None
        del self._seen[key]
        made = self._kept[key] = make()
        if len(self._kept) > self._size:
            self._kept.popitem(last=False)
        return made

    def clear(self) -> None:
        """Drops everything."""
        self._kept.clear()
        self._seen.clear()


def capture(
    branches: Sequence[Sequence[Callable[[], None]]], streams: Sequence[torch.cuda.Stream]
) -> torch.cuda.CUDAGraph:
    """Captures work in a graph: branches beside each other, each in order.

    Args:
        branches: What to call for each; it launches on the current stream, and allocates nothing.
        streams: One for each branch, on which nobody else may launch meanwhile, from any thread: it
            would be captured too.
    """
    graph = torch.cuda.CUDAGraph()
    origin, *others = streams
    with torch.cuda.stream(origin):
        graph.capture_begin(capture_error_mode="thread_local")  # other threads go on
        try:
            for stream in others:
                stream.wait_stream(origin)
            for stream, branch in zip(streams, branches, strict=True):
                with torch.cuda.stream(stream):
                    for launch in branch:
                        launch()
            for stream in others:
                origin.wait_stream(stream)
        except BaseException:
            with suppress(RuntimeError):  # what went wrong first says why
                graph.capture_end()
            raise
        graph.capture_end()
    return graph
