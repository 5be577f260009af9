"""The client leaves: exactly one receipt, settled before the handler ends, at the right price.

After each test nothing is left: no open call, no hold in the till, no background task.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import psutil
import pytest

from billing.tokens import count_tokens
from gateway.protocols.chat import prompt_text, read_facts
from tests.support.gateway import eventually, zoo_model
from tests.support.rawclient import Leave, RawConnection, RawRequest, Reading, connect
from tests.support.relay import Relay, Tokens, price_by_hand, zoo
from tests.support.upstream.launch import Upstream

pytestmark = pytest.mark.asyncio(loop_scope="module")

USED = "prompt=9,tokens=5"
PRICE = price_by_hand(Tokens(prompt=9, completion=5))
LATE = f"plain:delay_ms=300,{USED}"
SLOW = f"plain:chunk_delay_ms=60,{USED}"
ENDLESS = "endless:chunk_delay_ms=2"
LONG = "plain:prompt=9,tokens=30000"
MODELS: dict[str, Any] = {
    **zoo(LATE, SLOW, ENDLESS, "stall-head", "stall-body", "stall-body:after=3"),
    **zoo("status:500,delay_ms=300", "refuse-close:delay_ms=300", f"plain:{USED}"),
    **zoo("cut:after=3,chunk_delay_ms=60", "error-in-200:after=3,chunk_delay_ms=60"),
    **zoo(LONG, output_tokens_max=40_000),
    "one-mapped": zoo_model(f"one-byte:{USED},chunk_delay_ms=1"),
}
OVERRIDES = {
    "timeouts__drain_s": 0.7,
    "timeouts__write_stall_s": 0.5,
    "limits__drain_bytes_max": 8192,
    "limits__drains_max": 3,
}
LEAVES = pytest.mark.parametrize("leave", list(Leave))
STREAMED = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


@asynccontextmanager
async def at_upstream(
    relay: Relay, upstream: Upstream, request: RawRequest, reading: Reading | None = None
) -> AsyncIterator[RawConnection]:
    """A connection whose request has reached the provider."""
    before = await asyncio.to_thread(upstream.stats)
    async with connect(relay.gateway.origin, reading=reading, deadline=20) as conn:
        await conn.send(request)
        number = before["requests"] + 1
        await asyncio.to_thread(upstream.wait, lambda stats: stats["requests"] >= number)
        yield conn


def counted(request: RawRequest, receipt: dict[str, Any]) -> int:
    """The price of a counted receipt, its prompt counted here."""
    prompt = count_tokens(prompt_text(read_facts(request.body)))
    assert receipt["usage_source"] == "counted"
    assert receipt["input_tokens"] == prompt
    return price_by_hand(Tokens(prompt=prompt, completion=receipt["output_tokens"]))


async def aborted(upstream: Upstream) -> None:
    """The provider's connection is dropped, too."""
    await asyncio.to_thread(upstream.wait, lambda stats: stats["aborted_by_peer"] == 1)


async def until(true: Callable[[], bool]) -> None:
    async def probe() -> bool | None:
        return True if true() else None

    await eventually(probe)


@LEAVES
@STREAMED
async def test_leaving_before_the_head_is_charged_by_the_providers_word(
    relay: Relay, key: str, upstream: Upstream, stream: bool, leave: Leave
) -> None:
    async with at_upstream(relay, upstream, relay.chat(key, LATE, stream=stream)) as conn:
        conn.close(leave)
        receipt = await relay.only_receipt(key)

    assert (receipt["outcome"], receipt["usage_source"]) == ("client_left", "provider")
    assert receipt["price_nanos"] == PRICE == await relay.spent(key)
    await asyncio.to_thread(upstream.wait, lambda stats: stats["served"] == 1)


@STREAMED
async def test_leaving_before_a_head_that_does_not_come_costs_the_prompt(
    relay: Relay, key: str, upstream: Upstream, stream: bool
) -> None:
    request = relay.chat(key, "stall-head", stream=stream)
    async with at_upstream(relay, upstream, request) as conn:
        conn.close(Leave.RST)
        receipt = await relay.only_receipt(key)

    assert receipt["outcome"] == "client_left"
    assert receipt["output_tokens"] == 0
    assert receipt["price_nanos"] == counted(request, receipt)
    await aborted(upstream)


