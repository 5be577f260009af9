"""A key never spends above its budget, whatever runs at the same time, and is told when it may."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import redis.asyncio

from billing.errors import KeyLimitReached
from billing.prices import charge_for
from billing.receipts import Outcome
from billing.till_scopes import shard_prefix
from billing.usage import Usage, UsageSource
from billing.windows import window_end, window_start
from gateway.protocols.chat import read_facts
from gateway.relay.admit import admit, prepare
from gateway.relay.call import Arrival, Call
from gateway.relay.seen import Seen
from gateway.relay.settle import Bill, end_call
from keys.principal import WINDOWS, Budget, Window
from tests.support.growth import (
    OVERRIDES,
    PER_OUTPUT,
    assert_clean,
    balance,
    credits_of,
    finishes,
    prompt_nanos,
)
from tests.support.relay import Relay, error_of, frames_of, zoo

pytestmark = pytest.mark.asyncio(loop_scope="module")

OVERRIDES = {**OVERRIDES, "limits__output_tokens_min": 50}
SHORT, LONG = "plain:prompt=150,tokens=10", "plain:prompt=20,tokens=500"
MODELS = zoo(SHORT, LONG, output_tokens_max=2000)
CREDIT = 10**9
TEN: dict[str, Any] = {"max_completion_tokens": 10}
HOLD = prompt_nanos(SHORT, **TEN) + 10 * PER_OUTPUT


async def budgeted(relay: Relay, nanos: int, window: Window = "day", **terms: Any) -> str:
    """A key of a new account that has far more than this budget."""
    return await relay.key(credits_of(CREDIT), budget=Budget(nanos=nanos, window=window), **terms)


async def spent_of(relay: Relay, key: str) -> int:
    return CREDIT - await balance(relay, key)


async def budget_scopes(relay: Relay, key: str, valkey_url: str) -> dict[str, dict[Any, Any]]:
    """The key's budgets in the till on which something was spent, by window and first day."""
    async with redis.asyncio.from_url(valkey_url, decode_responses=True) as till:
        names = [name async for name in till.scan_iter(f"{shard_prefix(relay.account_of(key))}b:*")]
        found = [await till.hgetall(name) for name in names]
    return {
        name.split(":", 4)[-1]: dict(one)
        for name, one in zip(names, found, strict=True)
        if "open" in one or one.get("version") != "0"
    }


@pytest.mark.parametrize("window", WINDOWS)
async def test_a_budget_that_is_used_up_is_a_402_with_its_limit_and_reset(
    relay: Relay, window: Window, valkey_url: str
) -> None:
    key = await budgeted(relay, HOLD + 1000, window)
    first = await relay.call(key, SHORT, **TEN)
    second = await relay.call(key, SHORT, **TEN)

    assert (first.status, second.status) == (200, 402)
    error = error_of(second)
    assert (error["code"], error["type"]) == ("key_limit_reached", "insufficient_quota")
    ends_at = window_end(window, window_start(window, datetime.now(UTC)))
    resets = "never resets" if ends_at is None else f"resets at {ends_at:%Y-%m-%dT00:00:00Z}"
    assert resets in error["message"]
    assert f"budget of {credits_of(HOLD + 1000).rstrip('0')} credits" in error["message"]
    receipt = await relay.only_receipt(key)
    assert receipt["budget_window"] == window
    await assert_clean(relay, valkey_url)


