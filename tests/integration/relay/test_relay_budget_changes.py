"""A budget that is given, taken away and given again: what was spent meanwhile is spent."""

from typing import Any

import pytest

from billing.errors import KeyLimitReached
from billing.prices import charge_for
from billing.receipts import Outcome
from billing.usage import Usage, UsageSource
from gateway.protocols.chat import read_facts
from gateway.relay.admit import admit, prepare
from gateway.relay.call import Arrival, Call, Caller
from gateway.relay.seen import Seen
from gateway.relay.settle import Bill, end_call
from keys.keys_store import KeyChanges, update_key
from keys.principal import Budget
from tests.support.gateway import eventually
from tests.support.growth import OVERRIDES, PER_OUTPUT, assert_clean, prompt_nanos
from tests.support.relay import Relay, zoo

pytestmark = pytest.mark.asyncio(loop_scope="module")

# Answers about keys get old at once, or a test would wait for seconds.
OVERRIDES = {**OVERRIDES, "limits__output_tokens_min": 10, "keys__cache_ttl_ms": 100}
MODE = "plain:prompt=150,tokens=10"
MODELS = zoo(MODE, output_tokens_max=2000)
TEN: dict[str, Any] = {"max_completion_tokens": 10}
HOLD = prompt_nanos(MODE, **TEN) + 10 * PER_OUTPUT
DAY = Budget(nanos=2 * HOLD, window="day")


async def caller_of(relay: Relay, key: str) -> Caller:
    headers = {b"authorization": f"Bearer {key}".encode()}
    return await relay.services.authenticator.authenticate(headers)


async def give(relay: Relay, key: str, budget: Budget | None) -> None:
    """Change the key's budget; it is in force when this returns."""
    known = (await caller_of(relay, key)).principal
    assert known.app_key_id is not None
    async with relay.services.as_tenant(known.account_id) as conn:
        await update_key(conn, known.account_id, known.app_key_id, KeyChanges(budget=budget))
    await renewed(relay, key, budget)


async def renewed(relay: Relay, key: str, budget: Budget | None) -> None:
    """The key was looked up anew, and has this budget."""
    before = await caller_of(relay, key)

    async def is_new() -> bool | None:
        caller = await caller_of(relay, key)
        return True if caller is not before and caller.principal.budget == budget else None

    await eventually(is_new)


async def admitted(relay: Relay, key: str) -> Call:
    caller = await caller_of(relay, key)
    call = prepare(
        relay.services, Arrival.now(), caller, read_facts(relay.chat(key, MODE, **TEN).body)
    )
    await admit(relay.services, call)
    return call


async def end(relay: Relay, call: Call) -> None:
    """End it with all that it holds."""
    usage = Usage(input_tokens=call.input_ceiling, output_tokens=10)
    charge = charge_for(usage, call.rates, None, call.model.markup_bps, call.hold_nanos)
    bill = Bill(usage=usage, usage_source=UsageSource.PROVIDER, charge=charge)
    await end_call(relay.services, call, Outcome.COMPLETE, bill, Seen()).committed


async def left_of(relay: Relay, key: str) -> int:
    with pytest.raises(KeyLimitReached) as caught:
        await admitted(relay, key)
    return caught.value.available_nanos


@pytest.mark.parametrize("meanwhile", [None, Budget(nanos=100 * HOLD, window="week")])
async def test_what_was_spent_without_a_budget_counts_when_it_is_given_again(
    relay: Relay, valkey_url: str, meanwhile: Budget | None
) -> None:
    key = await relay.key(budget=DAY)
    await end(relay, await admitted(relay, key))  # the till knows this window now
    await give(relay, key, meanwhile)
    for _ in range(3):
        await end(relay, await admitted(relay, key))
    await relay.at_rest()
    await give(relay, key, DAY)

    assert await left_of(relay, key) == DAY.nanos - 4 * HOLD
    await assert_clean(relay, valkey_url)


async def test_what_was_open_when_a_budget_was_given_counts_when_it_ends(
    relay: Relay, valkey_url: str
) -> None:
    key = await relay.key()
    open_still = await admitted(relay, key)
    await give(relay, key, DAY)
    await end(relay, await admitted(relay, key))
    await end(relay, open_still)
    await relay.at_rest()
    await renewed(relay, key, DAY)

    assert await left_of(relay, key) == 0
    await assert_clean(relay, valkey_url)
