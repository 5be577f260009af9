"""Who can pay for a part of what was asked gets that part, not a 402 for the whole."""

import asyncio
import json
from typing import Any

import pytest

from billing.money import credits_text
from tests.support.growth import (
    OVERRIDES,
    PER_OUTPUT,
    assert_clean,
    balance,
    credits_of,
    finishes,
    prompt_nanos,
)
from tests.support.rawclient import Outcome
from tests.support.relay import Relay, error_of, frames_of, text_of, zoo
from tests.support.upstream.launch import Upstream

pytestmark = pytest.mark.asyncio(loop_scope="module")

OVERRIDES = {**OVERRIDES, "limits__stream_window_tokens": 400, "limits__output_tokens_min": 50}
MODEL = "plain:prompt=20,tokens=500"
MODELS = zoo(MODEL, output_tokens_max=2000)
LONG_TEXT = "The ferry crosses the river twice an hour. " * 200
PER_CREDIT = 10**6


def header(outcome: Outcome, name: str) -> str | None:
    assert outcome.head is not None
    return outcome.head.get(name)


def sent(upstream: Upstream) -> dict[str, Any]:
    return dict(json.loads(upstream.last()[-1]["body"]))


async def poor(relay: Relay, tokens: int, **fields: Any) -> str:
    """A key that can pay for such a prompt and so many output tokens."""
    return await relay.key(credits_of(prompt_nanos(MODEL, **fields) + tokens * PER_OUTPUT))


@pytest.mark.parametrize(
    ("fields", "limits"),
    [
        ({}, ["max_completion_tokens"]),
        ({"max_tokens": None}, ["max_completion_tokens"]),
        ({"max_completion_tokens": 1500}, ["max_completion_tokens"]),
        ({"max_tokens": 1500}, ["max_tokens"]),
        ({"max_tokens": 1500, "max_completion_tokens": 1000}, ["max_completion_tokens"]),
    ],
)
@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
async def test_the_output_is_lowered_to_what_can_be_paid_and_everybody_is_told(
    relay: Relay,
    fields: dict[str, Any],
    limits: list[str],
    is_streamed: bool,
    upstream: Upstream,
    valkey_url: str,
) -> None:
    fields = fields | ({"stream": True} if is_streamed else {})
    key = await poor(relay, 100, **fields)
    outcome = await relay.call(key, MODEL, **fields)
    receipt = await relay.only_receipt(key)

    assert outcome.status == 200
    told = int(header(outcome, "x-farebox-max-tokens") or 0)
    # The prompt was counted first, so it is a little more than by its bytes.
    assert 100 <= told <= 150
    assert "x-farebox-max-tokens" in (header(outcome, "access-control-expose-headers") or "")
    body = sent(upstream)
    assert all(body[limit] == told for limit in limits)
    assert max(body.get(name) or 0 for name in ("max_tokens", "max_completion_tokens")) == told
    if is_streamed:
        frames = frames_of(outcome)
        assert finishes(frames) == {0: "length"}
        text = text_of(frames)
    else:
        (choice,) = outcome.json()["choices"]
        assert choice["finish_reason"] == "length"
        text = choice["message"]["content"]
    assert len(text.split()) == told
    assert receipt["outcome"] == "complete"
    assert receipt["overrun_nanos"] == 0
    assert receipt["price_nanos"] <= receipt["hold_nanos"]
    assert await balance(relay, key) >= 0
    await assert_clean(relay, valkey_url)


async def test_who_can_pay_for_all_of_it_is_not_lowered(
    relay: Relay, key: str, upstream: Upstream
) -> None:
    outcome = await relay.call(key, MODEL, max_tokens=1500)

    assert header(outcome, "x-farebox-max-tokens") is None
    assert sent(upstream)["max_tokens"] == 1500


async def test_below_the_useful_minimum_it_is_a_402_with_what_is_there(
    relay: Relay, upstream: Upstream, valkey_url: str
) -> None:
    nanos = 30 * PER_OUTPUT + 100
    key = await relay.key(credits_of(nanos))
    error = error_of(await relay.call(key, MODEL))

    assert error["code"] == "insufficient_credits"
    assert f"only {credits_text(nanos)} credits" in error["message"]
    assert upstream.stats()["requests"] == 0
    await relay.receipts(key, 0)
    await assert_clean(relay, valkey_url)


