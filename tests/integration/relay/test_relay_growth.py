"""Streams hold a window of their output, grow, and stop at the end of what can be paid."""

import asyncio
from typing import Any

import openai
import pytest
import redis.asyncio

from billing.book import grant
from billing.tokens import count_tokens
from gateway.relay.growth import Growth
from tests.support.gateway import eventually
from tests.support.growth import (
    OVERRIDES,
    PER_INPUT,
    PER_OUTPUT,
    WINDOW,
    assert_clean,
    balance,
    credits_of,
    finishes,
    prompt_nanos,
    reply_of,
)
from tests.support.rawclient import Outcome, connect
from tests.support.relay import (
    Relay,
    Tokens,
    frames_of,
    price_by_hand,
    public_id,
    text_of,
    zoo,
)
from tests.support.upstream.launch import Upstream

pytestmark = pytest.mark.asyncio(loop_scope="module")
__all__ = ["OVERRIDES"]

SLOW = "plain:prompt=20,tokens=300,chunk_delay_ms=4"
SLOWER = "plain:prompt=20,tokens=60,chunk_delay_ms=50"
FAST = "plain:prompt=20,tokens=4000,batch=100,chunk_delay_ms=1"
RUSH = "plain:prompt=20,tokens=3000,chunk_delay_ms=0"
UNSEEN = "plain:prompt=20,tokens=10,reasoning=300,chunk_delay_ms=1"
WHOLE = "json-for-sse:prompt=20,tokens=300"
ONE_BYTE = "one-byte:prompt=20,tokens=130"
HUGE = "big-frame:prompt=20,bytes=1000000"
LONG = "plain:prompt=20,tokens=300,batch=300"
MODELS = zoo(SLOW, SLOWER, UNSEEN, WHOLE, LONG) | zoo(FAST, RUSH, ONE_BYTE, output_tokens_max=4000)
MODELS |= zoo(HUGE, output_tokens_max=400_000)
MODELS |= {"at-once": {**MODELS[public_id(SLOW)], "stream_window_tokens": 0}}
USAGE = {"include_usage": True}


async def stream(relay: Relay, key: str, model: str, **fields: Any) -> Outcome:
    return await relay.call(key, model, stream=True, stream_options=USAGE, **fields)


def can_pay(model: str, tokens: int, **fields: Any) -> str:
    """Credits for the hold of this prompt and so many output tokens."""
    prompt = prompt_nanos(model, stream=True, stream_options=USAGE, **fields)
    return credits_of(prompt + tokens * PER_OUTPUT)


async def test_a_stream_begins_with_a_window_and_holds_no_more_than_it_may_cost(
    relay: Relay, key: str, valkey_url: str
) -> None:
    answer = asyncio.ensure_future(stream(relay, key, SLOW))
    reply = await reply_of(relay)
    call, prompt = reply.call, prompt_nanos(SLOW, stream=True, stream_options=USAGE)
    client = redis.asyncio.from_url(valkey_url)
    name = f"{call.caller.scopes.hold_prefix}{call.request_id}"
    held = int(await client.hget(name, "nanos") or 0)
    await answer

    assert held == prompt + WINDOW * PER_OUTPUT
    assert call.hold_max_nanos == prompt + 500 * PER_OUTPUT
    receipt = await relay.only_receipt(key)
    assert receipt["outcome"] == "complete"
    assert receipt["price_nanos"] == price_by_hand(Tokens(prompt=20, completion=300))
    assert receipt["price_nanos"] <= receipt["hold_nanos"] < call.hold_max_nanos
    await client.aclose()
    await assert_clean(relay, valkey_url)


