"""Limits of requests and tokens per minute, as clients see them: headers, refusals, no charge."""

import asyncio
from typing import Any

import pytest

from keys.principal import Limits
from tests.support.rawclient import Outcome
from tests.support.relay import Relay, error_of, frames_of, zoo
from tests.support.upstream.launch import Upstream

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODELS = zoo("plain", "plain:delay_ms=300", "status:500")
OVERRIDES = {
    "limits__requests_per_minute_per_key": 1000,
    "limits__tokens_per_minute_per_account": 10_000_000,
}
WORDS = ("limit", "remaining", "reset")


def told(outcome: Outcome) -> dict[str, str]:
    assert outcome.head is not None
    names = [f"x-ratelimit-{w}-{k}" for k in ("requests", "tokens") for w in WORDS]
    found = {name.removeprefix("x-ratelimit-"): outcome.head.get(name) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def seconds(text: str) -> float:
    """As Go prints durations."""
    if text.endswith("ms"):
        return int(text[:-2]) / 1000
    minutes, _, rest = text.rpartition("m")
    return int(minutes or 0) * 60 + float(rest.removesuffix("s"))


async def limited(relay: Relay, **limits: int) -> str:
    return await relay.key(limits=Limits(**limits))


def refused(outcome: Outcome) -> dict[str, Any]:
    error = error_of(outcome)
    assert (outcome.status, error["code"], error["type"]) == (
        *(429, "rate_limited"),
        "rate_limit_error",
    )
    assert "You were not charged." in error["message"]
    return error


async def test_keys_without_a_limit_of_their_own_have_that_of_the_settings(relay: Relay) -> None:
    plain = await relay.call(await relay.key(), "plain")
    own = await relay.call(await limited(relay, requests_per_minute=9), "plain")

    assert (told(plain)["limit-requests"], told(plain)["limit-tokens"]) == ("1000", "10000000")
    assert (told(own)["limit-requests"], told(own)["limit-tokens"]) == ("9", "10000000")


async def test_requests_of_a_key_per_minute(relay: Relay, upstream: Upstream) -> None:
    key = await limited(relay, requests_per_minute=2)
    answers = [await relay.call(key, "plain") for _ in range(3)]

    assert [answer.status for answer in answers] == [200, 200, 429]
    assert [told(answer)["remaining-requests"] for answer in answers] == ["1", "0", "0"]
    assert [told(answer)["limit-requests"] for answer in answers] == ["2"] * 3
    assert seconds(told(answers[0])["reset-requests"]) == 30
    assert 50 < seconds(told(answers[2])["reset-requests"]) <= 60
    message = refused(answers[2])["message"]
    assert "This key may have 2 requests per minute" in message
    head = answers[2].head
    assert head is not None
    wait_ms = int(head.get("retry-after-ms") or 0)
    assert 20_000 < wait_ms <= 30_000
    assert head.get("retry-after") == str(-(-wait_ms // 1000))
    exposed = head.get("access-control-expose-headers") or ""
    assert {"retry-after-ms", *(f"x-ratelimit-{name}" for name in told(answers[2]))} <= set(
        exposed.split(", ")
    )
    assert upstream.stats()["requests"] == 2
    await relay.receipts(key, 2)


async def test_streams_and_failures_tell_it_too(relay: Relay) -> None:
    key = await limited(relay, requests_per_minute=60, tokens_per_minute=100_000)
    stream = await relay.call(key, "plain", stream=True)
    failed = await relay.call(key, "status:500")

    assert frames_of(stream)
    assert told(stream).keys() == {f"{w}-{k}" for w in WORDS for k in ("requests", "tokens")}
    assert told(stream)["remaining-requests"] == "59"
    assert failed.status >= 500
    assert told(failed)["limit-tokens"] == "100000"


async def test_keys_of_an_account_share_its_limit(relay: Relay) -> None:
    first = await relay.key()
    account_id = relay.account_of(first)
    await relay.gateway.tamper(
        "UPDATE billing_accounts SET requests_per_minute = 3 WHERE id = $1", account_id
    )
    second = await relay.gateway.key(account_id, limits=Limits(requests_per_minute=9))
    third = await relay.gateway.key(account_id)
    answers = [await relay.call(key, "plain") for key in (second, third, second, third)]

    assert [answer.status for answer in answers] == [200, 200, 200, 429]
    assert [told(answer)["remaining-requests"] for answer in answers] == ["2", "1", "0", "0"]
    assert "This account may have 3 requests per minute" in refused(answers[3])["message"]


async def test_tokens_are_taken_first_and_put_right_by_the_answer(relay: Relay) -> None:
    """A limit of 1,000 tokens has room for one request of 900, or for many that used few."""
    key = await limited(relay, tokens_per_minute=1000)
    first = await relay.call(key, "plain", max_tokens=400)
    used = first.json()["usage"]["total_tokens"]
    second = await relay.call(key, "plain", max_tokens=400)

    assert (first.status, second.status) == (200, 200)
    before, after = (int(told(each)["remaining-tokens"]) for each in (first, second))
    assert before < 600
    # Some of the bucket has refilled meanwhile.
    assert before - used <= after <= before - used + 100


async def test_tokens_under_way_count_in_full(relay: Relay) -> None:
    key = await limited(relay, tokens_per_minute=1000)
    calls = [relay.call(key, "plain:delay_ms=300", max_tokens=450) for _ in range(6)]
    answers = await asyncio.gather(*calls)

    statuses = sorted(answer.status for answer in answers)
    assert statuses == [200, 200, 429, 429, 429, 429]
    error = refused(next(answer for answer in answers if answer.status == 429))
    assert "This key may have 1000 tokens" in error["message"]
    await relay.receipts(key, 2)


async def test_what_failed_gives_all_its_tokens_back(relay: Relay) -> None:
    key = await limited(relay, tokens_per_minute=1000)
    for _ in range(3):
        assert (await relay.call(key, "status:500", max_tokens=450)).status >= 500
    outcome = await relay.call(key, "plain", max_tokens=450)

    assert outcome.status == 200
    assert 400 < int(told(outcome)["remaining-tokens"]) < 550


async def test_one_request_may_ask_for_more_than_the_limit(relay: Relay) -> None:
    key = await limited(relay, tokens_per_minute=100)
    first, second = [await relay.call(key, "plain", max_tokens=500) for _ in range(2)]

    assert (first.status, told(first)["remaining-tokens"]) == (200, "0")
    assert second.status == 429


async def test_200_parallel_calls_get_no_more_than_there_is(
    relay: Relay, upstream: Upstream
) -> None:
    key = await limited(relay, requests_per_minute=5)
    answers = await asyncio.gather(*(relay.call(key, "plain") for _ in range(200)))

    admitted = [answer for answer in answers if answer.status == 200]
    assert len(admitted) == 5
    assert sum(answer.status == 429 for answer in answers) == 195
    assert upstream.stats()["requests"] == 5
    await relay.receipts(key, 5)


async def test_a_refusal_takes_nothing_of_credit(relay: Relay) -> None:
    """402 comes before 429: waiting would not help."""
    key = await relay.key(credits="0.5", limits=Limits(requests_per_minute=1))
    poor = await relay.call(key, "plain", max_tokens=1000)
    paid = await relay.call(key, "plain", max_tokens=5)
    late = await relay.call(key, "plain", max_tokens=5)

    assert [poor.status, paid.status, late.status] == [402, 200, 429]


async def test_a_worker_limits_what_is_no_request_too(relay: Relay) -> None:
    take = relay.services.limiter.take
    answers = [await take("login:192.0.2.1", 2, 60) for _ in range(3)]

    assert [allowed for allowed, _ in answers] == [True, True, False]
