"""Background tasks end when they are told to."""

import asyncio
import contextlib
import time

from gateway.supervise import AGAIN_S, Tasks


async def test_a_task_that_lost_its_cancellation_is_cancelled_again() -> None:
    """Found: a library swallowed one, and a process that was told to stop went on for ever."""
    lost = asyncio.Event()

    async def goes_on() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        lost.set()
        await asyncio.Event().wait()

    tasks = Tasks()
    task = tasks.start(goes_on(), "goes on")
    await asyncio.sleep(0)
    began = time.monotonic()
    await tasks.close()

    assert lost.is_set()
    assert task.cancelled()
    assert time.monotonic() - began < 2 * AGAIN_S


async def test_a_task_that_ends_at_once_is_not_waited_for() -> None:
    tasks = Tasks()
    tasks.start(asyncio.Event().wait(), "waits")
    began = time.monotonic()
    await tasks.close()

    assert time.monotonic() - began < AGAIN_S
    assert len(tasks) == 0
