"""`finish` runs a coroutine to its end, whatever cancels the caller."""

import asyncio
import gc

import anyio
import pytest

from gateway.relay.settle import finish


class Settling:
    """Work of several steps that notes when it is through."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.go_on = asyncio.Event()
        self.is_through = False

    async def __call__(self) -> str:
        self.begun.set()
        await self.go_on.wait()
        for _ in range(3):
            await asyncio.sleep(0)
        self.is_through = True
        return "settled"


async def test_it_returns_the_result() -> None:
    work = Settling()
    work.go_on.set()

    assert await finish(work()) == "settled"


async def test_it_raises_what_the_work_raised() -> None:
    async def fail() -> None:
        raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        await finish(fail())


@pytest.mark.parametrize("times", [1, 2, 5])
async def test_cancelling_the_task_once_or_often_does_not_stop_it(times: int) -> None:
    work = Settling()
    task = asyncio.get_running_loop().create_task(finish(work()))
    await work.begun.wait()

    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
    work.go_on.set()

    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.is_through


async def test_cancelling_the_scope_does_not_stop_it() -> None:
    work = Settling()

    async def handler() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            await finish(work())

    with anyio.CancelScope() as scope:
        asyncio.get_running_loop().call_soon(scope.cancel)
        asyncio.get_running_loop().call_later(0.01, work.go_on.set)
        await handler()

    assert scope.cancelled_caught
    assert work.is_through


async def test_work_that_fails_while_the_caller_is_cancelled_is_no_silent_loss() -> None:
    """The cancellation goes on, and the failure is known: no unretrieved exception is left."""
    begun, go_on = asyncio.Event(), asyncio.Event()
    unseen: list[object] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: unseen.append(context))

    async def fail() -> None:
        begun.set()
        await go_on.wait()
        raise ValueError("x")

    task = loop.create_task(finish(fail()))
    await begun.wait()
    task.cancel()
    loop.call_soon(go_on.set)
    with pytest.raises(asyncio.CancelledError):
        await task
    del task
    gc.collect()

    assert unseen == []
