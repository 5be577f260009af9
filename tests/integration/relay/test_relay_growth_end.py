"""What came together with the end of a stream's credit: usage in between, a till that leaves."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import pytest
import redis.asyncio

from billing.tokens import count_tokens
from tests.support.gateway import eventually
from tests.support.growth import (
    OVERRIDES,
    PER_OUTPUT,
    WINDOW,
    assert_clean,
    credits_of,
    finishes,
    prompt_nanos,
    reply_of,
)
from tests.support.rawclient import Outcome
from tests.support.relay import Relay, frames_of, text_of, zoo

pytestmark = pytest.mark.asyncio(loop_scope="module")
__all__ = ["OVERRIDES"]

SLOW = "plain:prompt=20,tokens=300,chunk_delay_ms=4"
BETWEEN = "usage-between:prompt=20,tokens=300,batch=10"
FOREMOST = "usage-between:after=0,prompt=20,tokens=300,batch=10"
MODELS = zoo(SLOW, BETWEEN, FOREMOST)
USAGE = {"include_usage": True}


@asynccontextmanager
async def owning(book_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection of the tables' owner."""
    conn = await asyncpg.connect(book_url)
    try:
        yield conn
    finally:
        await conn.close()


async def stream(relay: Relay, key: str, model: str) -> Outcome:
    return await relay.call(key, model, stream=True, stream_options=USAGE)


def can_pay(model: str, tokens: int) -> str:
    """Credits for the hold of this prompt and so many output tokens."""
    prompt = prompt_nanos(model, stream=True, stream_options=USAGE)
    return credits_of(prompt + tokens * PER_OUTPUT)


@pytest.mark.parametrize("model", [BETWEEN, FOREMOST])
async def test_text_behind_a_usage_frame_is_charged_only_when_it_is_delivered(
    relay: Relay, model: str, valkey_url: str
) -> None:
    """Found: what came behind it was thrown away, and charged instead of what was cut."""
    key = await relay.key(can_pay(model, 80))
    frames = frames_of(await stream(relay, key, model))
    receipt = await relay.only_receipt(key)

    assert finishes(frames) == {0: "length"}
    assert receipt["output_tokens"] == count_tokens(text_of(frames)) > 50
    assert receipt["outcome"] == "credit_exhausted"
    await assert_clean(relay, valkey_url)


async def test_a_till_that_goes_away_behind_a_refusal_does_not_break_the_stream(
    relay: Relay, valkey_url: str
) -> None:
    """Found: the refusal is asked about in the book, and its answer met a till without a word."""
    key = await relay.key(can_pay(SLOW, WINDOW + 10))
    client = redis.asyncio.from_url(valkey_url)
    answer = asyncio.ensure_future(stream(relay, key, SLOW))
    await reply_of(relay)
    reading = "SELECT count(*) FROM pg_locks WHERE NOT granted"
    # The role that serves may not lock a table.
    async with owning(relay.gateway.book_url) as conn, conn.transaction():
        await conn.execute("LOCK TABLE billing_accounts IN ACCESS EXCLUSIVE MODE")

        async def is_asked() -> bool | None:
            return await conn.fetchval(reading) or None

        await eventually(is_asked)
        await client.execute_command("CLIENT", "PAUSE", 2500, "ALL")
    outcome = await answer
    await client.aclose()

    assert finishes(frames_of(outcome)).keys() == {0}
    await assert_clean(relay, valkey_url)
