"""One timer for all deadlines of a request, moved by an assignment instead of a new timer.

A relayed chunk changes the deadline twice; making and cancelling a timer each time would cost more
than relaying it.
"""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


class DeadlineMissed(Exception):
    """What was waited for did not come in time."""


class Watchdog:
    """Deadlines for awaits of one task, one at a time. `stop` it in the end."""

    __slots__ = ("_due", "_ends", "_fired", "_loop", "_task", "_timer", "_waiting")

    def __init__(self, total_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._ends = self._loop.time() + total_s
        self._due = self._ends
        self._waiting = False
        self._fired = False
        self._timer: asyncio.TimerHandle | None = None

    async def wait(self, awaitable: Awaitable[T], timeout_s: float) -> T:
        """Await it; raise DeadlineMissed when it takes longer, or when the request does."""
        self._due = min(self._loop.time() + timeout_s, self._ends)
        self._waiting = True
        if self._timer is None or self._timer.when() > self._due:
            self._arm()
        try:
            return await awaitable
        except asyncio.CancelledError:
            if not self._fired:
                raise
            self._fired = False
            if self._task.uncancel() > 0:
                raise
            raise DeadlineMissed from None
        finally:
            self._waiting = False
            if self._fired:
                # It came to its end in spite of our cancellation, which must not outlive the wait.
                self._fired = False
                self._task.uncancel()

    def shorten(self, timeout_s: float) -> None:
        """From now on, and for the wait under way too, at most this much more time in all."""
        self._ends = min(self._ends, self._loop.time() + timeout_s)
        self._due = min(self._due, self._ends)
        if self._timer is None or self._timer.when() > self._due:
            self._arm()

    @property
    def is_over(self) -> bool:
        """True when the time for the whole request is up."""
        return self._loop.time() >= self._ends

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(self._due, self._tick)

    def _tick(self) -> None:
        self._timer = None
        if not self._waiting:
            return
        if self._loop.time() < self._due:
            self._arm()
            return
        self._fired = True
        self._task.cancel()
