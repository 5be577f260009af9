"""Providers that speak HTTP in ways the upstream process does not: bytes written by the test."""

import asyncio
import json
import zlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.support.gateway import make_settings, zoo_model
from tests.support.relay import Relay, Tokens, error_of, frames_of, price_by_hand, running_relay
from tests.support.upstream.launch import Upstream

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODELS: dict[str, Any] = {"odd": {**zoo_model("odd"), "routes": [{"provider": "odd"}]}}
USAGE = b'{"prompt_tokens":9,"completion_tokens":5}'
PRICE = price_by_hand(Tokens(prompt=9, completion=5))
TEXT = b'data: {"id":"c","model":"m","choices":[{"delta":{"content":"hi"}}]}\n\n'
LAST = b'data: {"id":"c","model":"m","choices":[],"usage":%b}\n\n' % USAGE
BODY = b'{"id":"c","model":"m","choices":[{"message":{"content":"hi"}}],"usage":%b}' % USAGE
DONE = b"data: [DONE]\n\n"


class Odd:
    """Answers each request with the parts of its script; a number is a pause, None hangs up."""

    def __init__(self) -> None:
        self.script: list[bytes | float | None] = []
        self.connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                lines = head.lower().split(b"\r\n")
                (length,) = [ln for ln in lines if ln.startswith(b"content-length")]
                await reader.readexactly(int(length.split(b":")[1]))
                for part in self.script:
                    if part is None:
                        return
                    if isinstance(part, bytes):
                        writer.write(part)
                        await writer.drain()
                    else:
                        await asyncio.sleep(part)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


def head(kind: str = "text/event-stream", *more: bytes, status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}".encode(), f"content-type: {kind}".encode(), *more]
    return b"\r\n".join(lines) + b"\r\n"


def chunked(*parts: bytes) -> bytes:
    framed = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
    return b"transfer-encoding: chunked\r\n\r\n" + framed


def sized(body: bytes) -> bytes:
    return b"content-length: %d\r\n\r\n%b" % (len(body), body)


END = b"0\r\n\r\n"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def odd() -> AsyncIterator[Odd]:
    yield Odd()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def relay_of_module(
    template_url: str, valkey_url: str, upstream_process: Upstream, odd: Odd
) -> AsyncIterator[Relay]:
    server = await asyncio.start_server(odd.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}/v1/"
    settings = make_settings(
        upstream_process.base_url,
        MODELS,
        providers__odd={"kind": "openai", "base_url": url},
        limits__response_bytes_max=3_000_000,
        timeouts__upstream_chunk_s=1.0,
    )
    async with running_relay(
        template_url, valkey_url, upstream_process.base_url, settings, "t_odd"
    ) as relay:
        yield relay
    server.close()


async def test_the_end_of_a_stream_may_come_apart_from_done(
    relay: Relay, key: str, odd: Odd
) -> None:
    """Found: such a connection was closed instead of being used again (uvicorn sends like this)."""
    odd.script = [head() + chunked(TEXT, LAST, DONE), 0.01, END]
    before = odd.connections
    for _ in range(4):
        outcome = await relay.call(key, "odd", stream=True)
        assert len(frames_of(outcome)) == 1
        await relay.at_rest()

    assert odd.connections <= before + 1
    assert {row["price_nanos"] for row in await relay.receipts(key, 4)} == {PRICE}


async def test_a_stream_that_stalls_after_done_is_over_for_the_client(
    relay: Relay, key: str, odd: Odd
) -> None:
    odd.script = [head() + chunked(TEXT, LAST, DONE), 1.0, None]
    outcome = await relay.call(key, "odd", stream=True)

    assert outcome.pieces[-1].at - outcome.sent_at < 0.5
    receipt = await relay.only_receipt(key)
    assert (receipt["outcome"], receipt["price_nanos"]) == ("complete", PRICE)


async def test_a_stream_that_breaks_off_after_its_usage_is_complete(
    relay: Relay, key: str, odd: Odd
) -> None:
    odd.script = [head() + chunked(TEXT, LAST), None]
    options = {"include_usage": True}
    outcome = await relay.call(key, "odd", stream=True, stream_options=options)

    assert frames_of(outcome)[-1]["usage"]["cost_nanos"] == PRICE
    receipt = await relay.only_receipt(key)
    assert (receipt["outcome"], receipt["price_nanos"]) == ("complete", PRICE)


@pytest.mark.parametrize("extra", [b"\n", b"\r\n", b"\n\n", b"\r\n\r\n"])
async def test_empty_lines_too_many_do_no_harm(
    relay: Relay, key: str, odd: Odd, extra: bytes
) -> None:
    """Found: an assertion failed, and the stream with it."""
    odd.script = [head() + chunked(TEXT + extra, LAST + extra + DONE) + END]
    outcome = await relay.call(key, "odd", stream=True)

    assert len(frames_of(outcome)) == 1
    assert (await relay.only_receipt(key))["price_nanos"] == PRICE


async def test_usage_over_several_lines_is_found_and_replaced(
    relay: Relay, key: str, odd: Odd
) -> None:
    """Found: an assertion failed, and the stream with it."""
    pretty = json.dumps({"choices": [], "usage": {**json.loads(USAGE), "cost": 0.000029}}, indent=1)
    lines = "".join(f"data: {line}\n" for line in pretty.splitlines())
    odd.script = [head() + chunked(TEXT, lines.encode() + b"\n", DONE) + END]
    options = {"include_usage": True}
    outcome = await relay.call(key, "odd", stream=True, stream_options=options)

    usage = frames_of(outcome)[-1]["usage"]
    assert usage["cost_nanos"] == PRICE == (await relay.only_receipt(key))["price_nanos"]
    assert usage["cost"] == 0.000058


