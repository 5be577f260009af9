"""The edge of the server: heads that are slow, large or no HTTP at all, and how sockets are set."""

import asyncio
import gc
import json
import socket
from collections.abc import AsyncIterator

import pytest
import uvloop

from gateway.http1.protocol import Protocol
from tests.support.gateway import Gateway, make_settings, running_gateway
from tests.support.rawclient import Ended, RawConnection, RawRequest, chat, connect, exchange
from tests.support.upstream.launch import Upstream

HEADERS_S = 0.3
HELLO = {"model": "plain", "messages": [{"role": "user", "content": "hello"}]}
ECHO = {"model": "echo", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
async def hasty(book_url: str, till_url: str, upstream: Upstream) -> AsyncIterator[Gateway]:
    """A gateway with little patience for heads."""
    slow = {"routes": [{"provider": "slow"}], "price": None}
    settings = make_settings(
        upstream.base_url,
        {"slow": slow},
        timeouts__headers_s=HEADERS_S,
        billing__unpriced="free",
        providers__slow={"kind": "echo", "chunk_delay_ms": 50},
    )
    async with running_gateway(book_url, till_url, upstream.base_url, settings) as gateway:
        yield gateway


async def refusal(conn: RawConnection) -> tuple[int, dict[str, str]]:
    """The status and error of an answer after which the server closes."""
    head = await conn.head()
    body = b"".join([piece.data async for piece in conn.body()])
    assert head.get("connection") == "close"
    assert await conn.ended() in {Ended.EOF, Ended.RESET}
    return head.status, json.loads(body)["error"]


async def everything(conn: RawConnection) -> bytes:
    """What comes until the server closes, framing included."""
    loop, received = asyncio.get_running_loop(), b""
    while data := await loop.sock_recv(conn.sock, 65_536):
        received += data
    return received


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 TLS to a plain port\r\n\r\n",
        b"GET / HTTP/1.1\r\nbad header\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\ncontent-length: 4\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nhost: x\r\n\r\n",
    ],
)
async def test_what_is_no_http_gets_the_envelope(gateway: Gateway, garbage: bytes) -> None:
    async with connect(gateway.origin) as conn:
        await conn.send_raw(garbage)
        status, error = await refusal(conn)

    assert (status, error["code"]) == (400, "invalid_request")
    assert error["request_id"].startswith("req_")


async def test_garbage_after_a_request_does_not_get_into_its_answer(hasty: Gateway) -> None:
    key = await hasty.key()
    async with connect(hasty.base_url) as conn:
        await conn.send(chat(key, {**ECHO, "model": "slow", "stream": True}))
        await conn.head()
        await conn.send_raw(b"\x00\x01\x02 no request\r\n\r\n")
        received = await everything(conn)

    assert b"HTTP/1.1" not in received
    assert b"data: [DONE]" in received
    (receipt,) = await hasty.receipts(1)
    assert receipt["outcome"] == "complete"


@pytest.mark.parametrize("sent", [b"", b"POST /v1/chat/comp", b"GET / HTTP/1.1\r\nhost: x\r\n"])
async def test_a_head_that_does_not_come_is_cut(hasty: Gateway, sent: bytes) -> None:
    began = asyncio.get_running_loop().time()
    async with connect(hasty.origin) as conn:
        await conn.send_raw(sent)
        assert await conn.ended() is Ended.EOF

    assert HEADERS_S * 0.9 <= asyncio.get_running_loop().time() - began < 5


async def test_a_head_in_drops_is_cut_all_the_same(hasty: Gateway) -> None:
    async with connect(hasty.origin) as conn:
        ended = asyncio.ensure_future(conn.ended())
        for letter in b"GET / HTTP/1.1\r\nx-slow: " + b"y" * 10_000:
            await conn.send_raw(bytes([letter]))
            await asyncio.wait([ended], timeout=HEADERS_S / 10)
            if ended.done():
                break
        assert await ended in {Ended.EOF, Ended.RESET}


