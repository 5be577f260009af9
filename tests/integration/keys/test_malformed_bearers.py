"""10,000 bearer strings that are no key of ours: 401, one shape, and not a word to the stores."""

import asyncio
import json
import random
import re
import string
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import redis.asyncio

from gateway.errors import to_api_error
from keys.api_key import BASE62, checksum, generate
from keys.errors import CredentialMissing, KeyInvalid, KeyMalformed
from tests.support.gateway import Gateway
from tests.support.rawclient import Head, RawRequest, connect

SEED, COUNT = 20_251_125, 10_000
HTTP_EVERY = 10
GOOD = generate("test").secret
BY_HAND = [
    b"",
    b" ",
    b"fb_test_",
    b"' OR '1'='1",
    b"'; DROP TABLE app_api_keys; --",
    b"fb_test_' UNION SELECT digest FROM app_api_keys --",
    b"x\r\nx-injected: yes",
    b"fb_test_\r\n\r\nGET /metrics HTTP/1.1",
    b"fb_test_" + b"\x00" * 38,
    b"\x00",
    b"\xff\xfe\xfd",
    "fb_test_\u0661\u0662\u0663".encode(),
    "\uff46\uff42_test_".encode() + b"A" * 38,
    "fb_test_".encode("utf-16"),
    b"fb_test_" + b"A" * 100_000,
    b"A" * 1_000_000,
    b"{{7*7}}${7*7}<%= 7*7 %>",
    b"../../../../etc/passwd",
    b"Bearer " + GOOD.encode(),
    GOOD.encode() + b"\x00",
    GOOD.encode() + b" " + GOOD.encode(),
    GOOD[:-1].encode(),
    GOOD.encode() + b"A",
    GOOD.upper().encode(),
    GOOD.replace("_test_", "_live_").encode(),
    GOOD.replace("_test_", "_op_").encode(),
    generate("op").secret.encode(),
    b"sk-or-v1-" + b"0" * 64,
    b"eyJhbGciOiJub25lIn0.eyJzdWIiOiJhZG1pbiJ9.",
]
SENDABLE = re.compile(rb"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?")


def bearers() -> Iterator[bytes]:
    """Those by hand, then what looks ever less like a key, drawn from one seed."""
    draw = random.Random(SEED)
    yield from BY_HAND
    for number in range(COUNT - len(BY_HAND)):
        yield _drawn(draw, number % 5)


def _drawn(draw: random.Random, kind: int) -> bytes:
    body = "".join(draw.choices(BASE62, k=32))
    start = f"fb_test_{body}"
    if kind == 0:  # one wrong character of the checksum
        right = checksum(start.encode())
        at = draw.randrange(6)
        wrong = draw.choice([each for each in BASE62 if each != right[at]])
        return f"{start}{right[:at]}{wrong}{right[at + 1 :]}".encode()
    if kind == 1:  # one wrong character before it
        at = draw.randrange(len(start))
        wrong = draw.choice([c for c in string.printable if c.isascii() and c != start[at]])
        return (start[:at] + wrong + start[at + 1 :] + checksum(start.encode())).encode()
    if kind == 2:  # cut off, or too long
        text = (start + checksum(start.encode())) * 3
        length = draw.choice([n for n in range(100) if n != 46])
        return text[:length].encode()
    if kind == 3:
        return draw.randbytes(draw.randrange(1, 200))
    return "".join(chr(draw.randrange(0x20, 0xD7FF)) for _ in range(draw.randrange(1, 60))).encode()


@asynccontextmanager
async def silent_stores(gateway: Gateway, till_url: str) -> AsyncIterator[list[str]]:
    """What the stores were asked about credentials or holds meanwhile; must stay empty."""
    asked: list[str] = []
    pool = gateway.pool
    connections = [await pool.acquire() for _ in range(pool.get_max_size())]
    for conn in connections:
        conn.add_query_logger(lambda record: asked.append(record.query))
        await pool.release(conn)
    till = redis.asyncio.from_url(till_url)
    before = await scripts_run(till)
    try:
        yield asked
    finally:
        await pool.fetchval("SELECT 1")  # query loggers speak one turn of the loop later
        asked[:] = [query for query in asked if "_keys" in query]
        asked += ["script"] * (await scripts_run(till) - before)
        await till.aclose()


