"""A book with two tenants, and connections of each kind to it."""

from collections.abc import AsyncIterator

import asyncpg
import pytest

from billing.roles import REQUEST, as_role
from tests.support.walls import Pair, make_logins, make_pair


@pytest.fixture
async def pair(book_url: str) -> Pair:
    return await make_pair(book_url)


@pytest.fixture
async def admin(book_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A superuser, whom no wall holds."""
    conn = await asyncpg.connect(book_url)
    yield conn
    await conn.close()


@pytest.fixture
async def tenant(book_url: str) -> AsyncIterator[asyncpg.Connection]:
    """Acts as farebox_request, as in a demo: by the role that the URL names."""
    conn = await asyncpg.connect(as_role(book_url, REQUEST))
    yield conn
    await conn.close()


@pytest.fixture
async def logins(book_url: str) -> str:
    """The URL of a book in whose cluster the logins are."""
    await make_logins(book_url)
    return book_url
