"""The book for a route that acts for one account."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

from billing import book
from billing.book import Connection, translated
from gateway.services import Services


@asynccontextmanager
async def tenant(services: Services, account_id: UUID) -> AsyncIterator[Connection]:
    """One transaction for one account: committed at the end, taken back when the body raises.

    Whoever has to be told of a change (the till, the log) is told afterwards.
    Raises BookUnavailable.
    """
    async with book.acquire(services.pool) as conn, translated(), conn.transaction():
        yield conn