async def test_empty_lines_do_not_keep_a_connection_for_ever(hasty: Gateway) -> None:
    async with connect(hasty.origin) as conn:
        await conn.send(RawRequest(method="GET", target="/livez"))
        await conn.head()
        assert [piece.data async for piece in conn.body()] == [b'{"status":"ok"}']
        await conn.send_raw(b"\r\n\r\n")
        assert await conn.ended() is Ended.EOF


async def test_a_pipelined_head_that_is_late_does_not_end_the_answer_before_it(
    hasty: Gateway,
) -> None:
    key = await hasty.key()
    async with connect(hasty.base_url) as conn:
        await conn.send(chat(key, {**ECHO, "model": "slow", "stream": True}))
        await conn.send_raw(b"GET /livez HTTP/1.1\r\n")
        await conn.head()
        said = b"".join([piece.data async for piece in conn.body()])
        assert await conn.ended() is Ended.EOF

    assert said.endswith(b"data: [DONE]\n\n")


async def test_a_large_head_is_refused_with_431(gateway: Gateway) -> None:
    key = await gateway.key()
    large = await exchange(gateway.base_url, chat(key, HELLO, [("x-large", "y" * 20_000)]))
    assert (large.status, large.json()["error"]["code"]) == (431, "headers_too_large")

    async with connect(gateway.origin) as conn:
        await conn.send_raw(b"GET /livez HTTP/1.1\r\n")
        for _ in range(10):
            await conn.send_raw(b"x-more: " + b"y" * 10_000 + b"\r\n")
        status, error = await refusal(conn)
    assert (status, error["code"]) == (431, "headers_too_large")


async def test_an_offer_to_upgrade_is_ignored(gateway: Gateway) -> None:
    """Java's HTTP client offers h2c with every request to a plain port."""
    headers = [
        ("connection", "Upgrade, HTTP2-Settings"),
        ("upgrade", "h2c"),
        ("http2-settings", "AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA"),
    ]
    key = await gateway.key()
    async with connect(gateway.base_url) as conn:
        for _ in range(2):
            await conn.send(chat(key, HELLO, headers))
            head = await conn.head()
            body = b"".join([piece.data async for piece in conn.body()])
            assert head.status == 200, body
            assert json.loads(body)["usage"]["completion_tokens"] == 32


async def test_an_upgrade_to_websockets_and_a_tunnel_are_refused(gateway: Gateway) -> None:
    offer = [("connection", "upgrade, close"), ("upgrade", "websocket")]
    request = RawRequest(method="GET", target="/v1/realtime", headers=offer)
    async with connect(gateway.origin) as conn:
        await conn.send(request)
        status, error = await refusal(conn)
    assert (status, error["code"]) == (404, "unknown_url")

    async with connect(gateway.origin) as conn:
        await conn.send_raw(b"CONNECT example.test:443 HTTP/1.1\r\nhost: example.test\r\n\r\n")
        status, error = await refusal(conn)
    assert (status, error["code"]) == (400, "invalid_request")


async def test_a_client_may_ask_to_be_told_to_go_on(gateway: Gateway) -> None:
    request = chat(await gateway.key(), HELLO, [("expect", "100-continue")])
    async with connect(gateway.base_url) as conn:
        await conn.send(request, unsent=len(request.body))
        told = await asyncio.get_running_loop().sock_recv(conn.sock, 1000)
        assert told.startswith(b"HTTP/1.1 100 ")
        await conn.send_raw(request.body)
        assert (await conn.head()).status == 200


def test_small_chunks_are_not_held_back(book_url: str, till_url: str, upstream: Upstream) -> None:
    """TCP_NODELAY on accepted sockets, with the event loop of a worker."""

    async def delays() -> set[int]:
        running = running_gateway(book_url, till_url, upstream.base_url)
        async with running as gateway, connect(gateway.origin) as conn:
            await conn.send(RawRequest(method="GET", target="/livez"))
            await conn.head()
            found = [one for one in gc.get_objects() if isinstance(one, Protocol)]
            ours = [one.transport for one in found if not one.transport.is_closing()]
            socks = [transport.get_extra_info("socket") for transport in ours]
            return {s.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for s in socks}

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(delays()) == {1}
