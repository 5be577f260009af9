"""Clients that try to get answers for nothing, or to hold up everybody else."""

import pytest

from config.settings import Settings
from tests.support.gateway import Gateway, eventually, make_settings, running_gateway, zoo_model
from tests.support.rawclient import chat, connect
from tests.support.upstream.launch import Upstream

QUEUED = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
BODY = {"model": "slow", "stream": True, "messages": [{"role": "user", "content": "hello"}]}


def slow_settings(upstream: Upstream, **more: object) -> Settings:
    models = {"slow": zoo_model("plain:tokens=200,chunk_delay_ms=5")}
    return make_settings(upstream.base_url, models, **more)


@pytest.mark.parametrize("rest", [QUEUED, b"GARBAGE\r\n\r\n", QUEUED * 3])
async def test_a_queued_request_does_not_hide_that_the_client_left(
    book_url: str, till_url: str, upstream: Upstream, rest: bytes
) -> None:
    settings = slow_settings(upstream)
    async with running_gateway(book_url, till_url, upstream.base_url, settings) as gateway:
        key = await gateway.key()
        async with connect(gateway.base_url) as conn:
            await conn.send_raw(chat(key, BODY).encode("127.0.0.1") + rest)
            head = await conn.head()
            assert head.status == 200
            got = b""
            async for piece in conn.body():
                got += piece.data
                if got.count(b'"content"') > 20:
                    break

        (receipt,) = await gateway.receipts(1)

    assert receipt["outcome"] == "client_left"
    assert receipt["price_nanos"] > 0


async def test_what_is_sent_before_the_answer_is_dropped_and_the_answer_complete(
    gateway: Gateway,
) -> None:
    body = {"model": "plain", "messages": [{"role": "user", "content": "hello"}]}
    key = await gateway.key()
    async with connect(gateway.base_url) as conn:
        await conn.send_raw(chat(key, body).encode("127.0.0.1") + QUEUED)
        head = await conn.head()
        answer = b"".join([piece.data async for piece in conn.body()])

    assert head.status == 200
    assert answer.endswith(b"}")
    (receipt,) = await gateway.receipts(1)
    assert receipt["outcome"] == "complete"


@pytest.mark.parametrize("trailers", [b"content-encoding: gzip\r\n", b"a: b\r\n" * 20_000])
async def test_trailers_are_refused_and_cost_no_memory(gateway: Gateway, trailers: bytes) -> None:
    key = await gateway.key()
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
        b"Content-Type: application/json\r\nAuthorization: Bearer %b\r\n\r\n2\r\n{}\r\n0\r\n"
    )
    async with connect(gateway.base_url) as conn:
        await conn.send_raw(head % key.encode() + trailers + b"\r\n")
        answer = await conn.head()

    assert answer.status == 400


@pytest.mark.parametrize("element", ["{}", "[]", '{"type":"text"}'])
async def test_a_swarm_of_tiny_elements_is_refused_quickly(gateway: Gateway, element: str) -> None:
    key = await gateway.key()
    swarm = ",".join([element] * (7_000_000 // (len(element) + 1)))
    body = f'{{"model":"plain","messages":[{{"role":"user","content":[{swarm}]}}]}}'.encode()
    request = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Authorization: Bearer %b\r\nContent-Length: %d\r\n\r\n" % (key.encode(), len(body))
    )
    async with connect(gateway.base_url, deadline=20) as conn:
        await conn.send_raw(request + body)
        answer = await conn.head()

    assert answer.status == 400


async def test_bodies_under_way_are_bounded_together(
    book_url: str, till_url: str, upstream: Upstream
) -> None:
    settings = slow_settings(upstream, limits__bodies_bytes_max=2_000_000)
    async with running_gateway(book_url, till_url, upstream.base_url, settings) as gateway:
        key = await gateway.key()
        request = (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Authorization: Bearer %b\r\nContent-Length: 4000000\r\n\r\n" % key.encode()
        )
        async with connect(gateway.base_url) as first, connect(gateway.base_url) as second:
            await first.send_raw(request + b" " * 1_500_000)
            await eventually(lambda: holds(gateway, 1_000_000))
            await second.send_raw(request + b" " * 1_500_000)
            answer = await second.head()

        assert answer.status == 503
        await eventually(lambda: is_empty(gateway))


async def holds(gateway: Gateway, size: int) -> bool | None:
    return gateway.services.bodies.bytes >= size or None


async def is_empty(gateway: Gateway) -> bool | None:
    return gateway.services.bodies.bytes == 0 or None


async def test_a_live_key_does_not_work_on_a_test_gateway(gateway: Gateway) -> None:
    body = {"model": "plain", "messages": [{"role": "user", "content": "hello"}]}
    statuses = []
    for kind in ("test", "live"):
        key = await gateway.key(kind=kind)
        async with connect(gateway.base_url) as conn:
            await conn.send(chat(key, body))
            statuses.append((await conn.head()).status)

    assert statuses == [200, 401]
