"""The client cuts at any byte, and handlers are cancelled at any moment: one receipt each time."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest

from gateway.http1.exchange import Exchange
from gateway.relay.call import Arrival
from gateway.relay.pipeline import chat_completions
from tests.support.gateway import zoo_model
from tests.support.rawclient import Ended, Leave, RawRequest
from tests.support.relay import Relay, Tokens, price_by_hand, zoo
from tests.support.upstream.launch import Upstream

pytestmark = pytest.mark.asyncio(loop_scope="module")

USED = "prompt=9,tokens=5"
PRICE = price_by_hand(Tokens(prompt=9, completion=5))
MIXED = [
    *(f"plain:{USED}", f"plain:chunk_delay_ms=3,{USED}", f"one-byte:{USED}", f"crlf:{USED}"),
    *(f"plain:delay_ms=15,{USED}", f"no-usage:{USED}", "cut:after=2", "error-in-200:after=2"),
    *("status:500", "plain:tokens=300", "stall-body:after=2"),
]
MODELS: dict[str, Any] = {
    **zoo(*MIXED, f"plain:{USED}", f"plain:delay_ms=300,{USED}", "stall-head"),
    **zoo(f"plain:chunk_delay_ms=60,{USED}"),
    "dead": {**zoo_model("plain"), "routes": [{"provider": "dead"}]},
}
OVERRIDES = {
    "timeouts__drain_s": 0.5,
    "timeouts__upstream_chunk_s": 1.0,
    "limits__drain_bytes_max": 20_000,
    "providers__dead": {"kind": "openai", "base_url": "http://127.0.0.1:1/v1"},
}
STREAMED = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
SEED = 20_240_601


async def at_once(calls: list[Callable[[], Awaitable[Any]]], limit: int = 16) -> list[Any]:
    slots = asyncio.Semaphore(limit)

    async def one(call: Callable[[], Awaitable[Any]]) -> Any:
        async with slots:
            return await call()

    return await asyncio.gather(*(one(call) for call in calls))


@STREAMED
async def test_a_cut_at_every_byte_of_an_answer_leaves_one_receipt_of_the_same_price(
    relay: Relay, key: str, stream: bool
) -> None:
    """Whether the client saw the end or not: the provider's word is there in time."""
    request = relay.chat(key, f"plain:{USED}", stream=stream)
    whole = await relay.send(request)
    count = min(whole.raw_bytes, 500)

    def cut(at: int) -> Callable[[], Awaitable[Any]]:
        return lambda: relay.send(request, cut_after_bytes=at, leave=list(Leave)[at % 2])

    outcomes = await at_once([cut(at) for at in range(1, count)])

    assert {outcome.ended for outcome in outcomes} == {Ended.CUT}
    receipts = await relay.receipts(key, count)
    assert {receipt["price_nanos"] for receipt in receipts} == {PRICE}
    assert {receipt["outcome"] for receipt in receipts} <= {"complete", "client_left"}
    assert await relay.spent(key) == count * PRICE


async def test_cuts_at_random_bytes_of_all_kinds_of_answers(relay: Relay, key: str) -> None:
    print(f"seed {SEED}")  # noqa: T201 - shown when it fails
    rng = random.Random(SEED)

    def cut() -> Callable[[], Awaitable[Any]]:
        more: dict[str, Any] = {"stream": rng.random() < 0.7}
        if more["stream"] and rng.random() < 0.5:
            more["stream_options"] = {"include_usage": True}
        request = relay.chat(key, rng.choice(MIXED), **more)
        at = rng.choice([None, rng.randint(1, 400), rng.randint(1, 4000), rng.randint(1, 30_000)])
        leave = rng.choice(list(Leave))
        return lambda: relay.send(request, cut_after_bytes=at, leave=leave, deadline=30)

    calls = [cut() for _ in range(150)]
    await at_once(calls, limit=24)

    receipts = await relay.receipts(key, len(calls))
    for receipt in receipts:
        tokens = Tokens(prompt=receipt["input_tokens"], completion=receipt["output_tokens"])
        assert receipt["price_nanos"] == min(price_by_hand(tokens), receipt["hold_nanos"]), receipt
        assert (receipt["outcome"] == "voided") <= (receipt["price_nanos"] == 0)
    assert sum(receipt["price_nanos"] for receipt in receipts) == await relay.spent(key)


class Line:
    """A client in this process, whose ends a test can hold up: what it reads and when it goes.

    It stands where the server's protocol is, behind a real exchange.
    """

    def __init__(self, relay: Relay, request: RawRequest, *, reads: bool = True) -> None:
        self._relay = relay
        self.loop = asyncio.get_running_loop()
        self.is_blocked = False
        self.reads = reads
        self.sent = b""
        self.is_sending = asyncio.Event()
        headers = [(name.lower().encode(), value.encode()) for name, value in request.headers]
        target = b"/v1/chat/completions"
        self.exchange = Exchange(
            self,  # type: ignore[arg-type]
            b"POST",
            target,
            headers,
            keep_alive=True,
            head_bytes=0,
        )
        self.exchange.feed(request.body or b"")
        self.exchange.feed_end()

    def write(self, data: bytes) -> None:
        self.sent += data
        self.is_sending.set()
        # Every write waits for its reader, so that there is a moment between any two.
        self.is_blocked = True
        if self.reads:
            self.loop.call_soon(self.resume)

    def resume(self) -> None:
        self.is_blocked = False
        self.exchange.wake()

    def default_lines(self) -> bytes:
        return b""

    def answered(self, exchange: Exchange) -> None:
        assert exchange is self.exchange

    async def run(self) -> None:
        await chat_completions(self._relay.services, Arrival.now(), self.exchange)


