"""Answers as they leave: framing, back-pressure, clients that go, and what must never get out."""

import asyncio

import pytest

from gateway.http1.asgi import serve_asgi
from gateway.http1.exchange import BadAnswer, Exchange, Header
from tests.unit.http1.conftest import Served, serving, until

GET = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
STAY = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


async def test_a_stream_leaves_in_chunks_and_an_empty_part_does_not_end_it() -> None:
    async def app(exchange: Exchange) -> None:
        exchange.start(200, [(b"content-type", b"text/plain")])
        for part in (b"one", b"", b"three"):
            exchange.write(part)
        exchange.end(b"end")

    async with serving(app) as served:
        head, _, body = (await served.ask(GET)).partition(b"\r\n\r\n")

    assert b"transfer-encoding: chunked" in head
    assert body == b"3\r\none\r\n5\r\nthree\r\n3\r\nend\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    ("method", "status", "length"), [(b"HEAD", 200, b"5"), (b"GET", 204, None), (b"GET", 304, None)]
)
async def test_answers_without_a_body(method: bytes, status: int, length: bytes | None) -> None:
    async def app(exchange: Exchange) -> None:
        exchange.start(status, [(b"content-length", length)] if length else [])
        exchange.end(b"hello" if length else b"")

    async with serving(app) as served:
        answer = await served.ask(method + GET[3:])

    assert answer.endswith(b"\r\n\r\n")
    assert (b"content-length: 5" in answer) is (length is not None)
    assert b"chunked" not in answer


@pytest.mark.parametrize(
    "header",
    [
        (b"x-id", b"a\r\nset-cookie: b"),
        (b"x-id", b"a\nb"),
        (b"x-id", b"a\rb"),
        (b"x-id\r\nx", b"a"),
        (b"x-id", b"a\0b"),
    ],
)
async def test_a_line_break_gets_into_no_header(header: Header) -> None:
    refused: list[BadAnswer] = []

    async def app(exchange: Exchange) -> None:
        try:
            exchange.start(200, [header])
        except BadAnswer as exc:
            refused.append(exc)

    async with serving(app) as served:
        assert await served.ask(GET) == b""

    assert len(refused) == 1


@pytest.mark.parametrize("body", [b"", b"four", b"sixsix"])
async def test_a_body_of_another_length_than_was_said_is_cut_off(body: bytes) -> None:
    refused: list[BadAnswer] = []

    async def app(exchange: Exchange) -> None:
        exchange.start(200, [(b"content-length", b"5")])
        try:
            exchange.end(body)
        except BadAnswer as exc:
            refused.append(exc)

    async with serving(app) as served:
        assert await served.ask(STAY) == b""

    assert len(refused) == 1


async def test_an_application_that_ends_in_the_middle_closes_the_connection() -> None:
    async def app(exchange: Exchange) -> None:
        exchange.start(200, [])
        exchange.write(b"part")

    async with serving(app) as served:
        answer = await served.ask(STAY)

    assert answer.endswith(b"4\r\npart\r\n")


async def test_leaving_is_told_once_and_only_before_the_end() -> None:
    told: list[str] = []
    goes_on = asyncio.Event()

    async def app(exchange: Exchange) -> None:
        exchange.on_gone = lambda: told.append(exchange.path)
        exchange.start(200, [])
        if exchange.path == "/whole":
            exchange.end(b"all")
            return
        exchange.write(b"part")
        await exchange.closed()
        assert exchange.gone
        exchange.write(b"dropped")
        exchange.end(b"dropped")
        goes_on.set()

    async with serving(app) as served:
        for path in (b"/whole", b"/part"):
            reader, writer = await served.connect()
            writer.write(STAY.replace(b"/", path, 1))
            await reader.readuntil(b"\r\n\r\n")
            writer.close()
        async with asyncio.timeout(5):
            await goes_on.wait()

    assert told == ["/part"]


async def test_a_client_that_does_not_read_blocks_its_stream_and_nothing_else() -> None:
    parts, part = 200, bytes(100_000)
    blocked = asyncio.Event()

    async def app(exchange: Exchange) -> None:
        exchange.start(200, [(b"content-length", b"%d" % (parts * len(part)))])
        for number in range(parts):
            exchange.write(part) if number < parts - 1 else exchange.end(part)
            if exchange.is_blocked:
                blocked.set()
                await exchange.drained()

    async with serving(app) as served:
        reader, writer = await served.connect()
        writer.write(GET)
        async with asyncio.timeout(10):
            await blocked.wait()
            waiting = served.made[0].transport.get_write_buffer_size()
            answer = await reader.read()

    assert 0 < waiting < 4 * len(part)
    assert len(answer.partition(b"\r\n\r\n")[2]) == parts * len(part)


async def _answered_and_unread(served: Served) -> asyncio.StreamReader:
    """A connection whose answer is complete for us but not read by the client."""
    reader, writer = await served.connect(limit=1024)
    writer.write(STAY)
    await until(lambda: served.made and served.state.total_requests)
    return reader


async def _large(exchange: Exchange) -> None:
    body = bytes(30_000_000)
    exchange.start(200, [(b"content-length", b"%d" % len(body))])
    exchange.end(body)


