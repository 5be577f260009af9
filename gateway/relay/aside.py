"""Work on large bodies and answers, in threads: on the event loop all other calls would wait.

Threads share the interpreter, so no single step of such work may take long either.
"""

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# What is smaller takes less time than it would in a thread.
LARGE_BYTES = 256 * 1024
THREADS_AT_ONCE = 2


class Aside:
    """Runs work in a thread, a few at a time."""

    def __init__(self) -> None:
        self._slots = asyncio.Semaphore(THREADS_AT_ONCE)

    async def run(self, work: Callable[[], T]) -> T:
        async with self._slots:
            return await asyncio.to_thread(work)