@LEAVES
async def test_leaving_between_chunks_is_charged_by_the_providers_word(
    relay: Relay, key: str, upstream: Upstream, leave: Leave
) -> None:
    async with at_upstream(relay, upstream, relay.chat(key, SLOW, stream=True)) as conn:
        await conn.head()
        conn.close(leave)
        receipt = await relay.only_receipt(key)

    assert (receipt["outcome"], receipt["usage_source"]) == ("client_left", "provider")
    assert receipt["price_nanos"] == PRICE


@LEAVES
async def test_leaving_a_stream_that_stopped_costs_what_came(
    relay: Relay, key: str, upstream: Upstream, leave: Leave
) -> None:
    request = relay.chat(key, "stall-body:after=3", stream=True)
    async with at_upstream(relay, upstream, request) as conn:
        await conn.head()
        received = b""
        async for piece in conn.body():
            received += piece.data
            if received.count(b"data:") == 4:
                break
        conn.close(leave)
        receipt = await relay.only_receipt(key)

    assert receipt["outcome"] == "client_left"
    assert 3 <= receipt["output_tokens"] <= 6
    assert receipt["price_nanos"] == counted(request, receipt)


async def test_leaving_a_body_that_stopped_costs_the_prompt(
    relay: Relay, key: str, upstream: Upstream
) -> None:
    request = relay.chat(key, "stall-body")
    async with at_upstream(relay, upstream, request) as conn:
        conn.close()
        receipt = await relay.only_receipt(key)

    assert (receipt["outcome"], receipt["output_tokens"]) == ("client_left", 0)
    assert receipt["price_nanos"] == counted(request, receipt)


@STREAMED
async def test_a_provider_that_goes_on_is_read_only_so_far(
    relay: Relay, key: str, upstream: Upstream, stream: bool
) -> None:
    request = relay.chat(key, ENDLESS, stream=stream)
    async with at_upstream(relay, upstream, request) as conn:
        if stream:
            await conn.head()
        conn.close(Leave.RST)
        receipt = await relay.only_receipt(key)

    await aborted(upstream)
    assert receipt["outcome"] == "client_left"
    # 8 KiB of frames of some 200 bytes with a token each; what was under way comes on top.
    assert receipt["output_tokens"] <= 80
    assert (receipt["output_tokens"] > 0) == stream
    assert receipt["price_nanos"] == counted(request, receipt)


@pytest.mark.parametrize("leave", [Leave.RST, Leave.CLOSE, None], ids=["rst", "close", "stays"])
async def test_a_client_that_does_not_read_is_let_go(
    relay: Relay, key: str, upstream: Upstream, leave: Leave | None
) -> None:
    """Found: a client that stalled was drained without the drain's deadline and count."""
    request = relay.chat(key, LONG, stream=True)
    reading = Reading(rcvbuf=4096)
    async with at_upstream(relay, upstream, request, reading) as conn:
        await conn.head()
        if leave is not None:
            conn.close(leave)
        receipt = await relay.only_receipt(key)

    assert receipt["outcome"] == "client_left"
    assert 0 < receipt["output_tokens"] < 30_000
    assert receipt["price_nanos"] == min(counted(request, receipt), receipt["hold_nanos"])
    # Buffers on the way may have taken all of it, so that the provider saw its answer off.
    await asyncio.to_thread(upstream.wait, lambda stats: stats["in_flight"] == 0)


async def test_a_client_that_ends_its_side_and_does_not_read_is_let_go(
    relay: Relay, key: str, upstream: Upstream
) -> None:
    request = relay.chat(key, LONG, stream=True)
    async with at_upstream(relay, upstream, request, Reading(rcvbuf=4096)) as conn:
        await conn.head()
        conn.half_close()
        receipt = await relay.only_receipt(key)

    assert receipt["outcome"] == "client_left"
    assert 0 < receipt["output_tokens"] < 30_000


@LEAVES
async def test_leaving_within_the_request_leaves_nothing(
    relay: Relay, key: str, upstream: Upstream, leave: Leave
) -> None:
    def left() -> float:
        text = relay.services.metrics.render().decode()
        found = [ln for ln in text.splitlines() if 'code="client_left"' in ln and "_total" in ln]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    before = left()
    # The server says so when the gateway waits for the body.
    request = relay.chat(key, f"plain:{USED}", headers=[("expect", "100-continue")])
    async with connect(relay.gateway.origin) as conn:
        await conn.send(request, unsent=len(request.body or b""))
        said = await asyncio.get_running_loop().sock_recv(conn.sock, 1000)
        assert said.startswith(b"HTTP/1.1 100")
        conn.close(leave)
        await until(lambda: left() == before + 1)

    await relay.receipts(key, 0)
    assert upstream.stats()["requests"] == 0