async def test_a_client_that_takes_nothing_any_more_is_dropped_in_the_end() -> None:
    async with serving(_large) as served:
        reader = await _answered_and_unread(served)
        protocol = served.made[0]
        # As much as the buffers of the kernel and of the client take.
        sizes = [-1]

        def is_stuck() -> bool:
            sizes.append(protocol.transport.get_write_buffer_size())
            return len(sizes) > 10_000 and sizes[-1] == sizes[-10_000]

        await until(is_stuck)
        assert sizes[-1] > 0

        protocol.expire()
        assert not protocol.transport.is_closing()
        protocol.expire()

        assert protocol.transport.is_closing()
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await reader.readexactly(30_000_000)


async def test_a_client_that_reads_slowly_is_not_dropped() -> None:
    async with serving(_large) as served:
        reader = await _answered_and_unread(served)
        protocol = served.made[0]
        got = 0
        while protocol.transport.get_write_buffer_size():
            protocol.expire()
            assert not protocol.transport.is_closing()
            before = protocol.transport.get_write_buffer_size()
            while protocol.transport.get_write_buffer_size() == before:
                got += len(await reader.readexactly(100_000))
        while got < 30_000_000:
            got += len(await reader.read(1_000_000))


async def test_a_client_that_takes_no_answers_gets_no_more_of_them() -> None:
    """Found: each further request added its answer to what was waiting, without a bound."""
    body = bytes(200_000)

    async def app(exchange: Exchange) -> None:
        exchange.start(200, [(b"content-length", b"%d" % len(body))])
        exchange.end(body)

    async with serving(app) as served:
        reader, writer = await served.connect(limit=1024)
        await until(lambda: served.made)
        protocol, state = served.made[0], served.state
        asked = 0
        while not protocol.is_blocked:
            writer.write(STAY)
            asked += 1
            await until(lambda asked=asked: state.total_requests == asked)  # type: ignore[misc]
        waiting = protocol.transport.get_write_buffer_size()
        writer.write(STAY)
        for _ in range(1000):
            await asyncio.sleep(0)

        assert state.total_requests == asked
        assert protocol.transport.get_write_buffer_size() <= waiting
        for _ in range(asked + 1):
            assert await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(len(body))
        assert state.total_requests == asked + 1


async def test_a_stall_of_one_answer_does_not_count_for_the_next() -> None:
    """Found: the second answer was given up without the patience that the first one got."""
    bodies = [bytes(10_000_000), bytes(30_000_000)]

    async def app(exchange: Exchange) -> None:
        body = bodies[served.state.total_requests]
        exchange.start(200, [(b"content-length", b"%d" % len(body))])
        exchange.end(body)

    async with serving(app) as served:
        reader = await _answered_and_unread(served)
        protocol = served.made[0]
        protocol.expire()
        assert not protocol.transport.is_closing()

        await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(len(bodies[0]))
        served.writers[0].write(STAY)
        await until(lambda: served.state.total_requests == 2)
        protocol.expire()

        assert not protocol.transport.is_closing()


async def test_a_connection_that_is_cut_off_is_not_kept_for_a_client_that_does_not_read() -> None:
    """Found: its end was never looked at again, and the descriptor lost."""

    async def app(exchange: Exchange) -> None:
        exchange.start(200, [])
        while not exchange.is_blocked:
            exchange.write(bytes(100_000))
        await exchange.more_body()

    chunked = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    for last in (b"no chunk\r\n", b"1\r\nx\r\n"):
        async with serving(app) as served:
            _, writer = await served.connect(limit=1024)
            writer.write(chunked)
            await until(lambda served=served: served.made and served.made[0].is_blocked)  # type: ignore[misc]
            writer.write(last)
            transport = served.made[0].transport
            await until(transport.is_closing)
            assert served.state.connections

            assert served.made[0].ends_at < float("inf")
            served.made[0].expire()
            served.made[0].expire()
            await until(lambda served=served: not served.state.connections)  # type: ignore[misc]


async def test_an_asgi_application_is_served_and_told_when_its_client_leaves() -> None:
    seen: list[str] = []

    async def asgi(scope: dict[str, object], receive: object, send: object) -> None:
        assert scope["type"] == "http"
        body, more = b"", True
        while more:
            message = await receive()  # type: ignore[operator]
            body += message["body"]
            more = message["more_body"]
        start = {"type": "http.response.start", "status": 200, "headers": [(b"x-a", b"b")]}
        await send(start)  # type: ignore[operator]
        said = f"{scope['path']} {scope['query_string']!r} ".encode() + body
        await send({"type": "http.response.body", "body": said, "more_body": True})  # type: ignore[operator]
        if scope["path"] == "/stays":
            seen.append((await receive())["type"])  # type: ignore[operator]
        await send({"type": "http.response.body", "body": b"!"})  # type: ignore[operator]

    async def app(exchange: Exchange) -> None:
        await serve_asgi(asgi, exchange, body_s=10, write_stall_s=10)

    async with serving(app) as served:
        request = b"POST /%b?a=b HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n"
        answer = await served.ask(request % b"goes" + b"connection: close\r\n\r\nhi")
        reader, writer = await served.connect()
        writer.write(request % b"stays" + b"\r\nhi")
        await reader.readuntil(b"\r\n\r\n")
        writer.close()
        await until(lambda: seen)

    assert b"x-a: b\r\n" in answer
    assert b"/goes b'a=b' hi\r\n1\r\n!\r\n0\r\n\r\n" in answer
    assert seen == ["http.disconnect"]
