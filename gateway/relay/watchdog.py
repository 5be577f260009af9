"""Deadlines of requests: marked by an assignment, looked at by one timer for a whole worker.

Making and cancelling a timer for each wait would cost more than relaying a chunk does. In return
a deadline may be missed by up to `scan_s`.
"""

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

from config.clock import Seconds, seconds

T = TypeVar("T")

SCAN_S = seconds(50)


class DeadlineMissed(Exception):
    """What was waited for did not come in time."""


class Watchdogs:
    """All watchdogs of an event loop. The timer runs only while there are any."""

    def __init__(self, scan_s: Seconds = SCAN_S) -> None:
        self._loop = asyncio.get_running_loop()
        self._scan_s = scan_s
        self._dogs: set[Watchdog] = set()
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, total_s: Seconds) -> "Watchdog":
        """A watchdog for the running task, which `stop`s it in the end."""
        task = asyncio.current_task()
        assert task is not None
        dog = Watchdog(self._dogs, self._loop, task, total_s)
        self._dogs.add(dog)
        if self._timer is None:
            self._timer = self._loop.call_later(self._scan_s, self._scan)
        return dog

    def now(self) -> Seconds:
        """The time by which watchdogs go."""
        return self._loop.time()

    def __len__(self) -> int:
        return len(self._dogs)

    def _scan(self) -> None:
        now = self._loop.time()
        for dog in self._dogs:
            if dog.is_waiting and dog.due <= now:
                dog.bite()
        self._timer = self._loop.call_later(self._scan_s, self._scan) if self._dogs else None


class Watchdog:
    """Deadlines for awaits of one task, one at a time."""

    __slots__ = ("_dogs", "_ends", "_fired", "_loop", "_task", "due", "is_waiting")

    def __init__(
        self,
        dogs: "set[Watchdog]",
        loop: asyncio.AbstractEventLoop,
        task: asyncio.Task[Any],
        total_s: Seconds,
    ) -> None:
        self._dogs = dogs
        self._loop = loop
        self._task = task
        self._ends = loop.time() + total_s
        self._fired = False
        self.due = self._ends
        self.is_waiting = False

    async def wait(self, awaitable: Awaitable[T], timeout_s: Seconds) -> T:
        """Await it; raise DeadlineMissed when it takes longer, or when the request does."""
        self.extend(timeout_s)
        self.is_waiting = True
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
            self.is_waiting = False
            if self._fired:
                # It came to its end in spite of our cancellation, which must not outlive the wait.
                self._fired = False
                self._task.uncancel()

    def extend(self, timeout_s: Seconds) -> Seconds:
        """The wait under way may take that long from now; returns now."""
        now = self._loop.time()
        due = now + timeout_s
        self.due = due if due < self._ends else self._ends
        return now

    def now(self) -> Seconds:
        """The time by which this watchdog goes."""
        return self._loop.time()

    def shorten(self, timeout_s: Seconds) -> None:
        """From now on, and for the wait under way too, at most this much more time in all."""
        self._ends = min(self._ends, self._loop.time() + timeout_s)
        self.due = min(self.due, self._ends)

    @property
    def is_over(self) -> bool:
        """True when the time for the whole request is up."""
        return self._loop.time() >= self._ends

    def stop(self) -> None:
        self._dogs.discard(self)

    def bite(self) -> None:
        """Interrupt the wait under way."""
        if not self._fired:
            self._fired = True
            self._task.cancel()