async def test_a_stream_that_is_slow_enough_grows_by_its_renewals(
    relay: Relay, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    async def never(*args: object) -> None:
        asked.append(args)

    monkeypatch.setattr("gateway.relay.growth.ask", never)
    answer = asyncio.ensure_future(stream(relay, key, SLOWER))
    reply = await reply_of(relay)
    first = reply.call.hold_nanos
    await answer

    assert reply.call.hold_nanos >= first + WINDOW // 2 * PER_OUTPUT
    assert asked == []


@pytest.mark.parametrize(("model", "is_streamed"), [(SLOW, False), ("at-once", True)])
async def test_what_cannot_be_stopped_or_thinks_unseen_holds_everything_at_once(
    relay: Relay, key: str, model: str, is_streamed: bool
) -> None:
    fields: dict[str, Any] = {"stream": True} if is_streamed else {}
    await relay.call(key, model, **fields)

    receipt = await relay.only_receipt(key)
    assert receipt["hold_nanos"] == prompt_nanos(model, **fields) + 500 * PER_OUTPUT


async def test_a_stream_that_may_write_less_than_a_window_is_never_looked_at(
    relay: Relay, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    glances: list[object] = []
    glance = Growth.glance

    def noted(growth: Growth) -> bool:
        glances.append(growth)
        return glance(growth)

    monkeypatch.setattr(Growth, "glance", noted)
    await stream(relay, key, SLOW, max_tokens=WINDOW)
    seen = len(glances)
    await stream(relay, key, SLOW, max_tokens=WINDOW + 1)

    assert seen == 0 < len(glances)
    whole, _ = await relay.receipts(key, 2)
    fields = {"stream": True, "stream_options": USAGE, "max_tokens": WINDOW}
    assert whole["hold_nanos"] == prompt_nanos(SLOW, **fields) + WINDOW * PER_OUTPUT


@pytest.mark.parametrize("model", [FAST, RUSH, SLOW, LONG])
async def test_fast_and_slow_streams_grow_as_often_as_they_need(
    relay: Relay, key: str, model: str, valkey_url: str
) -> None:
    count = int(model.split("tokens=")[1].split(",", maxsplit=1)[0])

    outcome = await stream(relay, key, model)

    frames = frames_of(outcome)
    assert finishes(frames) == {0: "stop"}
    assert len(text_of(frames).split()) == count
    receipt = await relay.only_receipt(key)
    assert receipt["outcome"] == "complete"
    assert receipt["price_nanos"] == price_by_hand(Tokens(prompt=20, completion=count))
    assert receipt["overrun_nanos"] == 0
    await assert_clean(relay, valkey_url)


@pytest.mark.parametrize("asked", [True, False], ids=["usage", "no usage"])
@pytest.mark.parametrize("model", [FAST, RUSH, SLOW, ONE_BYTE])
async def test_at_the_end_of_the_credit_a_stream_ends_as_one_that_reached_its_length(
    relay: Relay, model: str, asked: bool, valkey_url: str, upstream: Upstream
) -> None:
    key = await relay.key(can_pay(model, 80))
    options = {"stream_options": USAGE} if asked else {}
    outcome = await relay.call(key, model, stream=True, **options)
    receipt = await relay.only_receipt(key)

    frames = frames_of(outcome)
    assert finishes(frames) == {0: "length"}
    assert {frame["id"] for frame in frames} == {frames[0]["id"]}
    assert {frame["model"] for frame in frames} == {frames[0]["model"]}
    assert (receipt["outcome"], receipt["usage_source"]) == ("credit_exhausted", "counted")
    delivered = count_tokens(text_of(frames))
    assert receipt["output_tokens"] == delivered
    told = [frame["usage"] for frame in frames if frame.get("usage")]
    assert len(told) == asked
    if asked:
        assert told[0]["completion_tokens"] == delivered
        assert told[0]["cost_nanos"] == receipt["price_nanos"]
    # What was delivered is paid for, and of what could be paid hardly anything is left: what the
    # bound of the prompt is above its tokens, and less than one chunk.
    assert receipt["overrun_nanos"] == 0
    assert receipt["price_nanos"] <= receipt["hold_nanos"]
    chunk = 100 if model == FAST else 1
    assert 0 <= await balance(relay, key) <= (40 + chunk) * PER_OUTPUT
    upstream.wait(lambda stats: stats["in_flight"] == 0)
    await assert_clean(relay, valkey_url)


async def test_of_a_chunk_that_cannot_be_paid_nothing_is_delivered_or_charged(
    relay: Relay, valkey_url: str
) -> None:
    key = await relay.key(can_pay(LONG, 80))
    frames = frames_of(await stream(relay, key, LONG))
    receipt = await relay.only_receipt(key)

    assert finishes(frames) == {0: "length"}
    assert text_of(frames) == ""
    assert receipt["output_tokens"] == 0
    assert receipt["price_nanos"] == receipt["input_tokens"] * PER_INPUT
    await assert_clean(relay, valkey_url)


async def test_a_frame_that_is_too_long_to_be_held_back_is_not_begun(
    relay: Relay, valkey_url: str
) -> None:
    key = await relay.key(can_pay(HUGE, 80))
    frames = frames_of(await stream(relay, key, HUGE))
    receipt = await relay.only_receipt(key)

    assert finishes(frames) == {0: "length"}
    assert text_of(frames) == ""
    assert receipt["output_tokens"] == 0
    assert receipt["outcome"] == "credit_exhausted"
    await assert_clean(relay, valkey_url)


async def test_each_choice_that_is_cut_off_is_told_so(relay: Relay, valkey_url: str) -> None:
    key = await relay.key(can_pay(SLOW, 2 * WINDOW + 30, n=2))
    frames = frames_of(await stream(relay, key, SLOW, n=2))
    receipt = await relay.only_receipt(key)

    assert finishes(frames) == {0: "length", 1: "length"}
    assert receipt["outcome"] == "credit_exhausted"
    assert 2 * WINDOW < receipt["output_tokens"] <= 2 * WINDOW + 80
    assert receipt["price_nanos"] <= receipt["hold_nanos"]
    await assert_clean(relay, valkey_url)


async def test_several_choices_grow_together(relay: Relay, key: str) -> None:
    frames = frames_of(await stream(relay, key, SLOW, n=2))
    receipt = await relay.only_receipt(key)

    assert finishes(frames) == {0: "stop", 1: "stop"}
    assert receipt["price_nanos"] == price_by_hand(Tokens(prompt=20, completion=600))


async def test_streams_that_compete_for_the_last_credit_all_end_properly(
    relay: Relay, valkey_url: str
) -> None:
    prompt = prompt_nanos(SLOW, stream=True, stream_options=USAGE)
    key = await relay.key(credits_of(3 * prompt + 500 * PER_OUTPUT))
    outcomes = await asyncio.gather(*(stream(relay, key, SLOW) for _ in range(3)))
    receipts = await relay.receipts(key, 3)

    assert {receipt["outcome"] for receipt in receipts} <= {"complete", "credit_exhausted"}
    assert any(receipt["outcome"] == "credit_exhausted" for receipt in receipts)
    for outcome in outcomes:
        assert finishes(frames_of(outcome)).keys() == {0}
    assert 0 <= await balance(relay, key) <= 60 * 3 * PER_OUTPUT
    assert all(receipt["price_nanos"] <= receipt["hold_nanos"] for receipt in receipts)
    await assert_clean(relay, valkey_url)


async def test_a_client_that_leaves_a_growing_stream_pays_what_came(
    relay: Relay, key: str, valkey_url: str
) -> None:
    async with connect(relay.gateway.origin) as conn:
        await conn.send(relay.chat(key, SLOW, stream=True))
        await conn.head()
        reply = await reply_of(relay)
        first = reply.call.hold_nanos
        async for _ in conn.body():
            if reply.call.hold_nanos > first:
                break
    receipt = await relay.only_receipt(key)

    assert receipt["outcome"] == "client_left"
    assert 0 < receipt["price_nanos"] <= receipt["hold_nanos"]
    await assert_clean(relay, valkey_url)


async def test_a_till_that_is_emptied_does_not_end_a_growing_stream(
    relay: Relay, key: str, valkey_url: str
) -> None:
    client = redis.asyncio.from_url(valkey_url)
    answer = asyncio.ensure_future(stream(relay, key, SLOW))
    reply = await reply_of(relay)
    first = reply.call.hold_nanos

    async def has_grown() -> bool | None:
        return reply.call.hold_nanos > first or None

    await eventually(has_grown)
    await client.flushall()
    frames = frames_of(await answer)
    await client.aclose()

    assert finishes(frames) == {0: "stop"}
    receipt = await relay.only_receipt(key)
    assert receipt["price_nanos"] == price_by_hand(Tokens(prompt=20, completion=300))
    await assert_clean(relay, valkey_url)


async def test_credit_that_comes_in_meanwhile_is_found_in_the_book(
    relay: Relay, valkey_url: str
) -> None:
    """The till was not told of it."""
    key = await relay.key(can_pay(SLOW, WINDOW + 10))
    answer = asyncio.ensure_future(stream(relay, key, SLOW))
    await reply_of(relay)
    async with relay.gateway.pool.acquire() as conn:
        await grant(conn, relay.account_of(key), 10**9, f"g_{key[-8:]}", "test")
    frames = frames_of(await answer)

    assert finishes(frames) == {0: "stop"}
    await assert_clean(relay, valkey_url)


@pytest.mark.parametrize(
    ("model", "tokens"),
    [
        (UNSEEN, Tokens(prompt=20, completion=310, reasoning=300)),
        (WHOLE, Tokens(prompt=20, completion=300)),
    ],
)
async def test_what_was_not_seen_growing_is_held_for_at_the_end(
    relay: Relay, key: str, model: str, tokens: Tokens, valkey_url: str
) -> None:
    await stream(relay, key, model)
    receipt = await relay.only_receipt(key)

    assert receipt["price_nanos"] == price_by_hand(tokens) == receipt["hold_nanos"]
    assert receipt["overrun_nanos"] == 0
    await assert_clean(relay, valkey_url)


async def test_what_cannot_be_paid_at_the_end_is_the_operators(
    relay: Relay, valkey_url: str
) -> None:
    key = await relay.key(can_pay(UNSEEN, 100))
    await stream(relay, key, UNSEEN)
    receipt = await relay.only_receipt(key)

    price = price_by_hand(Tokens(prompt=20, completion=310, reasoning=300))
    assert receipt["outcome"] == "complete"
    assert receipt["price_nanos"] == receipt["hold_nanos"]
    assert receipt["overrun_nanos"] == price - receipt["price_nanos"] > 0
    assert await balance(relay, key) == 0
    await assert_clean(relay, valkey_url)


async def test_a_call_whose_price_fits_asks_the_till_for_nothing(
    relay: Relay, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(relay.services.till, "renew", lambda *args: asked.append(args))
    await relay.call(key, SLOW, max_tokens=20)
    await relay.call(key, FAST, stream=True, max_tokens=WINDOW)
    await relay.receipts(key, 2)

    assert asked == []


async def test_the_openai_client_sees_a_normal_end(relay: Relay, valkey_url: str) -> None:
    key = await relay.key(can_pay(SLOW, 100))
    async with openai.AsyncOpenAI(base_url=relay.gateway.base_url, api_key=key) as client:
        chunks = await client.chat.completions.create(
            model=public_id(SLOW),
            messages=[{"role": "user", "content": "Where does this line end?"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        seen = [chunk async for chunk in chunks]

    *_, cut, last = seen
    assert [choice.finish_reason for choice in cut.choices] == ["length"]
    assert last.usage is not None
    receipt = await relay.only_receipt(key)
    assert last.usage.completion_tokens == receipt["output_tokens"] >= 100
    assert receipt["outcome"] == "credit_exhausted"
    await assert_clean(relay, valkey_url)
