"""When a worker refuses new requests to protect those that it has.

The loop's watch looks a few times a second; a request asks for nothing but `reason`. Requests that
run are never touched. Everything ends as it began: by itself, once the reason is gone.
"""

import asyncio
import logging
from enum import StrEnum

from billing.errors import ReceiptsPending
from config.settings import Settings
from gateway import memory
from gateway.errors import unavailable
from gateway.metrics import Metrics
from gateway.supervise import Tasks

log = logging.getLogger("gateway.shedding")

MEMORY_EVERY_S = 1.0
GIVE_BACK_EVERY_S = 10.0
RETRY_AFTER_S = 2


class Reason(StrEnum):
    """Why new requests are refused."""

    LOOP_LAG = "loop_lag"
    """The event loop has been late for some time."""
    MEMORY = "memory"
    """The worker has more than its share of the memory."""
    PENDING_AGE = "pending_age"
    """A receipt has been waiting for the book for too long."""


class LagWatch:
    """Late for a while, or in time for a while: one pause, however long, is neither."""

    def __init__(self, lag_max_s: float, for_s: float) -> None:
        self._lag_max_s = lag_max_s
        self._for_s = for_s
        self._was_late = False
        self._since = 0.0
        self.is_late = False

    def look(self, now: float, lag_s: float) -> None:
        """Time counts from the end of the first late look: a lone pause is over by then."""
        was_late = lag_s > self._lag_max_s
        if was_late is not self._was_late:
            self._was_late, self._since = was_late, now
        elif now - self._since >= self._for_s:
            self.is_late = was_late


class MemoryWatch:
    """The memory of this worker against its share of what there is."""

    def __init__(self, percent_max: int, workers: int) -> None:
        self._percent_max = percent_max
        self._share_bytes = memory.limit_bytes() // workers
        self._due = 0.0
        self.ratio = 0.0
        self.is_over = False

    def look(self, now: float) -> bool:
        """At most once a second; True when it looked."""
        if now < self._due:
            return False
        self._due = now + MEMORY_EVERY_S
        self.judge(memory.resident_bytes())
        return True

    def judge(self, resident_bytes: int) -> None:
        """It ends a little lower than it begins, so that it does not flicker."""
        self.ratio = resident_bytes / self._share_bytes
        percent_max = self._percent_max - (5 if self.is_over else 0)
        self.is_over = self.ratio * 100 > percent_max


class Shedding:
    """Why this worker refuses new requests right now: `reason` is empty when it does not."""

    def __init__(self, settings: Settings, metrics: Metrics, tasks: Tasks) -> None:
        limits = settings.limits
        self.reason = ""
        self._metrics = metrics
        self._tasks = tasks
        self._lag = LagWatch(limits.loop_lag_max_ms / 1000, limits.loop_lag_for_ms / 1000)
        self._memory = MemoryWatch(limits.memory_percent_max, settings.server.workers)
        self._pending_age_max_s = settings.book.pending_age_max_s
        self._give_back_due = 0.0

    def look(self, lag_s: float, pending_age_s: float) -> None:
        """Called by the loop's watch with what it measured."""
        now = asyncio.get_running_loop().time()
        self._lag.look(now, lag_s)
        if self._memory.look(now):
            self._metrics.memory_share.set(self._memory.ratio)
            if self._memory.is_over and now >= self._give_back_due:
                # What is freed may stay with the C library, and the worker would refuse for ever.
                self._give_back_due = now + GIVE_BACK_EVERY_S
                self._tasks.start(asyncio.to_thread(memory.give_back), "memory.give_back")
        self._change(self._found(pending_age_s))

    def refusal(self) -> Exception:
        """What a new request is answered while there is a reason."""
        self._metrics.count_shed(self.reason)
        if self.reason == Reason.PENDING_AGE:
            return ReceiptsPending()
        return unavailable("The gateway is overloaded.", "overloaded", RETRY_AFTER_S)

    def _found(self, pending_age_s: float) -> str:
        if self._memory.is_over:
            return Reason.MEMORY
        if self._lag.is_late:
            return Reason.LOOP_LAG
        return Reason.PENDING_AGE if pending_age_s > self._pending_age_max_s else ""

    def _change(self, reason: str) -> None:
        before, self.reason = self.reason, reason
        if reason == before:
            return
        if before:
            self._metrics.shedding.labels(before).set(0)
            log.info("shedding.ended", extra={"reason": before})
        if reason:
            self._metrics.shedding.labels(reason).set(1)
            log.warning("shedding.began", extra={"reason": reason})
