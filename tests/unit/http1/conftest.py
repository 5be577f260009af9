"""Our protocol on a real socket, with an application of the test's own behind it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import uvicorn
from uvicorn.server import ServerState

from gateway.http1.exchange import Exchange
from gateway.http1.protocol import Protocol

App = Callable[[Exchange], Awaitable[None]]


class Served:
    """A listening server, the connections it has, and clients for it."""

    def __init__(self, port: int, state: ServerState, made: list[Protocol]) -> None:
        self.port = port
        self.state = state
        self.made = made
        self.writers: list[asyncio.StreamWriter] = []

    async def connect(
        self, limit: int = 2**16
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=limit)
        self.writers.append(writer)
        return reader, writer

    async def ask(self, data: bytes) -> bytes:
        """Everything that comes back until the server closes."""
        reader, writer = await self.connect()
        writer.write(data)
        async with asyncio.timeout(10):
            return await reader.read()


async def until(holds: Callable[[], object]) -> None:
    """Wait until that is true."""
    async with asyncio.timeout(10):
        while True:
            if holds():
                return
            await asyncio.sleep(0)


@asynccontextmanager
async def serving(app: App) -> AsyncIterator[Served]:
    config = uvicorn.Config(app, interface="asgi3", log_config=None, proxy_headers=False)
    config.load()
    state = ServerState()
    made: list[Protocol] = []

    def protocol() -> Protocol:
        made.append(Protocol(config, state, {}))
        return made[-1]

    server = await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", 0)
    served = Served(server.sockets[0].getsockname()[1], state, made)
    try:
        yield served
    finally:
        server.close()
        for writer in served.writers:
            writer.close()
        for task in list(state.tasks):
            task.cancel()
        if state.tasks:
            await asyncio.wait(list(state.tasks))
        await until(lambda: not state.connections)


@pytest.fixture
async def echo() -> AsyncIterator[Served]:
    """Says back method, path and body."""

    async def app(exchange: Exchange) -> None:
        body = b""
        while not exchange.is_whole:
            await exchange.more_body()
            assert not exchange.gone
            body += exchange.take_body()
        body += exchange.take_body()
        said = b"%b %b %b" % (exchange.method, exchange.path.encode(), body)
        exchange.start(200, [(b"content-length", b"%d" % len(said))])
        exchange.end(said)

    async with serving(app) as served:
        yield served
