"""Deadlines towards the provider, and what clients see while it is silent. All times are short."""

import json
from typing import Any

import pytest

from tests.support.gateway import zoo_model
from tests.support.relay import Relay, Tokens, error_of, frames_of, price_by_hand, text_of, zoo

pytestmark = pytest.mark.asyncio(loop_scope="module")

STREAMED = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
PAUSES = "plain:prompt=9,tokens=2,chunk_delay_ms=300"
MODELS: dict[str, Any] = {
    **zoo("stall-head", "stall-body", "stall-body:after=3", PAUSES, "plain:delay_ms=500"),
    "drip": zoo_model("endless:chunk_delay_ms=100"),
}
OVERRIDES = {
    "timeouts__upstream_first_byte_s": 0.9,
    "timeouts__upstream_chunk_s": 0.6,
    "timeouts__keepalive_comment_s": 0.2,
    "timeouts__request_total_s": 1.8,
}


async def timed_out(relay: Relay, key: str, model: str, stream: bool) -> None:
    answer = await relay.call(key, model, stream=stream)
    error = error_of(answer)
    receipt = await relay.only_receipt(key)
    assert (answer.status, error["code"]) == (504, "upstream_timeout")
    assert answer.head is not None
    assert answer.head.get("x-should-retry") == "false"
    assert (receipt["outcome"], receipt["price_nanos"]) == ("upstream_failed", 0)


@STREAMED
async def test_a_head_that_does_not_come(relay: Relay, key: str, stream: bool) -> None:
    await timed_out(relay, key, "stall-head", stream)


async def test_a_body_that_stops(relay: Relay, key: str) -> None:
    await timed_out(relay, key, "stall-body", False)


async def test_a_body_that_never_ends(relay: Relay, key: str) -> None:
    await timed_out(relay, key, "drip", False)


async def test_a_stream_that_stops_is_ended_with_an_error(relay: Relay, key: str) -> None:
    answer = await relay.call(key, "stall-body:after=3", stream=True)
    receipt = await relay.only_receipt(key)

    *_, failed, done = answer.frames()
    assert done == "[DONE]"
    error = json.loads(failed)["error"]
    assert error["code"] == "upstream_timeout"
    assert "You were charged for what was delivered" in error["message"]
    assert receipt["outcome"] == "upstream_failed"
    assert receipt["usage_source"] == "counted"
    tokens = Tokens(prompt=receipt["input_tokens"], completion=receipt["output_tokens"])
    assert receipt["price_nanos"] == price_by_hand(tokens)


async def test_a_stream_that_never_ends_is_ended(relay: Relay, key: str) -> None:
    answer = await relay.call(key, "drip", stream=True)
    receipt = await relay.only_receipt(key)

    *frames, failed, _ = answer.frames()
    assert len(frames) > 5
    assert json.loads(failed)["error"]["code"] == "upstream_timeout"
    assert receipt["output_tokens"] >= len(frames) - 1


async def test_silence_is_broken_by_comments_between_frames(relay: Relay, key: str) -> None:
    answer = await relay.call(key, PAUSES, stream=True)

    blocks = answer.body.split(b"\n\n")
    comments = [block for block in blocks if block.startswith(b":")]
    assert len(comments) >= 3
    assert set(comments) == {b": keepalive"}
    assert all(block.startswith((b":", b"data: ")) for block in blocks[:-1])
    assert len(text_of(frames_of(answer)).split()) == 2
    receipt = await relay.only_receipt(key)
    assert receipt["price_nanos"] == price_by_hand(Tokens(prompt=9, completion=2))


async def test_a_silent_head_keeps_its_status_for_errors(relay: Relay, key: str) -> None:
    """Comments begin once the provider's own head is there: before that its status may be bad."""
    answer = await relay.call(key, "plain:delay_ms=500", stream=True)

    assert answer.status == 200
    assert not answer.body.startswith(b":")
    await relay.receipts(key, 1)


async def test_our_own_time_is_told_without_the_providers(relay: Relay, key: str) -> None:
    """Found: the wait for the provider's head was counted as our own."""
    for stream in (False, True):
        answer = await relay.call(key, "plain:delay_ms=500", stream=stream)
        assert answer.head is not None
        assert 0 < float(answer.head.get("x-farebox-overhead-ms") or 0) < 300
    await relay.receipts(key, 2)
