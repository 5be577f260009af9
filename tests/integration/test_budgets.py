"""Budgets over several workers: what one of them holds, the others see."""

import asyncio
from typing import Any

from billing.audit import audit
from billing.till_scan import open_till
from keys.principal import Budget
from tests.support.audit_world import explain
from tests.support.gateway import make_settings, running_gateway, zoo_model
from tests.support.growth import PER_OUTPUT
from tests.support.rawclient import Outcome, chat, exchange
from tests.support.upstream.launch import Upstream

MODE = "plain:prompt=150,tokens=10"
ASKED: dict[str, Any] = {
    "model": "m",
    "messages": [{"role": "user", "content": "Where does this line end?"}],
    "max_completion_tokens": 10,
}
PRICE = 150 * 2000 + 10 * PER_OUTPUT
CALLS = 200


async def test_two_workers_stay_within_one_budget(
    book_url: str, till_url: str, upstream: Upstream
) -> None:
    """A budget for twenty, two hundred calls at once; the account pays for no more than that."""
    settings = make_settings(
        upstream.base_url, {"m": zoo_model(MODE)}, limits__output_tokens_min=10
    )
    limit = 20 * PRICE
    one_worker = running_gateway(book_url, till_url, upstream.base_url, settings)
    another = running_gateway(book_url, till_url, upstream.base_url, settings)
    async with one_worker as one, another as other:
        account_id = await one.account()
        key = await one.key(account_id, budget=Budget(nanos=limit, window="month"))
        free = await one.key(account_id)

        async def call(number: int, secret: str = key) -> Outcome:
            gateway = (one, other)[number % 2]
            return await exchange(gateway.base_url, chat(secret, ASKED))

        outcomes = list(await asyncio.gather(*map(call, range(CALLS))))
        # What was held for nothing came back; now it is used up to the last call that fits.
        while (last := await call(len(outcomes))).status == 200:
            outcomes.append(last)
        others = [await call(number, free) for number in range(2)]
        for gateway in (one, other):
            await gateway.at_rest()
        spent = await one.pool.fetchval("SELECT sum(spent_nanos) FROM scope_spend")
        async with one.pool.acquire() as conn, open_till(till_url) as till:
            report = await audit(conn, till, at_rest=True)

    refused = [outcome for outcome in (*outcomes, last) if outcome.status != 200]
    assert {outcome.status for outcome in refused} == {402}
    assert {outcome.json()["error"]["code"] for outcome in refused} == {"key_limit_reached"}
    served = len(outcomes) + 1 - len(refused)
    assert [outcome.status for outcome in others] == [200, 200]
    assert 15 < served <= 20
    assert limit - 2 * PRICE < spent - 2 * PRICE <= limit
    assert report.is_clean, explain(report)
