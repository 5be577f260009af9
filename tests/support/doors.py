"""An authenticator on a real book, without a gateway around it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

from billing import book
from config.secret import Secret
from config.settings import Keys, Settings
from gateway.relay.authenticate import Authenticator
from gateway.relay.call import Caller
from gateway.supervise import Tasks
from tests.support.books import PEPPER
from tests.support.tills import nothing_unseen


class Queries:
    """What a pool's connections sent, by asyncpg's own query log."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    async def watch(self, conn: Any) -> None:
        conn.add_query_logger(self._note)

    def _note(self, record: Any) -> None:
        self.texts.append(record.query)

    def count(self) -> int:
        return sum("app_api_keys" in text for text in self.texts)


class Door:
    """An authenticator on a real book, and what it asked."""

    def __init__(self, authenticator: Authenticator, queries: Queries, pool: book.Pool) -> None:
        self.authenticator = authenticator
        self.queries = queries
        self.pool = pool

    async def enter(self, secret: str) -> Caller:
        headers = {b"authorization": f"Bearer {secret}".encode()}
        return await self.authenticator.authenticate(headers)


@asynccontextmanager
async def open_door(book_url: str, **more: Any) -> AsyncIterator[Door]:
    """more: settings of `keys`."""
    settings = Settings(keys=Keys(**{"pepper": Secret(PEPPER.decode()), **more}))
    queries, tasks = Queries(), Tasks()
    watched = asyncpg.create_pool(
        book_url, setup=queries.watch, min_size=1, max_size=4, timeout=5, command_timeout=10
    )
    async with nothing_unseen(), watched as pool:
        try:
            yield Door(Authenticator(settings, pool, tasks), queries, pool)
        finally:
            await tasks.close()