async def scripts_run(till: Any) -> int:
    stats = await till.info("commandstats")
    return int(stats.get("cmdstat_evalsha", {"calls": 0})["calls"])


async def test_each_is_refused_before_anything_is_asked(gateway: Gateway, till_url: str) -> None:
    door, slowest = gateway.services.authenticator, 0.0
    shapes = set()
    async with silent_stores(gateway, till_url) as asked:
        for bearer in bearers():
            began = time.thread_time()
            with pytest.raises((KeyMalformed, CredentialMissing)) as caught:
                await door.authenticate({b"authorization": b"Bearer " + bearer})
            slowest = max(slowest, time.thread_time() - began)
            error = to_api_error(caught.value)
            shapes.add((error.status, error.code, error.message, error.kind, error.headers))
        assert not door._strangers.under_way
        assert not door._entries

    assert asked == []
    assert {shape[:2] for shape in shapes} == {(401, "key_malformed")}
    assert len(shapes) == 1
    assert slowest < 0.02  # of this thread; most of it is the garbage collector's


async def test_over_http_all_answers_have_one_shape(gateway: Gateway, till_url: str) -> None:
    """What a server's parser lets through; the rest never gets as far as a credential."""
    sample = [b for b in BY_HAND if SENDABLE.fullmatch(b) and len(b) < 10_000]
    sample += [b for b in [*bearers()][::HTTP_EVERY] if SENDABLE.fullmatch(b)]
    shapes: dict[Any, bytes] = {}
    async with silent_stores(gateway, till_url) as asked:
        for target, method in (("/v1/chat/completions", "POST"), ("/v1/models", "GET")):
            for at in range(0, len(sample), 100):
                part = sample[at : at + 100]
                found = await shapes_of(gateway, method, target, part)
                shapes |= dict(zip(found, part, strict=True))

    assert len(sample) > 400
    assert asked == []
    assert len(shapes) == 1, shapes
    ((status, code, *_),) = shapes
    assert (status, code) == (401, "key_malformed")


async def shapes_of(
    gateway: Gateway, method: str, target: str, part: list[bytes]
) -> list[tuple[Any, ...]]:
    """On one connection, one after the other."""
    shapes = []
    async with connect(gateway.origin) as connection:
        for bearer in part:
            headers = [("authorization", f"Bearer {bearer.decode()}")]
            await connection.send(RawRequest(method=method, target=target, headers=headers))
            head = await connection.head()
            body = b"".join([piece.data async for piece in connection.body()])
            shapes.append(shape_of(head, body))
    return shapes


def shape_of(head: Head, body: bytes) -> tuple[Any, ...]:
    """All of an answer but its ids and times."""
    error = json.loads(body)["error"]
    error.pop("request_id")
    varying = {"x-request-id", "x-farebox-overhead-ms"}
    headers = tuple((n, v) for n, v in head.headers if n not in varying)
    return head.status, error["code"], json.dumps(error, sort_keys=True), headers


async def test_a_well_formed_one_is_looked_up(gateway: Gateway, till_url: str) -> None:
    """So silence above means something."""
    async with silent_stores(gateway, till_url) as asked:
        with pytest.raises(KeyInvalid):
            await gateway.services.authenticator.authenticate({b"x-api-key": GOOD.encode()})

    assert len(asked) == 1


async def test_a_valid_key_still_gets_in_after_all_of_them(gateway: Gateway) -> None:
    key = (await gateway.key()).encode()
    door = gateway.services.authenticator
    answers = await asyncio.gather(
        *(door.authenticate({b"authorization": b"Bearer " + b}) for b in [*BY_HAND, key]),
        return_exceptions=True,
    )

    refused = [answer for answer in answers if isinstance(answer, Exception)]
    assert len(refused) == len(BY_HAND)
