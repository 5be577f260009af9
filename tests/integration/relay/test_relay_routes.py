"""Several routes: the next one is tried only while nothing can have been billed."""

import asyncio
import json
import time
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest

from config.secret import Secret
from gateway.cli.audit import run_audit
from tests.support.gateway import PRICE, UPSTREAM_KEY
from tests.support.rawclient import connect
from tests.support.relay import (
    Relay,
    Tokens,
    error_of,
    frames_of,
    nanos_by_hand,
    price_by_hand,
    text_of,
)
from tests.support.upstream.launch import Upstream

pytestmark = pytest.mark.asyncio(loop_scope="module")

STREAMED = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
GOOD = ("second", "plain:prompt=9,tokens=5")
PRICED = price_by_hand(Tokens(prompt=9, completion=5))
LATE = ("second", "plain:prompt=9,tokens=5,delay_ms=300")
DEAD = ("dead", "plain")
# Status of the first route, and what a receipt calls it.
PASSED_OVER = {
    307: "odd_status",
    401: "credential",
    402: "credential",
    403: "credential",
    404: "unknown_model",
    418: "odd_status",
    429: "rate_limited",
    500: "server_error",
    503: "server_error",
}
CALLERS_OWN = (400, 413, 415, 422)
# The first route, and the status that the client gets because no other is tried.
FINAL = {
    **{f"status:{status}": status for status in CALLERS_OWN},
    "status:408": 504,
    "status:504": 504,
    "status:524": 504,
    "refuse-close": 502,
    "refuse-close:rst=1": 502,
    "error-in-200": 502,
    "html-200": 502,
}


def served_by(*routes: tuple[str, str]) -> dict[str, Any]:
    """A model with these routes: provider and model there."""
    listed = [{"provider": provider, "model": model} for provider, model in routes]
    return {"routes": listed, "price": PRICE, "output_tokens_max": 500}


MODELS: dict[str, Any] = {
    **{f"over-{status}": served_by(("zoo", f"status:{status}"), GOOD) for status in PASSED_OVER},
    **{f"final-{mode}": served_by(("zoo", mode), GOOD) for mode in FINAL if ":rst" not in mode},
    "final-refuse-close:rst~1": served_by(("zoo", "refuse-close:rst=1"), GOOD),
    "over-dead": served_by(DEAD, GOOD),
    "third": served_by(DEAD, ("zoo", "status:503"), GOOD),
    "none-left": served_by(("zoo", "status:503"), DEAD, ("second", "status:429,retry_after=7")),
    "none-reached": served_by(("zoo", "status:503"), DEAD),
    "stalls": served_by(("hasty", "stall-head"), GOOD),
    "own-time": served_by(("zoo", "status:500"), ("hasty", "stall-head")),
    "out-of-time": served_by(("zoo", "status:500,delay_ms=900"), ("zoo", "stall-head")),
    "breaks": served_by(("zoo", "cut:after=3"), GOOD),
    "slow-second": served_by(("zoo", "status:500"), LATE),
    "slow-first": served_by(("zoo", "status:500,delay_ms=300"), GOOD),
    "says-cost": served_by(("thrifty", "status:500"), ("zoo", "cost:0.001")),
    "book-cost": served_by(("zoo", "status:500"), ("thrifty", "cost:0.001")),
}


def overrides_at(url: str) -> dict[str, object]:
    zoo = {"kind": "openai", "base_url": url, "key": Secret(UPSTREAM_KEY)}
    return {
        "providers__second": zoo,
        "providers__thrifty": {**zoo, "reported_cost": False},
        "providers__hasty": {**zoo, "first_byte_timeout_s": 0.2},
        "providers__dead": {"kind": "openai", "base_url": "http://127.0.0.1:1/v1"},
        "timeouts__request_total_s": 1.5,
        "timeouts__drain_s": 0.7,
    }


def attempts_of(receipt: dict[str, Any]) -> list[dict[str, Any]]:
    """The failed attempts of a receipt, without their times, which are checked."""
    failed = json.loads(receipt["failed_attempts"])
    assert all(0 <= attempt["ms"] < 2000 for attempt in failed)
    return [{k: v for k, v in attempt.items() if k != "ms"} for attempt in failed]


def failed(provider: str, model: str, status: int | None, reason: str) -> dict[str, Any]:
    return {"provider": provider, "upstream_model": model, "status": status, "reason": reason}


NOT_REACHED = failed("dead", "plain", None, "no_connection")
FAILED_503 = failed("zoo", "status:503", 503, "server_error")


