"""The fault proxy does what its modes say: the tests behind it rest on that."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.support.faultproxy import FaultProxy, Mode, running_proxy

HELLO = b"0123456789" * 100


@asynccontextmanager
async def through() -> AsyncIterator[
    tuple[FaultProxy, asyncio.StreamReader, asyncio.StreamWriter, list[bytes]]
]:
    """A proxy in front of an echo, a connection through it, and the pieces that the echo got."""
    got: list[bytes] = []

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                got.append(data)
                writer.write(data)
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, running_proxy(f"http://127.0.0.1:{port}") as (proxy, url):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        try:
            yield proxy, reader, writer, got
        finally:
            writer.close()


async def test_byte_by_byte_everything_arrives_in_many_pieces() -> None:
    async with through() as (proxy, reader, writer, got):
        proxy.both(Mode.TRICKLE)
        writer.write(HELLO)
        async with asyncio.timeout(10):
            answer = await reader.readexactly(len(HELLO))

    assert answer == b"".join(got) == HELLO
    assert len(got) > 20
    assert proxy.to_server.bytes == proxy.to_client.bytes == len(HELLO)


@pytest.mark.parametrize("size", [1, 37, len(HELLO)])
async def test_a_line_is_cut_after_so_many_bytes_and_heals(size: int) -> None:
    async with through() as (proxy, reader, writer, got):
        proxy.to_server.cut_after = size
        writer.write(HELLO)
        async with asyncio.timeout(10):
            with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
                await reader.readexactly(2 * len(HELLO))

        assert proxy.to_server.bytes == size
        assert len(b"".join(got)) <= size
        again, other = await asyncio.open_connection("127.0.0.1", proxy.port)
        other.write(b"whole")
        async with asyncio.timeout(10):
            assert await again.readexactly(5) == b"whole"
        other.close()


async def test_a_reset_is_seen_as_one() -> None:
    async with through() as (proxy, reader, writer, _):
        writer.write(b"x")
        async with asyncio.timeout(10):
            assert await reader.readexactly(1) == b"x"
            proxy.reset()
            with pytest.raises(ConnectionResetError):
                await reader.readexactly(1)
