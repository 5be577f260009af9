"""The book for a route that acts for one account."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

from billing.book import Connection
from gateway.services import Services


@asynccontextmanager
async def tenant(services: Services, account_id: UUID) -> AsyncIterator[Connection]:
    """One transaction for one account: committed at the end, taken back when the body raises.

    It enters the book as farebox_request, for which no other account is there.

    Whoever has to be told of a change (the till, the log) is told afterwards.
    Raises BookUnavailable.
    """
    async with services.as_tenant(account_id) as conn:
        yield conn
