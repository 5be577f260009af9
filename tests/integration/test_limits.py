"""Limits that no other file is about: idle connections, slow readers, slow providers."""

import asyncio
import gc

import pytest

from config.secret import Secret
from gateway.http1.protocol import Protocol
from tests.support.gateway import (
    UPSTREAM_KEY,
    eventually,
    make_settings,
    running_gateway,
    zoo_model,
)
from tests.support.rawclient import Ended, RawRequest, Reading, chat, connect, exchange
from tests.support.upstream.launch import Upstream

KEEPALIVE_S = 1
HELLO = [{"role": "user", "content": "hello"}]


async def test_an_idle_connection_is_closed_after_its_time(
    book_url: str, till_url: str, upstream: Upstream
) -> None:
    settings = make_settings(upstream.base_url, server__keepalive_timeout_s=KEEPALIVE_S)
    running = running_gateway(book_url, till_url, upstream.base_url, settings)
    async with running as gateway, connect(gateway.origin) as conn:
        for _ in range(2):
            await conn.send(RawRequest(method="GET", target="/livez"))
            assert (await conn.head()).status == 200
            assert [piece.data async for piece in conn.body()] == [b'{"status":"ok"}']
        began = asyncio.get_running_loop().time()
        assert await conn.ended() is Ended.EOF

        assert asyncio.get_running_loop().time() - began > KEEPALIVE_S * 0.8


async def test_a_provider_may_be_given_more_time_for_its_first_byte(
    book_url: str, till_url: str, upstream: Upstream
) -> None:
    """Reasoning models think for minutes before they say anything."""
    slow = "plain:delay_ms=700"
    one = {"kind": "openai", "base_url": upstream.base_url, "key": Secret(UPSTREAM_KEY)}
    thinker = {**one, "first_byte_timeout_s": 20}
    thinks = {**zoo_model(slow), "routes": [{"provider": "thinker", "model": slow}]}
    settings = make_settings(
        upstream.base_url,
        {"slow": zoo_model(slow), "thinks": thinks},
        timeouts__upstream_first_byte_s=0.3,
        providers__thinker=thinker,
    )
    running = running_gateway(book_url, till_url, upstream.base_url, settings)
    async with running as gateway:
        key = await gateway.key()
        hasty, patient = [
            await exchange(gateway.base_url, chat(key, {"model": model, "messages": HELLO}))
            for model in ("slow", "thinks")
        ]

    assert (hasty.status, hasty.json()["error"]["code"]) == (504, "upstream_timeout")
    assert patient.status == 200


@pytest.mark.parametrize("bytes_max", [16 * 1024, 256 * 1024])
async def test_little_waits_for_a_client_that_does_not_read(
    book_url: str, till_url: str, upstream: Upstream, bytes_max: int
) -> None:
    settings = make_settings(
        upstream.base_url,
        {"long": zoo_model("plain:tokens=60000", output_tokens_max=70_000)},
        limits__stream_buffer_bytes_max=bytes_max,
        timeouts__write_stall_s=5,
    )

    def unsent() -> int:
        found = [one for one in gc.get_objects() if isinstance(one, Protocol)]
        return max(one.transport.get_write_buffer_size() for one in found if one.exchange)

    running = running_gateway(book_url, till_url, upstream.base_url, settings)
    async with running as gateway:
        key = await gateway.key()
        async with connect(gateway.base_url, reading=Reading(rcvbuf=4096)) as conn:
            payload = {"model": "long", "messages": HELLO, "stream": True}
            await conn.send(chat(key, payload))
            await conn.head()

            async def full() -> int | None:
                size = unsent()
                return size if size >= min(bytes_max, 64 * 1024) else None

            most = await eventually(full)
            for _ in range(20):
                await asyncio.sleep(0)
                most = max(most, unsent())
        await gateway.at_rest()

    # And what came in one piece with the last of it.
    assert most <= min(bytes_max, 64 * 1024) + 24 * 1024
