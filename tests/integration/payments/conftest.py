"""A book of the test's own, entered as those who serve enter it."""

from collections.abc import AsyncIterator

import pytest

from billing.book import Pool
from billing.roles import REQUEST, WORKER, as_role
from tests.support.books import open_pool


@pytest.fixture
async def pool(book_url: str) -> AsyncIterator[Pool]:
    async with open_pool(as_role(book_url, WORKER), 20) as pool:
        yield pool


@pytest.fixture
async def tenants(book_url: str) -> AsyncIterator[Pool]:
    async with open_pool(as_role(book_url, REQUEST), 20) as pool:
        yield pool
