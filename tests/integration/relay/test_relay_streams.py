"""Streams of all kinds: what the client reads is what the provider wrote, but for money's sake."""

import json
import re
from typing import Any

import psutil
import pytest

from tests.support.rawclient import Outcome
from tests.support.relay import MESSAGES, Relay, Tokens, frames_of, price_by_hand, text_of, zoo
from tests.support.upstream import answer as provider
from tests.support.upstream.answer import sse
from tests.support.upstream.launch import Upstream

pytestmark = pytest.mark.asyncio(loop_scope="module")

USED = "prompt=9,tokens=5"
PRICE = price_by_hand(Tokens(prompt=9, completion=5))
# Modes whose stream is a sound one in some odd form.
SOUND = [
    *("plain", "no-done", "after-done", "crlf", "one-byte", "split-utf8", "comments", "gzip"),
    *(
        "usage-every-chunk",
        "usage-in-last-choice",
        "cost:0.000029",
        "plain:spaced=1",
        "usage-twice",
    ),
    *("tools", "reasoning-text"),
]
BIG = 10_000_000


def mode_of(mode: str) -> str:
    return f"{mode}{',' if ':' in mode else ':'}{USED}"


MODELS: dict[str, Any] = {
    **zoo(*(mode_of(mode) for mode in SOUND)),
    **zoo(f"sse-for-json:{USED}", f"json-for-sse:{USED}", "big-frame"),
    **zoo("plain:chunk_delay_ms=40,tokens=5"),
}


def head_is_right(outcome: Outcome) -> None:
    head = outcome.head
    assert head is not None
    assert head.status == 200
    assert head.get("content-type") == "text/event-stream; charset=utf-8"
    assert head.get("cache-control") == "no-cache, no-transform"
    assert head.get("x-accel-buffering") == "no"
    assert (head.get("x-request-id") or "").startswith("req_")
    assert (head.get("x-receipt-id") or "").startswith("rcpt_")
    assert float(head.get("x-farebox-overhead-ms") or -1) >= 0
    assert head.get("x-cost-usd") is None
    assert head.get("access-control-allow-origin") == "*"
    assert "x-receipt-id" in (head.get("access-control-expose-headers") or "")
    for never in ("openai-processing-ms", "set-cookie", "content-encoding", "server"):
        assert head.get(never) is None


@pytest.mark.parametrize("asked", [False, True], ids=["plain", "include_usage"])
@pytest.mark.parametrize("mode", SOUND)
async def test_every_sound_stream_arrives_is_charged_and_tells_usage_to_who_asked(
    relay: Relay, key: str, mode: str, asked: bool
) -> None:
    more = {"stream_options": {"include_usage": True}} if asked else {}
    outcome = await relay.call(key, mode_of(mode), stream=True, **more)
    receipt = await relay.only_receipt(key)

    head_is_right(outcome)
    frames = frames_of(outcome)
    assert outcome.body.endswith(b"data: [DONE]\n\n")
    assert outcome.body.count(b"[DONE]") == 1
    assert b"AFTER DONE" not in outcome.body
    told = [frame["usage"] for frame in frames if frame.get("usage")]
    if asked:
        (usage,) = told
        assert frames[-1]["choices"] == []
        assert usage["cost_nanos"] == receipt["price_nanos"]
        assert usage["prompt_tokens"] == receipt["input_tokens"] == 9
    else:
        assert told == []
        assert b'"cost"' not in outcome.body
        assert all(frame["choices"] for frame in frames)
    assert receipt["outcome"] == "complete"
    assert receipt["usage_source"] == "provider"
    assert receipt["price_nanos"] == await relay.spent(key)
    if not mode.startswith(("cost", "tools", "reasoning")):
        assert receipt["price_nanos"] == PRICE
    assert receipt["upstream_id"] == frames[0]["id"]
    assert receipt["served_model"] == mode_of(mode)
    assert receipt["first_byte_at"] is not None
    assert re.fullmatch(r"req-upstream-\d+", receipt["upstream_request_id"])


