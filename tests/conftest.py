"""Shared by all tests: real Postgres, real Valkey and an upstream process, once for each run.

Every test gets a database of its own, copied from a migrated template, and an empty till.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator

import asyncpg
import pytest
import redis.asyncio

from gateway.embedded.postgres import EmbeddedPostgres
from gateway.embedded.valkey import EmbeddedValkey
from migrations.runner import migrate
from tests.support.evm import Node, running_anvil
from tests.support.gateway import Gateway, running_gateway
from tests.support.upstream.launch import Upstream, running_upstream

TEMPLATE = "farebox_template"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="slow matrices and loads at full size")
    parser.addoption("--machines", type=int, default=0, help="how many machines tests/model runs")
    faults = parser.getgroup("faults", "the fault campaign (-m faults tests/faults)")
    faults.addoption("--runs", type=int, default=None, help="how many runs")
    faults.addoption("--seed", type=int, default=None, help="what they are drawn from")
    faults.addoption("--only", type=int, default=None, help="the run of this number alone")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a matrix marked `sampled(n)` keep n cases, always the same ones; `--full` keeps all."""
    if config.getoption("--full"):
        return
    matrices: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sampled"):
            matrices.setdefault(item.nodeid.partition("[")[0], []).append(item)
    dropped = set()
    for name, cases in matrices.items():
        mark = cases[0].get_closest_marker("sampled")
        assert mark is not None
        kept = random.Random(name).sample(cases, min(mark.args[0], len(cases)))
        dropped |= set(cases) - set(kept)
    if dropped:
        config.hook.pytest_deselected(items=[item for item in items if item in dropped])
        items[:] = [item for item in items if item not in dropped]


@pytest.fixture(scope="session")
def is_full(request: pytest.FixtureRequest) -> bool:
    """Whether the whole of what is slow was asked for."""
    return bool(request.config.getoption("--full"))


@pytest.fixture(scope="session")
def postgres_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of an empty database of a server whose data may be lost: it only serves this run."""
    settings = {"fsync": "off", "synchronous_commit": "on", "full_page_writes": "off"}
    server = EmbeddedPostgres(tmp_path_factory.mktemp("postgres"), settings=settings)
    asyncio.run(server.start())
    try:
        yield server.url
    finally:
        asyncio.run(server.stop())


@pytest.fixture(scope="session")
def valkey_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = EmbeddedValkey(tmp_path_factory.mktemp("valkey"))
    asyncio.run(server.start())
    try:
        yield server.url
    finally:
        asyncio.run(server.stop())


@pytest.fixture(scope="session")
def upstream_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upstream]:
    with running_upstream(tmp_path_factory.mktemp("upstream")) as upstream:
        yield upstream


@pytest.fixture(scope="session")
def anvil() -> Iterator[Node]:
    """A chain of this run's own, with the id of Base."""
    with running_anvil() as node:
        yield node


@pytest.fixture
def upstream(upstream_process: Upstream) -> Upstream:
    """The upstream with its counters at zero."""
    upstream_process.reset()
    return upstream_process


@pytest.fixture(scope="session")
def template_url(postgres_url: str) -> str:
    async def make() -> None:
        conn = await asyncpg.connect(postgres_url)
        await conn.execute(f"CREATE DATABASE {TEMPLATE}")
        await conn.close()
        await migrate(database_url(postgres_url, TEMPLATE))

    asyncio.run(make())
    return postgres_url


@pytest.fixture
async def book_url(template_url: str, request: pytest.FixtureRequest) -> AsyncIterator[str]:
    """A migrated database of this test's own."""
    name = f"t_{abs(hash(request.node.nodeid)):x}"
    admin = await asyncpg.connect(template_url)
    try:
        await admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        await admin.execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
        yield database_url(template_url, name)
        await admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
    finally:
        await admin.close()


@pytest.fixture
async def till_url(valkey_url: str) -> AsyncIterator[str]:
    """An empty till."""
    client = redis.asyncio.from_url(valkey_url)
    await client.flushall()
    yield valkey_url
    await client.aclose()


@pytest.fixture
async def gateway(book_url: str, till_url: str, upstream: Upstream) -> AsyncIterator[Gateway]:
    """A worker on this test's event loop, in front of the upstream process."""
    async with running_gateway(book_url, till_url, upstream.base_url) as gateway:
        yield gateway


def database_url(url: str, name: str) -> str:
    return url.rsplit("/", 1)[0] + f"/{name}"
