"""One reading for all who ask for the same while it runs."""

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Any, TypeVar, cast

T = TypeVar("T")


class SingleFlight:
    """Runs what many want at once only once."""

    def __init__(self, look_at: Callable[[asyncio.Future[Any]], None]) -> None:
        """look_at is told of every reading that ended: nobody else may."""
        self._look_at = look_at
        self._reading: dict[Hashable, asyncio.Future[Any]] = {}

    def is_running(self, what: Hashable) -> bool:
        return what in self._reading

    async def run(self, what: Hashable, read: Callable[[], Awaitable[T]]) -> T:
        """The result of read, which runs once for all who ask while it runs.

        When the caller that runs it is cancelled, one of the others takes over.
        """
        while (running := self._reading.get(what)) is not None:
            await asyncio.wait([running])
            if not running.cancelled():
                return cast("T", running.result())
        future = self._reading[what] = asyncio.get_running_loop().create_future()
        future.add_done_callback(self._look_at)
        try:
            result = await read()
        except BaseException as exc:
            if isinstance(exc, Exception):
                future.set_exception(exc)
            else:
                future.cancel()
            raise
        finally:
            del self._reading[what]
        future.set_result(result)
        return result
