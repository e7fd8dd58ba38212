"""What whoever awaits a run hears of it while it goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hogstream.scheduler.checks import check_callable
from hogstream.scheduler.update import Update, Work

OnLoss = Callable[[int, float], object]
OnResult = Callable[[int, Any], object]


class Callbacks:
    """Calls a user's functions on the event loop; the first error of one ends the run.

    Attributes:
        error: What a function raised; none is called any more then.
    """

    def __init__(
        self, on_loss: OnLoss | None, on_result: OnResult | None, end_run: Callable[[], object]
    ) -> None:
        """Checks them.

        Args:
            on_loss: Called with a worker's index, and the loss of an update that has landed.
            on_result: Called with a worker's index, and a value that it has sent.
            end_run: Called once, when one of them has raised.

        Raises:
            TypeError: If one cannot be called, or only be awaited.
        """
        self._on_loss = None if on_loss is None else check_callable("on_loss", on_loss)
        self._on_result = None if on_result is None else check_callable("on_result", on_result)
        self._end_run = end_run
        self.error: BaseException | None = None
        self._python_ends = False

    @property
    def hears_losses(self) -> bool:
        """Whether anybody wants to know of losses."""
        return self._on_loss is not None

    @property
    def hears_results(self) -> bool:
        """Whether anybody wants to know of what workers send."""
        return self._on_result is not None

    def note_landed(self, landed: Sequence[Work]) -> None:
        """Reports the loss of each update that has landed and has one."""
        for work in landed:
            if not isinstance(work, Update) or work.loss is None:
                continue
            if work.error is None and not work.nonfinite:
                self.report_loss(work.worker, work.loss)

    def report_loss(self, worker: int, loss: float) -> None:
        """Calls ``on_loss``, if there is one."""
        self._call(self._on_loss, worker, loss)

    def report_result(self, worker: int, value: Any) -> None:
        """Calls ``on_result``, if there is one."""
        self._call(self._on_result, worker, value)

    def fail(self, error: BaseException) -> None:
        """Ends the run with an error, unless there was one before."""
        if self.error is None:
            self.error = error
            self._end_run()

    def _call(self, callback: Callable[[int, Any], object] | None, worker: int, value: Any) -> None:
        if callback is None or self.error is not None or self._python_ends:
            return
        try:
            callback(worker, value)
        except (KeyboardInterrupt, SystemExit):  # which end the event loop, and so the run
            self._python_ends = True
            raise
        except BaseException as error:
            self.fail(error)
