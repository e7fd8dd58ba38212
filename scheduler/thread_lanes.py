"""Lanes on a machine without a GPU: each a CPU thread of its own."""

from __future__ import annotations

import threading
import time
from contextlib import AbstractContextManager, nullcontext
from queue import SimpleQueue

from hogstream.scheduler.lanes import Lane
from hogstream.scheduler.updates import Landings, Update


class ThreadLane:
    """A lane that is a thread: takes updates in order and applies each, free of the GIL."""

    def __init__(self, index: int, landings: Landings) -> None:
        self._landings = landings
        self._queue: SimpleQueue[Update | None] = SimpleQueue()
        self._thread = threading.Thread(
            target=self._carry_out, name=f"hogstream-lane-{index}", daemon=True
        )
        self._thread.start()

    def launch(self, update: Update) -> None:
        """Queues an update and returns at once."""
        update.on_device = threading.Event()
        self._queue.put(update)

    def computing(self) -> AbstractContextManager[object]:
        """Nothing to set: a CPU thread computes at once."""
        return nullcontext()

    def close(self) -> None:
        """Ends the thread, once it is through with its queue."""
        self._queue.put(None)
        self._thread.join()

    def _carry_out(self) -> None:
        while (update := self._queue.get()) is not None:
            if update.after is not None:
                update.after.on_device.wait()
                update.after = None  # or each update would keep all before it alive
            try:
                update.apply()
            except BaseException as error:
                update.error = error
            update.landed_ns = time.perf_counter_ns()
            self._landings.append(update)
            update.on_device.set()
            del update  # and its gradient, while the lane waits for the next


class ThreadLanes:
    """A thread for each lane."""

    def __init__(self, count: int, landings: Landings) -> None:
        self.lanes: list[Lane] = []
        try:
            for index in range(count):
                self.lanes.append(ThreadLane(index, landings))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends every thread."""
        for lane in self.lanes:
            lane.close()