@pytest.mark.parametrize("mode", ["plain", "crlf", "one-byte", "split-utf8", "comments", "gzip"])
async def test_frames_leave_byte_for_byte_as_they_came(
    relay: Relay, key: str, mode: str, upstream: Upstream
) -> None:
    fields = {"stream": True, "stream_options": {"include_usage": True}}
    outcome = await relay.call(key, mode_of(mode), **fields)

    body = {"model": mode_of(mode), "messages": MESSAGES, **fields}
    facts = provider.facts_of(body)
    if mode == "split-utf8":
        deltas = [{"content": "é漢🙂ß字🚋"} for _ in range(5)]
        wanted = provider.chunks(facts, deltas)
    else:
        wanted = provider.chunks(facts)
    expected = b"".join(sse(item) for item in wanted[:-1])
    got = outcome.body.replace(b"\r\n", b"\n").replace(b": OPENROUTER PROCESSING\n\n", b"")
    assert got.startswith(expected)
    if mode == "crlf":
        assert outcome.body.count(b"\r\n\r\n") == len(wanted)
    if mode == "comments":
        assert outcome.body.count(b": OPENROUTER PROCESSING\n\n") == len(wanted) + 1
    sent = json.loads(upstream.last()[-1]["body"])
    assert sent == body


async def test_frames_leave_when_they_came(relay: Relay, key: str) -> None:
    outcome = await relay.call(key, "plain:chunk_delay_ms=40,tokens=5", stream=True)

    times = [piece.at for piece in outcome.pieces]
    assert len(times) >= 6
    assert times[-1] - times[0] > 0.15


async def test_usage_is_asked_for_although_the_client_did_not(
    relay: Relay, key: str, upstream: Upstream
) -> None:
    await relay.call(key, f"plain:{USED}", stream=True, stream_options={"include_usage": False})

    sent = json.loads(upstream.last()[-1]["body"])
    assert sent["stream_options"] == {"include_usage": True}


async def test_several_choices_are_charged_together(relay: Relay, key: str) -> None:
    outcome = await relay.call(key, f"plain:{USED}", stream=True, n=3)
    receipt = await relay.only_receipt(key)

    assert {c["index"] for f in frames_of(outcome) for c in f["choices"]} == {0, 1, 2}
    assert receipt["price_nanos"] == price_by_hand(Tokens(prompt=9, completion=15))


async def test_tool_calls_pass(relay: Relay, key: str) -> None:
    outcome = await relay.call(key, mode_of("tools"), stream=True, tools=[])

    deltas = [frame["choices"][0]["delta"] for frame in frames_of(outcome)]
    calls = [call for delta in deltas for call in delta.get("tool_calls") or []]
    arguments = "".join(call["function"]["arguments"] for call in calls)
    assert json.loads(arguments) == {"from": "north", "to": "river"}
    assert calls[0]["function"]["name"] == "get_fare"


async def test_a_stream_for_a_client_that_wanted_none_passes_and_is_charged(
    relay: Relay, key: str
) -> None:
    outcome = await relay.call(key, f"sse-for-json:{USED}")
    receipt = await relay.only_receipt(key)

    assert len(text_of(frames_of(outcome)).split()) == 5
    # The provider was not asked for usage: our own count.
    assert receipt["usage_source"] == "counted"
    assert receipt["output_tokens"] >= 5


async def test_json_for_a_client_that_wanted_a_stream_passes_and_is_charged(
    relay: Relay, key: str
) -> None:
    outcome = await relay.call(key, f"json-for-sse:{USED}", stream=True)
    receipt = await relay.only_receipt(key)

    assert outcome.head is not None
    assert outcome.head.get("content-type") == "application/json"
    assert outcome.json()["usage"]["cost_nanos"] == receipt["price_nanos"] == PRICE


async def test_a_frame_of_ten_megabytes_passes_in_bounded_memory(relay: Relay, key: str) -> None:
    process = psutil.Process()
    await relay.call(key, f"plain:{USED}", stream=True)
    before = process.memory_info().rss

    outcome = await relay.send(relay.chat(key, "big-frame", stream=True), deadline=30)
    _, receipt = await relay.receipts(key, 2)

    assert len(text_of(frames_of(outcome))) == BIG
    assert receipt["usage_source"] == "provider"
    # This process is the client, too, and holds the answer several times over.
    assert process.memory_info().rss - before < 15 * BIG


async def test_connections_to_the_provider_are_used_again(
    relay: Relay, key: str, upstream: Upstream
) -> None:
    for _ in range(5):
        await relay.call(key, f"plain:{USED}", stream=True)
        await relay.call(key, f"plain:{USED}")

    assert upstream.stats()["connections_opened"] <= 1
    await relay.receipts(key, 10)
