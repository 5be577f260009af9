"""Stores for tests that run their own event loop."""

import asyncio
from collections.abc import Iterator

import asyncpg
import pytest
import redis

from tests.conftest import TEMPLATE, database_url

NAME = "model"


@pytest.fixture
def fresh_book(template_url: str) -> Iterator[str]:
    """A migrated database of this test's own."""

    async def execute(*statements: str) -> None:
        admin = await asyncpg.connect(template_url)
        for statement in statements:
            await admin.execute(statement)
        await admin.close()

    drop = f"DROP DATABASE IF EXISTS {NAME} WITH (FORCE)"
    asyncio.run(execute(drop, f"CREATE DATABASE {NAME} TEMPLATE {TEMPLATE}"))
    yield database_url(template_url, NAME)
    asyncio.run(execute(drop))


@pytest.fixture
def fresh_till(valkey_url: str) -> str:
    """An empty till."""
    with redis.from_url(valkey_url) as client:
        client.flushall()
    return valkey_url


@pytest.fixture
def machines(request: pytest.FixtureRequest) -> tuple[int, int]:
    """How many machines were asked for, and their seed; 0: the default."""
    config = request.config
    return int(config.getoption("--machines")), int(config.getoption("--seed") or 0)