async def test_two_hundred_calls_at_once_stay_within_a_budget_for_twenty(
    relay: Relay, valkey_url: str
) -> None:
    limit = 20 * HOLD
    key = await budgeted(relay, limit)
    free = await relay.gateway.key(relay.account_of(key))
    relay._accounts[free] = relay.account_of(key)
    seen = []

    async def watch() -> None:
        while True:
            for scope in (await budget_scopes(relay, key, valkey_url)).values():
                fields = ("posted", "uncommitted", "held")
                seen.append(sum(int(scope.get(field, 0)) for field in fields))
            await asyncio.sleep(0.005)

    watching = asyncio.get_running_loop().create_task(watch())
    calls = [relay.call(key, SHORT, **TEN) for _ in range(200)]
    outcomes = await asyncio.gather(*calls)
    # What was held too much came back, so some more fit in; then it is at its end.
    while (last := await relay.call(key, SHORT, **TEN)).status == 200:
        outcomes.append(last)
    watching.cancel()

    statuses = [outcome.status for outcome in outcomes]
    assert set(statuses) == {200, 402}
    assert statuses.count(200) >= 20
    codes = {error_of(outcome)["code"] for outcome in outcomes if outcome.status == 402}
    assert codes == {"key_limit_reached"}
    await relay.at_rest()
    spent = await spent_of(relay, key)
    assert limit - HOLD < spent <= limit
    assert seen
    assert max(seen) <= limit
    assert (await relay.call(free, SHORT, **TEN)).status == 200
    await assert_clean(relay, valkey_url)


async def test_the_output_is_lowered_to_what_the_budget_affords(relay: Relay) -> None:
    key = await budgeted(relay, prompt_nanos(LONG) + 100 * PER_OUTPUT)
    outcome = await relay.call(key, LONG)

    assert outcome.status == 200
    assert outcome.head is not None
    assert 100 <= int(outcome.head.get("x-farebox-max-tokens") or 0) <= 150


async def test_a_stream_ends_where_its_budget_does(relay: Relay, valkey_url: str) -> None:
    """Another key's growth of the same account is not touched."""
    limit = prompt_nanos(LONG, stream=True) + 300 * PER_OUTPUT
    key = await budgeted(relay, limit)
    other = await relay.call(key, SHORT, **TEN)  # so that there is less than was looked for
    outcome = await relay.call(key, LONG, stream=True)

    assert (other.status, outcome.status) == (200, 200)
    assert finishes(frames_of(outcome)) == {0: "length"}
    receipts = await relay.receipts(key, 2)
    assert receipts[-1]["outcome"] == "credit_exhausted"
    assert await spent_of(relay, key) <= limit
    await assert_clean(relay, valkey_url)


async def test_a_key_without_a_budget_has_no_scope_of_one(relay: Relay, valkey_url: str) -> None:
    key = await relay.key()
    assert (await relay.call(key, SHORT, **TEN)).status == 200

    assert (await relay.only_receipt(key))["budget_window"] == ""
    assert await budget_scopes(relay, key, valkey_url) == {}


async def admit_at(relay: Relay, key: str, moment: datetime) -> Call:
    """A request that came at that moment, admitted."""
    services = relay.services
    caller = await services.authenticator.authenticate({b"authorization": f"Bearer {key}".encode()})
    arrival = Arrival.now()
    arrival.started_at = moment.timestamp()
    facts = read_facts(relay.chat(key, SHORT, **TEN).body)
    call = prepare(services, arrival, caller, facts)
    await admit(services, call)
    return call


async def end(relay: Relay, call: Call) -> int:
    """End it with all that it holds; returns the price."""
    usage = Usage(input_tokens=call.input_ceiling, output_tokens=10)
    charge = charge_for(usage, call.rates, None, call.model.markup_bps, call.hold_nanos)
    bill = Bill(usage=usage, usage_source=UsageSource.PROVIDER, charge=charge)
    settled = end_call(relay.services, call, Outcome.COMPLETE, bill, Seen())
    await settled.committed
    return charge.price_nanos


MIDNIGHT = datetime(2031, 3, 3, tzinfo=UTC)  # a Monday


