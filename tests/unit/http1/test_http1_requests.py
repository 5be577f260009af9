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


async def test_a_target_that_is_no_url_is_refused(echo: Served) -> None:
    """Found: it was answered with 500."""
    answer = await echo.ask(b"GET http://[x/ HTTP/1.1\r\nhost: x\r\n\r\n")

    assert answer.startswith(b"HTTP/1.1 400 ")
    assert not echo.state.tasks


async def test_the_size_of_every_head_is_known() -> None:
    """Found: that of all requests but the first was taken for 0, so no limit held for it."""
    sizes: list[int] = []

    async def app(exchange: Exchange) -> None:
        sizes.append(exchange.head_bytes)
        exchange.start(200, [(b"content-length", b"0")])
        exchange.end()

    request = b"GET / HTTP/1.1\r\nhost: x\r\nx-filler: %b\r\n\r\n" % (b"a" * 5000)
    async with serving(app) as served:
        reader, writer = await served.connect()
        for _ in range(3):
            writer.write(request)
            await one_answer(reader)

    assert sizes == [len(request)] * 3


INVITED = (
    b"POST / HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 8\r\n"
    b"connection: close\r\n\r\n"
)


async def test_a_client_is_invited_to_send_its_body_once() -> None:
    """Found: it was before every part of the body, and Go's client gives up at the sixth."""
    waits = 0

    async def app(exchange: Exchange) -> None:
        nonlocal waits
        while not exchange.is_whole:
            exchange.take_body()
            waits += 1
            await exchange.more_body()
        exchange.start(200, [(b"content-length", b"0")])
        exchange.end()

    async with serving(app) as served:
        reader, writer = await served.connect()
        writer.write(INVITED)
        for number in range(1, 9):
            await until(lambda number=number: waits >= number)  # type: ignore[misc]
            writer.write(b"x")
        answer = await reader.read()

    assert waits >= 8
    assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 ")


async def test_a_body_that_was_not_invited_leaves_no_doubt_about_what_comes_next() -> None:
    """The client may send it or go on with its next request, which would pass for the body."""

    async def app(exchange: Exchange) -> None:
        exchange.start(413, [(b"content-length", b"0")])
        exchange.end()

    async with serving(app) as served:
        answer = await served.ask(INVITED.replace(b"connection: close\r\n", b""))

    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in answer
