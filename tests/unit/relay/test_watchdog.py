"""Deadlines of tasks, looked at by one timer."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest

from gateway.relay.watchdog import DeadlineMissed, Watchdog, Watchdogs

SCAN_S = 0.002


def watch(total_s: float) -> Watchdog:
    return Watchdogs(SCAN_S).watch(total_s)


async def forever() -> None:
    await asyncio.get_running_loop().create_future()


async def started(work: Callable[[], Awaitable[Any]]) -> asyncio.Task[Any]:
    """A task that has run to its first wait."""
    reached = asyncio.Event()

    async def run() -> Any:
        reached.set()
        return await work()

    task = asyncio.get_running_loop().create_task(run())
    await reached.wait()
    return task


def cancellations() -> int:
    task = asyncio.current_task()
    assert task is not None
    return task.cancelling()


async def test_what_comes_in_time_is_returned() -> None:
    dog = watch(10)

    assert await dog.wait(asyncio.sleep(0, "x"), 1) == "x"
    dog.stop()


async def test_what_comes_too_late_is_missed() -> None:
    dog = watch(10)

    for _ in range(2):
        with pytest.raises(DeadlineMissed):
            await dog.wait(forever(), 0.01)

    assert cancellations() == 0
    assert not dog.is_over
    dog.stop()


async def test_a_shorter_wait_after_a_longer_one_ends_in_its_own_time() -> None:
    dog = watch(100)
    await dog.wait(asyncio.sleep(0), 50)
    loop = asyncio.get_running_loop()
    began = loop.time()

    with pytest.raises(DeadlineMissed):
        await dog.wait(forever(), 0.02)

    assert 0.02 <= loop.time() - began < 5
    dog.stop()


async def test_a_deadline_never_fires_outside_its_wait() -> None:
    dog = watch(10)
    await dog.wait(asyncio.sleep(0), 0.01)

    await asyncio.sleep(0.03)

    assert cancellations() == 0
    assert await dog.wait(asyncio.sleep(0, "x"), 1) == "x"
    dog.stop()


async def test_the_end_of_the_request_ends_every_wait() -> None:
    dog = watch(0.01)

    with pytest.raises(DeadlineMissed):
        await dog.wait(forever(), 100)

    assert dog.is_over
    with pytest.raises(DeadlineMissed):
        await dog.wait(forever(), 100)
    dog.stop()


async def test_a_request_can_be_shortened_while_it_waits() -> None:
    dog = watch(100)
    asyncio.get_running_loop().call_soon(dog.shorten, 0.01)

    with pytest.raises(DeadlineMissed):
        await dog.wait(forever(), 50)

    assert dog.is_over
    dog.stop()


async def test_a_request_can_be_shortened_between_two_waits() -> None:
    dog = watch(100)
    dog.shorten(0)

    with pytest.raises(DeadlineMissed):
        await dog.wait(forever(), 50)
    dog.stop()


async def test_a_request_is_never_made_longer() -> None:
    dog = watch(0.01)
    dog.shorten(100)

    with pytest.raises(DeadlineMissed):
        await dog.wait(forever(), 100)
    dog.stop()


async def test_a_cancellation_from_outside_is_no_deadline() -> None:
    dogs: list[Watchdog] = []

    async def work() -> None:
        dogs.append(watch(100))
        await dogs[0].wait(forever(), 50)

    task = await started(work)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    dogs[0].stop()


async def test_a_cancellation_at_the_moment_of_the_deadline_is_not_lost() -> None:
    dogs: list[Watchdog] = []

    async def work() -> None:
        dogs.append(watch(100))
        await dogs[0].wait(forever(), 50)

    for both in (("cancel", "shorten"), ("shorten", "cancel")):
        dogs.clear()
        task = await started(work)
        for name in both:
            if name == "cancel":
                task.cancel()
            else:
                dogs[0].shorten(-1)
                dogs[0].bite()  # the timer, at this very moment
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()
        dogs[0].stop()


async def test_a_wait_that_ends_in_spite_of_the_deadline_leaves_nothing_behind() -> None:
    """Found: the next cancellation from outside would have been taken for a deadline."""

    async def stubborn() -> str:
        try:
            await forever()
        except asyncio.CancelledError:
            return "done"
        return "never"

    dog = watch(10)
    assert await dog.wait(stubborn(), 0.01) == "done"

    assert cancellations() == 0
    assert await dog.wait(asyncio.sleep(0, "x"), 1) == "x"
    dog.stop()


async def test_it_works_inside_a_cancel_scope() -> None:
    dog = watch(10)

    with anyio.CancelScope() as scope:
        with pytest.raises(DeadlineMissed):
            await dog.wait(forever(), 0.01)
        asyncio.get_running_loop().call_soon(scope.cancel)
        await dog.wait(forever(), 10)

    assert scope.cancelled_caught
    assert cancellations() == 0
    dog.stop()


async def test_one_timer_serves_all_and_ends_with_the_last() -> None:
    dogs = Watchdogs(SCAN_S)
    missed: list[float] = []

    async def wait(timeout_s: float) -> None:
        dog = dogs.watch(10)
        with pytest.raises(DeadlineMissed):
            await dog.wait(forever(), timeout_s)
        missed.append(timeout_s)
        dog.stop()

    await asyncio.gather(*(wait(timeout_s) for timeout_s in (0.09, 0.01, 0.05)))

    assert missed == [0.01, 0.05, 0.09]
    assert not len(dogs)


async def test_a_wait_that_is_extended_ends_later() -> None:
    dog = watch(100)
    loop = asyncio.get_running_loop()
    began = loop.time()
    loop.call_later(0.01, dog.extend, 0.05)

    with pytest.raises(DeadlineMissed):
        await dog.wait(forever(), 0.03)

    assert 0.06 <= loop.time() - began < 5
    dog.stop()