async def cancel_once(task: asyncio.Task[None]) -> None:
    task.cancel()


async def cancel_until_it_ends(task: asyncio.Task[None]) -> None:
    while not task.done():
        task.cancel()
        await asyncio.sleep(0)


CANCELS = pytest.mark.parametrize("cancel", [cancel_once, cancel_until_it_ends])


async def in_a_scope(client: Line, scopes: list[anyio.CancelScope]) -> None:
    with anyio.CancelScope() as scope:
        scopes.append(scope)
        await client.run()


@CANCELS
@pytest.mark.parametrize(
    ("model", "stream"),
    [
        (f"plain:delay_ms=300,{USED}", False),
        ("stall-head", True),
        (f"plain:chunk_delay_ms=60,{USED}", True),
    ],
)
async def test_a_handler_that_is_cancelled_settles_before_it_ends(
    relay: Relay, key: str, upstream: Upstream, cancel: Any, model: str, stream: bool
) -> None:
    client = Line(relay, relay.chat(key, model, stream=stream))
    task = asyncio.create_task(client.run())
    await asyncio.to_thread(upstream.wait, lambda stats: stats["requests"] == 1)
    if "chunk" in model:
        await client.is_sending.wait()

    await cancel(task)
    with pytest.raises(asyncio.CancelledError):
        await task

    assert not any(":h:" in name for name in await relay.left_in_till())
    receipt = await relay.only_receipt(key)
    assert (receipt["outcome"], receipt["usage_source"]) == ("client_left", "counted")
    assert 0 < receipt["input_tokens"] < 30
    tokens = Tokens(prompt=receipt["input_tokens"], completion=receipt["output_tokens"])
    assert receipt["price_nanos"] == price_by_hand(tokens)


@pytest.mark.parametrize("blocked", ["reading", "sending"])
async def test_a_cancelled_scope_settles_before_it_ends(
    relay: Relay, key: str, blocked: str
) -> None:
    """As a framework does it: the scope cancels again at every await."""
    model = f"plain:chunk_delay_ms=60,{USED}"
    client = Line(relay, relay.chat(key, model, stream=True), reads=blocked == "reading")
    scopes: list[anyio.CancelScope] = []
    task = asyncio.create_task(in_a_scope(client, scopes))
    await client.is_sending.wait()

    scopes[0].cancel()
    await task

    assert not any(":h:" in name for name in await relay.left_in_till())
    receipt = await relay.only_receipt(key)
    assert receipt["outcome"] == "client_left"
    assert 0 < receipt["price_nanos"] < PRICE * 3


@CANCELS
@STREAMED
async def test_a_cancellation_at_any_moment_leaves_one_receipt_or_none(
    relay: Relay, key: str, cancel: Any, stream: bool
) -> None:
    """Found: cancelled while the till was asked, a hold was left for good."""
    request = relay.chat(key, "echo", stream=stream)
    await Line(relay, request).run()
    turns = finished = 0
    while finished < 3:
        client = Line(relay, request)
        task = asyncio.create_task(client.run())
        for _ in range(turns):
            await asyncio.sleep(0)
        turns, finished = turns + 1, finished + task.done()
        await cancel(task)
        await asyncio.wait([task])
        assert not any(":h:" in name for name in await relay.left_in_till()), turns

    await relay.at_rest()
    query = "SELECT outcome, price_nanos, hold_nanos FROM charge_receipts"
    query += " WHERE billing_account_id = $1"
    rows = await relay.gateway.pool.fetch(query, relay.account_of(key))
    assert len(rows) <= turns + 1
    # The sweep must have met the way into the till; a stream also waits for its client.
    met = {"voided", "complete", "client_left"} if stream else {"voided", "complete"}
    assert {row["outcome"] for row in rows} == met
    assert all(row["price_nanos"] <= row["hold_nanos"] for row in rows)
    assert sum(row["price_nanos"] for row in rows) == await relay.spent(key)


async def test_who_leaves_before_a_provider_that_cannot_be_reached_pays_nothing(
    relay: Relay, key: str
) -> None:
    """Found: the prompt was charged although nothing had reached a provider."""
    client = Line(relay, relay.chat(key, "dead"))
    client.exchange.lose()
    await client.run()

    receipt = await relay.only_receipt(key)
    assert (receipt["outcome"], receipt["price_nanos"]) == ("voided", 0)
    assert client.sent == b""


async def test_a_bug_of_ours_is_charged_to_nobody(
    relay: Relay, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("gateway.relay.reply.cost_in_header", broken)
    outcome = await relay.call(key, f"plain:{USED}")

    assert outcome.status == 500
    assert outcome.json()["error"]["code"] == "internal_error"
    receipt = await relay.only_receipt(key)
    assert (receipt["outcome"], receipt["price_nanos"]) == ("upstream_failed", 0)