@pytest.mark.parametrize(
    "script",
    [
        [head() + chunked(TEXT), 0.05, b"zz\r\nnonsense"],
        [head() + chunked(TEXT) + b"5\r\nab", None],
        [head() + chunked(TEXT), None],
    ],
)
async def test_bad_framing_in_a_stream_is_a_failure_of_the_provider(
    relay: Relay, key: str, odd: Odd, script: list[bytes | float | None]
) -> None:
    odd.script = [*script]
    outcome = await relay.call(key, "odd", stream=True)
    receipt = await relay.only_receipt(key)

    assert "error" in json.loads(outcome.frames()[-2])
    assert receipt["outcome"] == "upstream_failed"
    assert receipt["output_tokens"] == 1


@pytest.mark.parametrize(
    "script",
    [
        [b"nonsense\r\n\r\n", None],
        [b"HTTP/1.1 99999 X\r\n\r\n", None],
        [head("application/json", b"transfer-encoding: chunked") + b"\r\nzz\r\n", None],
        [head("application/json", b"content-length: 500") + b"\r\n{", None],
        [head("application/json", b"content-encoding: gzip") + sized(BODY)],
        [head("application/json", b"content-encoding: gzip") + sized(zlib.compress(BODY)[:-6])],
        [head("application/json") + sized(b" " * 3_000_001)],
        [head("text/event-stream") + sized(b"")],
        [head("text/event-stream") + sized(b": only a comment")],
        [head("text/event-stream") + sized(b"<html>")],
        [head("text/event-stream") + sized(b'{"error":{"message":"x"}}')],
        [head("text/event-stream") + sized(b'data: {"choi')],
        [head("application/json") + sized(b"")],
        [head("application/json") + sized(b'{"object":"list"}')],
    ],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_nonsense_is_a_failure_of_the_provider_and_free(
    relay: Relay, key: str, odd: Odd, script: list[bytes | None], stream: bool
) -> None:
    odd.script = [*script]
    outcome = await relay.call(key, "odd", stream=stream)
    receipt = await relay.only_receipt(key)

    if outcome.status == 200:  # a comment went out before
        assert "error" in json.loads(outcome.frames()[-2])
    else:
        assert (outcome.status, error_of(outcome)["code"]) == (502, "upstream_error")
    assert (receipt["outcome"], receipt["price_nanos"]) == ("upstream_failed", 0)


async def test_headers_that_are_no_text_do_no_harm(relay: Relay, key: str, odd: Odd) -> None:
    """Found: the receipt could not be written, and the hold was never ended."""
    odd.script = [head("application/json", b"x-request-id: \xff\xfe", b"x-y: \x80") + sized(BODY)]
    outcome = await relay.call(key, "odd")

    assert outcome.status == 200
    receipt = await relay.only_receipt(key)
    assert (receipt["upstream_request_id"], receipt["price_nanos"]) == ("", PRICE)


async def test_names_that_are_no_text_do_no_harm(relay: Relay, key: str, odd: Odd) -> None:
    body = BODY.replace(b'"m"', b'"m\\u0000\xff"').replace(b'"c"', b'["\xff"]')
    odd.script = [head("application/json") + sized(body)]
    outcome = await relay.call(key, "odd")

    assert outcome.status == 200
    receipt = await relay.only_receipt(key)
    assert (receipt["served_model"], receipt["price_nanos"]) == ("", PRICE)


@pytest.mark.parametrize("body", [BODY, b"\n \n" + BODY + b"\n"])
@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=utf-8", "x/y"])
async def test_a_body_is_a_body_whatever_it_is_called(
    relay: Relay, key: str, odd: Odd, body: bytes, kind: str
) -> None:
    odd.script = [head(kind) + sized(body)]
    outcome = await relay.call(key, "odd")

    assert outcome.json()["usage"]["cost_nanos"] == PRICE
    assert (await relay.only_receipt(key))["price_nanos"] == PRICE


async def test_a_stream_by_another_spelling_is_a_stream(relay: Relay, key: str, odd: Odd) -> None:
    odd.script = [head("Text/Event-Stream;charset=UTF-8") + chunked(TEXT, LAST, DONE) + END]
    outcome = await relay.call(key, "odd", stream=True)

    assert len(frames_of(outcome)) == 1
    await relay.receipts(key, 1)


async def test_a_compressed_body_may_inflate_a_lot(relay: Relay, key: str, odd: Odd) -> None:
    """Found: a body that gzip made twenty times smaller was taken for a bomb."""
    body = BODY.replace(b"hi", b"hi" * 1_200_000)
    packed = zlib.compress(body)
    odd.script = [head("application/json", b"content-encoding: deflate") + sized(packed)]
    outcome = await relay.call(key, "odd")

    assert len(outcome.json()["choices"][0]["message"]["content"]) == 2_400_000
    await relay.receipts(key, 1)


async def test_a_bomb_is_stopped_at_the_bound(relay: Relay, key: str, odd: Odd) -> None:
    packed = zlib.compress(b" " * 50_000_000)
    odd.script = [head("application/json", b"content-encoding: gzip") + sized(packed)]
    outcome = await relay.call(key, "odd")

    assert error_of(outcome)["code"] == "upstream_error"
    assert (await relay.only_receipt(key))["price_nanos"] == 0