@pytest.mark.parametrize(
    ("window", "begins"),
    [("day", MIDNIGHT), ("week", MIDNIGHT), ("month", datetime(2031, 3, 1, tzinfo=UTC))],
)
async def test_a_new_window_begins_at_midnight(
    relay: Relay, window: Window, begins: datetime, valkey_url: str
) -> None:
    """Which window a request is of is decided by when it came, not by when it ends."""
    key = await budgeted(relay, HOLD, window)
    last = begins - timedelta(microseconds=1)
    before = await admit_at(relay, key, last)
    with pytest.raises(KeyLimitReached) as caught:
        await admit_at(relay, key, last)
    after = await admit_at(relay, key, begins)  # while the other is still open
    with pytest.raises(KeyLimitReached):
        await admit_at(relay, key, begins + timedelta(hours=23))
    prices = [await end(relay, call) for call in (before, after)]
    with pytest.raises(KeyLimitReached):
        await admit_at(relay, key, begins)

    assert caught.value.resets_at == begins
    assert caught.value.limit_nanos == HOLD
    await relay.at_rest()
    query = """
        SELECT window_start, spent_nanos, version FROM scope_spend AS s
        JOIN virtual_keys AS v ON v.id = s.virtual_key_id
        WHERE v.billing_account_id = $1 ORDER BY window_start"""
    rows = await relay.gateway.pool.fetch(query, relay.account_of(key))
    days = [window_start("day", last), begins]
    assert [tuple(row) for row in rows] == [
        (day, price, 1) for day, price in zip(days, prices, strict=True)
    ]
    starts = [window_start(window, last), begins]
    scopes = await budget_scopes(relay, key, valkey_url)
    assert set(scopes) == {f"{window}:{start:%Y%m%d}" for start in starts}
    await assert_clean(relay, valkey_url)


async def test_a_total_budget_does_not_stay_in_the_till_for_ever(
    relay: Relay, valkey_url: str
) -> None:
    """Grants have one each: whoever mints them for ever would fill the till."""
    key = await budgeted(relay, HOLD, "total")
    assert (await relay.call(key, SHORT, **TEN)).status == 200
    async with redis.asyncio.from_url(valkey_url) as till:
        (name,) = [one async for one in till.scan_iter(f"{shard_prefix(relay.account_of(key))}b:*")]
        left_s = await till.ttl(name)

    assert timedelta(days=34) < timedelta(seconds=left_s) <= timedelta(days=35)


async def test_a_total_budget_never_begins_anew(relay: Relay) -> None:
    key = await budgeted(relay, HOLD, "total")
    await end(relay, await admit_at(relay, key, MIDNIGHT))
    with pytest.raises(KeyLimitReached) as caught:
        await admit_at(relay, key, MIDNIGHT + timedelta(days=4000))

    assert caught.value.resets_at is None


async def test_a_month_is_the_sum_of_its_days_also_in_a_till_that_lost_it(
    relay: Relay, valkey_url: str
) -> None:
    key = await budgeted(relay, 3 * HOLD, "month")
    prices = [
        await end(relay, await admit_at(relay, key, MIDNIGHT + timedelta(days=day)))
        for day in range(3)
    ]
    await relay.at_rest()
    (name,) = await budget_scopes(relay, key, valkey_url)
    async with redis.asyncio.from_url(valkey_url) as till:
        owner = f"{shard_prefix(relay.account_of(key))}b:"
        (raw,) = [one async for one in till.scan_iter(f"{owner}*:{name}")]
        expires_at = await till.expiretime(raw)
        await till.delete(raw)
    with pytest.raises(KeyLimitReached) as caught:
        await admit_at(relay, key, MIDNIGHT + timedelta(days=20))

    assert name == "month:20310301"
    assert caught.value.available_nanos == 3 * HOLD - sum(prices)
    scope = (await budget_scopes(relay, key, valkey_url))[name]
    assert (scope["posted"], scope["version"]) == (str(sum(prices)), "3")
    ended_at = datetime(2031, 4, 1, tzinfo=UTC) + timedelta(days=35)
    assert expires_at == int(ended_at.timestamp())
