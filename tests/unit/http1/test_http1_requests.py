"""Requests as they come over a socket: split, chunked, kept alive, early and hostile ones."""

import asyncio

import pytest

from gateway.http1.exchange import UNREAD_BYTES_MAX, Exchange
from tests.unit.http1.conftest import Served, serving, until

PLAIN = b"POST /v1/x?q=1 HTTP/1.1\r\nhost: x\r\ncontent-length: 11\r\n\r\nhello world"
CHUNKED = (
    b"POST /v1/x HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    b"5\r\nhello\r\n6;ext=1\r\n world\r\n0\r\n\r\n"
)
LAST = b"GET /last HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"


def body_of(answer: bytes) -> bytes:
    return answer.partition(b"\r\n\r\n")[2]


async def one_answer(reader: asyncio.StreamReader) -> bytes:
    """Head and body of an answer that has a content-length."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    return head + await reader.readexactly(length)


@pytest.mark.parametrize("request_bytes", [PLAIN, CHUNKED], ids=["plain", "chunked"])
async def test_where_a_request_is_cut_into_packets_changes_nothing(
    echo: Served, request_bytes: bytes
) -> None:
    for at in range(1, len(request_bytes)):
        reader, writer = await echo.connect()
        await until(lambda: echo.state.connections)
        for piece in (request_bytes[:at], request_bytes[at:]):
            echo.made[-1].data_received(piece)
            await asyncio.sleep(0)
        assert body_of(await one_answer(reader)) == b"POST /v1/x hello world", at
        writer.close()
        await until(lambda: not echo.state.connections)


async def test_a_request_that_comes_byte_by_byte_is_whole(echo: Served) -> None:
    reader, _ = await echo.connect()
    await until(lambda: echo.state.connections)
    for at in range(len(CHUNKED)):
        echo.made[-1].data_received(CHUNKED[at : at + 1])
        await asyncio.sleep(0)

    assert body_of(await one_answer(reader)) == b"POST /v1/x hello world"


async def test_a_connection_serves_one_request_after_the_other(echo: Served) -> None:
    reader, writer = await echo.connect()
    for request in (PLAIN, CHUNKED, PLAIN):
        writer.write(request)
        assert body_of(await one_answer(reader)) == b"POST /v1/x hello world"
    writer.write(LAST)

    answer = await reader.read()

    assert b"connection: close\r\n" in answer
    assert body_of(answer) == b"GET /last "
    assert len(echo.made) == 1


async def test_an_old_client_gets_its_answer_and_the_end(echo: Served) -> None:
    answer = await echo.ask(b"GET /old HTTP/1.0\r\n\r\n")

    assert b"connection: close\r\n" in answer
    assert body_of(answer) == b"GET /old "


@pytest.mark.parametrize(
    ("target", "path"),
    [
        (b"/a%20b/%C3%A4?x=/y#z", "/a b/ä"),
        (b"http://gateway.example/v1/models?x", "/v1/models"),
        (b"http://gateway.example", "/"),
        (b"/", "/"),
    ],
)
async def test_the_path_of_a_target(echo: Served, target: bytes, path: str) -> None:
    answer = await echo.ask(b"GET %b HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n" % target)

    assert body_of(answer) == f"GET {path} ".encode()


async def test_a_body_that_nobody_reads_is_not_taken_without_bound() -> None:
    reads = asyncio.Event()
    exchanges: list[Exchange] = []

    async def app(exchange: Exchange) -> None:
        exchanges.append(exchange)
        await reads.wait()
        size = 0
        while not exchange.is_whole:
            await exchange.more_body()
            size += len(exchange.take_body())
        size += len(exchange.take_body())
        said = b"%d" % size
        exchange.start(200, [(b"content-length", b"%d" % len(said))])
        exchange.end(said)

    size = 32 * 1024 * 1024
    async with serving(app) as served:
        reader, writer = await served.connect()
        writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % size)
        sending = asyncio.create_task(_send(writer, size))
        await until(lambda: exchanges and exchanges[0]._unread_bytes > UNREAD_BYTES_MAX)
        await asyncio.wait([sending], timeout=0.2)

        assert not sending.done()
        assert exchanges[0]._unread_bytes < UNREAD_BYTES_MAX + 512 * 1024
        reads.set()
        assert body_of(await one_answer(reader)) == b"%d" % size
        await sending


async def _send(writer: asyncio.StreamWriter, size: int) -> None:
    piece = bytes(64 * 1024)
    for _ in range(size // len(piece)):
        writer.write(piece)
        await writer.drain()


async def test_the_rest_of_a_body_that_was_answered_early_is_dropped() -> None:
    async def app(exchange: Exchange) -> None:
        exchange.start(413 if exchange.method == b"POST" else 200, [(b"content-length", b"2")])
        exchange.end(b"no" if exchange.method == b"POST" else b"ok")

    async with serving(app) as served:
        reader, writer = await served.connect()
        writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\nbegin")
        assert b" 413 " in await one_answer(reader)
        writer.write(bytes(99_995))
        writer.write(LAST)

        answer = await reader.read()

    assert answer.startswith(b"HTTP/1.1 200 ")
    assert body_of(answer) == b"ok"


async def test_whoever_waits_for_the_body_is_told_that_the_client_left() -> None:
    told = asyncio.Event()

    async def app(exchange: Exchange) -> None:
        while not exchange.gone and not exchange.is_whole:
            exchange.take_body()
            await exchange.more_body()
        if exchange.gone:
            told.set()

    async with serving(app) as served:
        _, writer = await served.connect()
        writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\nbegin")
        await asyncio.sleep(0)
        writer.close()
        async with asyncio.timeout(5):
            await told.wait()


async def test_a_request_that_is_no_http_is_never_served(echo: Served) -> None:
    answer = await echo.ask(
        b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n"
    )

    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1 4") == 1
    assert not echo.state.tasks
