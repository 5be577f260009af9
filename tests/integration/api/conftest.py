"""One gateway for each module of this folder; people who signed in, and an operator, for each test.

Tests of a module share a book: each counts what belongs to its own people alone.
"""

from collections.abc import AsyncIterator

import asyncpg
import pytest
import pytest_asyncio
import redis.asyncio
from eth_utils.address import to_checksum_address

from config.secret import Secret
from tests.conftest import TEMPLATE, database_url
from tests.support.gateway import Gateway, make_settings, running_gateway
from tests.support.payments import TREASURY
from tests.support.people import Person, operating, signed_in
from tests.support.upstream.launch import Upstream


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway_of_module(
    template_url: str,
    valkey_url: str,
    upstream_process: Upstream,
    request: pytest.FixtureRequest,
) -> AsyncIterator[Gateway]:
    name = "t_" + request.module.__name__.rsplit(".", 1)[-1]
    till = redis.asyncio.from_url(valkey_url)
    await till.flushall()
    await till.aclose()
    admin = await asyncpg.connect(template_url)
    await admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
    await admin.execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
    url = upstream_process.base_url
    # Half a second instead of four: a test waits until caches end.
    settings = make_settings(
        url,
        keys__cache_ttl_ms=500,
        chain__treasury=to_checksum_address(TREASURY),
        chain__rpc_urls=Secret("http://127.0.0.1:9"),
        chain__development=True,
    )
    book_url = database_url(template_url, name)
    async with running_gateway(book_url, valkey_url, url, settings) as gateway:
        yield gateway
    await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await admin.close()


@pytest_asyncio.fixture(loop_scope="module")
async def gateway(gateway_of_module: Gateway) -> AsyncIterator[Gateway]:
    yield gateway_of_module
    await gateway_of_module.at_rest()


@pytest_asyncio.fixture(loop_scope="module")
async def alice(gateway: Gateway) -> AsyncIterator[Person]:
    async with signed_in(gateway) as person:
        yield person


@pytest_asyncio.fixture(loop_scope="module")
async def bob(gateway: Gateway) -> AsyncIterator[Person]:
    async with signed_in(gateway) as person:
        yield person


@pytest_asyncio.fixture(loop_scope="module")
async def operator(gateway: Gateway) -> AsyncIterator[Person]:
    async with operating(gateway) as person:
        yield person