async def served(relay: Relay, key: str, model: str, stream: bool) -> dict[str, Any]:
    """The one receipt of a call that the good route answered, and that was charged once."""
    answer = await relay.call(key, model, stream=stream)
    assert answer.status == 200, answer.body
    if stream:
        assert len(text_of(frames_of(answer)).split()) == 5
    else:
        assert len(answer.json()["choices"][0]["message"]["content"].split()) == 5
    receipt = await relay.only_receipt(key)
    assert answer.head is not None
    assert answer.head.get("x-receipt-id") == f"rcpt_{receipt['source_reference']}"
    assert (receipt["outcome"], receipt["provider"]) == ("complete", "second")
    assert receipt["price_nanos"] == PRICED == await relay.spent(key)
    return receipt


@STREAMED
@pytest.mark.parametrize("status", PASSED_OVER)
async def test_a_failure_of_the_provider_goes_on_to_the_next_route(
    relay: Relay, key: str, upstream: Upstream, status: int, stream: bool
) -> None:
    receipt = await served(relay, key, f"over-{status}", stream)

    reason = PASSED_OVER[status]
    assert attempts_of(receipt) == [failed("zoo", f"status:{status}", status, reason)]
    assert receipt["attempt"] == 2
    assert upstream.stats()["requests"] == 2
    first, second = (json.loads(item["body"]) for item in upstream.last())
    assert (first.pop("model"), second.pop("model")) == (f"status:{status}", GOOD[1])
    assert first == second


@STREAMED
async def test_a_provider_that_cannot_be_reached_goes_on_to_the_next_route(
    relay: Relay, key: str, upstream: Upstream, stream: bool
) -> None:
    receipt = await served(relay, key, "over-dead", stream)

    assert attempts_of(receipt) == [NOT_REACHED]
    assert upstream.stats()["requests"] == 1


async def test_every_route_is_tried_in_order(relay: Relay, key: str) -> None:
    receipt = await served(relay, key, "third", False)

    assert attempts_of(receipt) == [NOT_REACHED, FAILED_503]
    assert receipt["attempt"] == 3


@STREAMED
@pytest.mark.parametrize("mode", FINAL)
async def test_what_may_have_billed_or_is_the_callers_own_ends_at_the_first_route(
    relay: Relay, key: str, upstream: Upstream, mode: str, stream: bool
) -> None:
    answer = await relay.call(key, f"final-{mode}", stream=stream)
    receipt = await relay.only_receipt(key)

    assert error_of(answer)
    assert answer.status == FINAL[mode]
    assert upstream.stats()["requests"] == 1
    assert (receipt["provider"], receipt["attempt"]) == ("zoo", 1)
    assert attempts_of(receipt) == []
    assert receipt["price_nanos"] == 0


async def test_a_provider_that_does_not_answer_in_time_is_not_replaced(
    relay: Relay, key: str, upstream: Upstream
) -> None:
    answer = await relay.call(key, "stalls")
    receipt = await relay.only_receipt(key)

    assert (answer.status, upstream.stats()["requests"]) == (504, 1)
    assert (receipt["outcome"], receipt["attempt"]) == ("upstream_failed", 1)


async def test_a_stream_that_breaks_off_is_not_begun_again_elsewhere(
    relay: Relay, key: str, upstream: Upstream
) -> None:
    answer = await relay.call(key, "breaks", stream=True)
    receipt = await relay.only_receipt(key)

    assert json.loads(answer.frames()[-2])["error"]["code"] == "upstream_error"
    assert upstream.stats()["requests"] == 1
    assert (receipt["outcome"], receipt["provider"]) == ("upstream_failed", "zoo")
    assert receipt["price_nanos"] == await relay.spent(key) > 0


@STREAMED
async def test_when_all_routes_fail_the_last_ones_error_is_told(
    relay: Relay, key: str, stream: bool
) -> None:
    answer = await relay.call(key, "none-left", stream=stream)
    receipt = await relay.only_receipt(key)

    assert "limiting our requests" in error_of(answer)["message"]
    assert answer.head is not None
    assert (answer.status, answer.head.get("retry-after")) == (503, "7")
    assert (receipt["outcome"], receipt["price_nanos"]) == ("voided", 0)
    assert (receipt["provider"], receipt["attempt"]) == ("second", 3)
    assert attempts_of(receipt) == [FAILED_503, NOT_REACHED]


async def test_when_the_last_route_cannot_be_reached_nobody_pays(relay: Relay, key: str) -> None:
    answer = await relay.call(key, "none-reached")
    receipt = await relay.only_receipt(key)

    assert "no connection" in error_of(answer)["message"]
    assert (receipt["outcome"], receipt["provider"]) == ("voided", "dead")
    assert receipt["upstream_request_id"] == ""
    assert await relay.spent(key) == 0


