"""The control plane's framework waits for no client for ever."""

import asyncio
from typing import Any

import pytest
from litestar import Litestar, Request, post

from gateway.errors import ApiError
from gateway.http1.asgi import serve_asgi
from gateway.http1.exchange import Exchange
from tests.unit.http1.conftest import serving, until

HEAD = b"POST /%b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"
BODY_S, STALL_S = 0.3, 0.3


async def test_a_body_that_does_not_come_ends_in_a_400_and_never_in_a_408() -> None:
    seen: list[Exception] = []

    async def asgi(scope: Any, receive: Any, send: Any) -> None:
        try:
            while (await receive())["more_body"]:
                pass
        except ApiError as exc:
            seen.append(exc)
            start = {"type": "http.response.start", "status": exc.status}
            await send({**start, "headers": [*exc.headers, (b"content-length", b"4")]})
            await send({"type": "http.response.body", "body": b"late"})

    async def app(exchange: Exchange) -> None:
        await serve_asgi(asgi, exchange, body_s=BODY_S, write_stall_s=10)

    async with serving(app) as served:
        reader, writer = await served.connect()
        began = asyncio.get_running_loop().time()
        writer.write(HEAD % (b"a", 1000))
        dripping = asyncio.get_running_loop().create_task(drip(writer))
        async with asyncio.timeout(10):
            # Not to the end: what still drips may turn the server's close into a reset.
            answer = await reader.readuntil(b"late")
        dripping.cancel()
        took_s = asyncio.get_running_loop().time() - began

    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"connection: close\r\n" in answer
    assert answer.endswith(b"late")
    assert BODY_S * 0.9 < took_s < 5
    assert "not charged" in str(seen[0])


async def drip(writer: asyncio.StreamWriter) -> None:
    """One byte again and again: each of them comes in time, the whole does not."""
    while not writer.is_closing():
        writer.write(b"x")
        await asyncio.sleep(BODY_S / 10)


async def test_the_framework_answers_it_with_our_envelope() -> None:
    @post("/body")
    async def handler(request: Request[Any, Any, Any]) -> str:
        return str(len(await request.body()))

    def on_error(_: Any, exc: Exception) -> Any:
        from litestar import Response

        assert isinstance(exc, ApiError)
        return Response(exc.body("req_x"), status_code=exc.status)

    framework = Litestar([handler], exception_handlers={ApiError: on_error}, openapi_config=None)

    async def app(exchange: Exchange) -> None:
        await serve_asgi(framework, exchange, body_s=BODY_S, write_stall_s=10)

    async with serving(app) as served:
        whole = await served.ask(
            HEAD.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n") % (b"body", 2) + b"hi"
        )
        reader, writer = await served.connect()
        writer.write(HEAD % (b"body", 1000) + b"h")
        async with asyncio.timeout(10):
            head = await reader.readuntil(b"\r\n\r\n")

    assert whole.startswith(b"HTTP/1.1 201 ")
    assert head.startswith(b"HTTP/1.1 400 ")


async def test_a_client_that_takes_no_answer_loses_its_connection() -> None:
    ended = asyncio.Event()

    async def asgi(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(200):
            await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        ended.set()

    async def app(exchange: Exchange) -> None:
        await serve_asgi(asgi, exchange, body_s=10, write_stall_s=STALL_S)

    async with serving(app) as served:
        _, writer = await served.connect(limit=1000)
        writer.write(HEAD % (b"a", 0))
        async with asyncio.timeout(10):
            await ended.wait()
        await until(lambda: not served.state.connections)


@pytest.mark.parametrize("sent", [b"", b"h"])
async def test_a_client_that_leaves_within_its_body_is_a_disconnect(sent: bytes) -> None:
    seen: list[str] = []

    async def asgi(scope: Any, receive: Any, send: Any) -> None:
        while True:
            message = await receive()
            seen.append(message["type"])
            if message["type"] == "http.disconnect":
                return

    async def app(exchange: Exchange) -> None:
        await serve_asgi(asgi, exchange, body_s=10, write_stall_s=10)

    async with serving(app) as served:
        _, writer = await served.connect()
        writer.write(HEAD % (b"a", 2) + sent)
        await until(lambda: served.made)
        writer.close()
        await until(lambda: seen and seen[-1] == "http.disconnect")
