"""Every test runs on the loop of production and on the plain one; nothing may stay open."""

import asyncio
import gc
from collections.abc import AsyncIterator, Callable

import pytest
import uvloop

from gateway.providers.http import HttpClient
from tests.integration.providers.peer import Peer, running_peer


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    async with running_peer() as peer:
        yield peer


@pytest.fixture
async def client() -> AsyncIterator[HttpClient]:
    client = HttpClient(5.0)
    yield client
    await client.close()
    del client
    gc.collect(1)  # what was left open says so now, and in this test; all would take 50 ms