@LEAVES
async def test_leaving_right_after_done_is_a_complete_call(
    relay: Relay, key: str, upstream: Upstream, leave: Leave
) -> None:
    async with at_upstream(relay, upstream, relay.chat(key, SLOW, stream=True)) as conn:
        await conn.head()
        received = b""
        async for piece in conn.body():
            received += piece.data
            if b"[DONE]" in received:
                break
        conn.close(leave)
        receipt = await relay.only_receipt(key)

    assert (receipt["outcome"], receipt["price_nanos"]) == ("complete", PRICE)


async def test_the_hold_is_settled_before_done_is_read(
    relay: Relay, key: str, upstream: Upstream
) -> None:
    async with at_upstream(relay, upstream, relay.chat(key, SLOW, stream=True)) as conn:
        await conn.head()
        received = b""
        async for piece in conn.body():
            received += piece.data
            if b"[DONE]" in received:
                break
            assert any(":h:" in name for name in await relay.left_in_till())
        assert not any(":h:" in name for name in await relay.left_in_till())
    assert (await relay.only_receipt(key))["price_nanos"] == PRICE


@pytest.mark.parametrize(
    ("model", "outcome"),
    [("status:500,delay_ms=300", "voided"), ("refuse-close:delay_ms=300", "upstream_failed")],
)
async def test_a_failure_after_the_client_left_is_as_free_as_before(
    relay: Relay, key: str, upstream: Upstream, model: str, outcome: str
) -> None:
    """Found: who left paid for the prompt, who stayed paid nothing."""
    async with at_upstream(relay, upstream, relay.chat(key, model)) as conn:
        conn.close(Leave.RST)
        receipt = await relay.only_receipt(key)

    assert (receipt["outcome"], receipt["price_nanos"]) == (outcome, 0)


@pytest.mark.parametrize("mode", ["cut", "error-in-200"])
async def test_a_stream_that_fails_after_the_client_left_costs_what_came(
    relay: Relay, key: str, upstream: Upstream, mode: str
) -> None:
    request = relay.chat(key, f"{mode}:after=3,chunk_delay_ms=60", stream=True)
    async with at_upstream(relay, upstream, request) as conn:
        await conn.head()
        conn.close(Leave.RST)
        receipt = await relay.only_receipt(key)

    assert receipt["outcome"] in {"client_left", "upstream_failed"}
    assert 3 <= receipt["output_tokens"] <= 6
    assert receipt["price_nanos"] == counted(request, receipt)


async def test_no_more_than_so_many_are_drained_at_once(
    relay: Relay, key: str, upstream: Upstream
) -> None:
    most = 0

    def look() -> bool:
        nonlocal most
        most = max(most, relay.services.drains)
        return relay.services.open_calls == 0

    async def leave_early() -> None:
        request = relay.chat(key, "stall-body:after=3", stream=True)
        async with connect(relay.gateway.origin) as conn:
            await conn.send(request)
            await conn.head()
            conn.close(Leave.RST)

    await asyncio.gather(*(leave_early() for _ in range(8)))
    await until(look)
    receipts = await relay.receipts(key, 8)

    assert most == 3
    assert {receipt["outcome"] for receipt in receipts} == {"client_left"}
    assert relay.services.drains == 0


async def test_many_clients_that_leave_leave_no_descriptor_and_no_task(
    relay: Relay, key: str, upstream: Upstream
) -> None:
    process = psutil.Process()

    def own_descriptors() -> int:
        """Without the pooled connections to the provider, which both sides can count."""
        return process.num_fds() - int(upstream.stats()["open_connections"])

    await relay.call(key, f"plain:{USED}")
    await relay.at_rest()
    before = own_descriptors()
    models = [SLOW, LATE, "one-mapped", "stall-body:after=3"]

    async def leave_early(number: int) -> None:
        request = relay.chat(key, models[number % 4], stream=number % 3 > 0)
        async with at_upstream(relay, upstream, request) as conn:
            conn.close(list(Leave)[number % 2])

    await asyncio.gather(*(leave_early(number) for number in range(24)))
    receipts = await relay.receipts(key, 25)

    assert sum(receipt["price_nanos"] for receipt in receipts) == await relay.spent(key)
    await until(lambda: own_descriptors() <= before)
    assert len(relay.services.tasks) == relay.standing_tasks