async def test_each_route_has_its_own_time_to_the_first_byte(relay: Relay, key: str) -> None:
    began = time.monotonic()
    answer = await relay.call(key, "own-time")
    receipt = await relay.only_receipt(key)

    assert (answer.status, receipt["provider"]) == (504, "hasty")
    assert 0.2 <= time.monotonic() - began < 1.2


async def test_all_attempts_share_the_requests_time(relay: Relay, key: str) -> None:
    began = time.monotonic()
    answer = await relay.call(key, "out-of-time")
    took_s = time.monotonic() - began
    receipt = await relay.only_receipt(key)

    assert (answer.status, receipt["attempt"]) == (504, 2)
    assert 1.4 <= took_s < 2.2


async def leaving(
    relay: Relay, key: str, upstream: Upstream, model: str, requests: int
) -> dict[str, Any]:
    """The receipt of a call whose client leaves when so many requests have reached providers."""
    async with connect(relay.gateway.origin) as conn:
        await conn.send(relay.chat(key, model))
        await asyncio.to_thread(upstream.wait, lambda stats: stats["requests"] == requests)
        conn.close()
        return await relay.only_receipt(key)


async def test_a_client_that_leaves_the_second_attempt_pays_by_that_providers_word(
    relay: Relay, key: str, upstream: Upstream
) -> None:
    receipt = await leaving(relay, key, upstream, "slow-second", 2)

    assert (receipt["outcome"], receipt["usage_source"]) == ("client_left", "provider")
    assert (receipt["provider"], receipt["attempt"]) == ("second", 2)
    assert receipt["price_nanos"] == PRICED == await relay.spent(key)


async def test_nothing_is_begun_for_a_client_that_has_left(
    relay: Relay, key: str, upstream: Upstream
) -> None:
    receipt = await leaving(relay, key, upstream, "slow-first", 1)

    assert (receipt["outcome"], receipt["price_nanos"]) == ("voided", 0)
    assert (receipt["provider"], receipt["attempt"]) == ("zoo", 1)
    assert upstream.stats()["requests"] == 1


async def test_a_reported_cost_counts_when_the_provider_that_answered_may_report(
    relay: Relay,
) -> None:
    told, own = await relay.key(), await relay.key()
    await relay.call(told, "says-cost")
    await relay.call(own, "book-cost")
    by_report, by_book = await relay.only_receipt(told), await relay.only_receipt(own)

    assert by_report["reported_cost_usd"] == Decimal("0.001")
    assert by_report["price_nanos"] == nanos_by_hand(Fraction(1, 1000), Fraction(2))
    assert by_book["cost_source"] == "price_book"
    assert by_report["hold_nanos"] == by_book["hold_nanos"]


async def test_the_time_of_failed_attempts_is_not_our_own(relay: Relay, key: str) -> None:
    answer = await relay.call(key, "slow-first")
    (attempt,) = json.loads((await relay.only_receipt(key))["failed_attempts"])

    assert answer.head is not None
    assert float(answer.head.get("x-farebox-overhead-ms") or "") < 150
    assert attempt["ms"] >= 290


async def test_operators_see_which_provider_failed_and_how(relay: Relay, key: str) -> None:
    wanted = (("zoo", "rate_limited"), ("dead", "no_connection"), ("hasty", "timeout"))
    before = [counted(relay, *labels) for labels in wanted]
    for model in ("over-429", "over-dead", "stalls", "final-status:400"):
        await relay.call(key, model)

    assert [counted(relay, *labels) for labels in wanted] == [count + 1 for count in before]
    assert counted(relay, "zoo", "refused") == 0


def counted(relay: Relay, provider: str, reason: str) -> float:
    labels = {"provider": provider, "reason": reason}
    registry = relay.services.metrics.registry
    return registry.get_sample_value("farebox_upstream_failures_total", labels) or 0


async def test_many_calls_over_failing_routes_leave_clean_books(
    relay: Relay, key: str, valkey_url: str
) -> None:
    models = ["third", "over-429", "none-left", "final-status:400", "breaks"] * 6
    answers = await asyncio.gather(*(relay.call(key, model) for model in models))
    receipts = await relay.receipts(key, len(models))
    report = await run_audit(relay.gateway.book_url, valkey_url, at_rest=True)

    assert sum(answer.status == 200 for answer in answers) == 12
    assert sum(receipt["outcome"] == "complete" for receipt in receipts) == 12
    assert await relay.spent(key) == sum(receipt["price_nanos"] for receipt in receipts)
    assert report.is_clean
