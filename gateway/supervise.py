"""The one place where background tasks are started: none is lost, none fails unseen."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

log = logging.getLogger("gateway.tasks")

# Longer than cleaning up takes, which a second cancellation would cut short.
AGAIN_S = 2.0


class Tasks:
    """Background tasks of a worker. A task that fails is logged; `close` ends the rest."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, coro: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run coro in the background until it ends or `close` cancels it."""
        task = asyncio.get_running_loop().create_task(coro, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def __len__(self) -> int:
        return len(self._tasks)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("task.failed", extra={"task": task.get_name()}, exc_info=task.exception())

    async def close(self) -> None:
        """Cancel what still runs and wait for it.

        A task that goes on is cancelled again: libraries lose a cancellation that comes in the
        moment in which what they wait for is done (asyncpg's acquire before Python 3.12).
        """
        while tasks := list(self._tasks):
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=AGAIN_S)