async def test_fewer_tokens_than_the_minimum_are_served_when_no_more_were_asked_for(
    relay: Relay,
) -> None:
    key = await poor(relay, 10, max_tokens=10)
    outcome = await relay.call(key, MODEL, max_tokens=10)

    assert outcome.status == 200
    assert header(outcome, "x-farebox-max-tokens") is None


async def test_choices_share_what_can_be_paid(relay: Relay, upstream: Upstream) -> None:
    key = await poor(relay, 300, n=3)
    outcome = await relay.call(key, MODEL, n=3)

    told = int(header(outcome, "x-farebox-max-tokens") or 0)
    assert 100 <= told <= 120
    assert sent(upstream)["max_completion_tokens"] == told
    assert len(outcome.json()["choices"]) == 3
    receipt = await relay.only_receipt(key)
    assert receipt["overrun_nanos"] == 0


async def test_a_prediction_is_paid_before_the_output(relay: Relay) -> None:
    prediction = {"type": "content", "content": "w" * 200}
    key = await poor(relay, 300, prediction=prediction)
    outcome = await relay.call(key, MODEL, prediction=prediction)

    length = len(json.dumps(prediction))
    told = int(header(outcome, "x-farebox-max-tokens") or 0)
    assert 300 - length <= told <= 300 - length + 150


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
async def test_a_prompt_is_counted_before_it_is_refused(
    relay: Relay, is_streamed: bool, upstream: Upstream
) -> None:
    """By its bytes this prompt would cost 18 credits; its tokens make six, with the margin."""
    messages = [{"role": "user", "content": LONG_TEXT}]
    key = await relay.key("12")
    fields = {"messages": messages, "max_tokens": 200, "stream": is_streamed}
    outcome = await relay.call(key, MODEL, **fields)
    receipt = await relay.only_receipt(key)

    assert outcome.status == 200
    assert header(outcome, "x-farebox-max-tokens") is None
    assert sent(upstream)["max_tokens"] == 200
    assert 4 * PER_CREDIT < receipt["hold_nanos"] < 12 * PER_CREDIT


async def test_the_402_of_a_counted_prompt_says_what_it_would_need(relay: Relay) -> None:
    messages = [{"role": "user", "content": LONG_TEXT}]
    key = await relay.key("5")
    error = error_of(await relay.call(key, MODEL, messages=messages, max_tokens=200))

    needed = float(error["message"].split("up to ")[1].split(" credits")[0])
    assert 5 < needed < 12


async def test_a_stream_that_can_pay_its_window_is_not_lowered(
    relay: Relay, upstream: Upstream
) -> None:
    key = await poor(relay, 400, stream=True)
    outcome = await relay.call(key, MODEL, stream=True)

    assert header(outcome, "x-farebox-max-tokens") is None
    assert "max_completion_tokens" not in sent(upstream)
    assert finishes(frames_of(outcome)) == {0: "length"}
    receipt = await relay.only_receipt(key)
    assert receipt["outcome"] == "credit_exhausted"


async def test_who_asks_often_with_nothing_is_not_counted(
    relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[object] = []
    monkeypatch.setattr(relay.services.counter, "count", counted.append)
    key = await relay.key("0.5")
    messages = [{"role": "user", "content": LONG_TEXT}]

    error_of(await relay.call(key, MODEL, messages=messages))

    assert counted == []


async def test_requests_that_race_for_the_last_credit_are_served_or_refused_whole(
    relay: Relay, valkey_url: str
) -> None:
    key = await poor(relay, 700)
    outcomes = await asyncio.gather(*(relay.call(key, MODEL) for _ in range(8)))

    statuses = [outcome.status for outcome in outcomes]
    assert set(statuses) == {200, 402}
    receipts = await relay.receipts(key, statuses.count(200))
    assert all(receipt["price_nanos"] <= receipt["hold_nanos"] for receipt in receipts)
    assert await balance(relay, key) >= 0
    await assert_clean(relay, valkey_url)
