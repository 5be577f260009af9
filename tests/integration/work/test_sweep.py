"""What a dead worker left: holds end once, at what was certain, and every receipt is posted."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from msgspec.structs import replace

from billing.book import acquire
from billing.fleet import say_alive, say_gone
from billing.prices import CostSource, Rates
from billing.prices_store import sync_config_prices
from billing.receipts import ChargeReceipt, Outcome, encode_receipt
from billing.sweep import Sweeper
from billing.till_wire import Renewal
from billing.usage import UsageSource
from config.ids import id_text
from tests.support.books import Account, check_book, make_account
from tests.support.gateway import eventually
from tests.support.settlers import Rig, running_settler

RATES = Rates(
    input_rate=10**9,
    output_rate=4 * 10**9,
    cached_input_rate=10**9,
    cache_write_rate=10**9,
    reasoning_rate=4 * 10**9,
)
HOLD = 10**6


@pytest.fixture
async def rig(book_url: str, till_url: str) -> AsyncIterator[Rig]:
    async with running_settler(book_url, till_url) as rig:
        async with acquire(rig.pool) as conn:
            await sync_config_prices(conn, {"m": RATES})
        yield rig


def sweeper(rig: Rig, *, grace_s: float = 0, takeover_s: float = 0) -> Sweeper:
    return Sweeper(rig.pool, rig.till, grace_s=grace_s, takeover_s=takeover_s)


async def draft_of(rig: Rig, account: Account, **fields: Any) -> ChargeReceipt:
    version = await rig.pool.fetchval("SELECT price_version FROM model_prices")
    return replace(
        account.receipt(0, reported_cost_usd=None, cost_source=CostSource.NONE, hold_nanos=HOLD),
        price_version=version,
        markup_bps=20_000,
        outcome=Outcome.RECOVERED,
        **fields,
    )


async def hold(rig: Rig, draft: ChargeReceipt, account: Account, *, is_sent: bool = True) -> str:
    """A hold whose lease is over at once."""
    request_id = draft.source_reference
    await rig.till.admit(account.scopes, request_id, HOLD, encode_receipt(draft))
    if is_sent:
        rig.till.forwarded(account.scopes, request_id)
    await rig.till.link.command(("ZADD", account.scopes.leases_key, 1, request_id))
    return request_id


async def receipt_of(rig: Rig, draft: ChargeReceipt) -> dict[str, Any]:
    query = "SELECT * FROM charge_receipts WHERE request_id = $1"
    row = await rig.pool.fetchrow(query, draft.request_id)
    assert row is not None
    return dict(row)


async def adjustments(rig: Rig) -> list[tuple[int, str]]:
    query = "SELECT amount_nanos, reference FROM credit_ledger WHERE reason = 'adjust'"
    return [(row["amount_nanos"], row["reference"]) for row in await rig.pool.fetch(query)]


async def at_peace(rig: Rig, account: Account, spent: int) -> None:
    """Nothing is held or waits, and till and book agree on what was spent."""
    seen = await rig.look(account)
    assert (seen.holds, seen.outbox, seen.leases) == ({}, {}, 0)
    assert (seen.held, seen.uncommitted, seen.open, seen.key_open) == (0, 0, 0, 0)
    assert seen.available == 10**9 - spent
    await check_book(rig.pool)


async def test_a_forwarded_request_costs_what_was_written_down(rig: Rig) -> None:
    account = await make_account(rig.pool)
    draft = await draft_of(rig, account, input_tokens=10, output_tokens=5)
    await hold(rig, draft, account)

    done = await sweeper(rig).sweep()

    assert done == {"recovered": 1, "posted": 1}
    receipt = await receipt_of(rig, draft)
    assert (receipt["outcome"], receipt["usage_source"]) == ("recovered", "checkpoint")
    assert (receipt["provider_cost_nanos"], receipt["price_nanos"]) == (30_000, 60_000)
    await at_peace(rig, account, 60_000)


async def test_a_request_that_was_never_forwarded_is_free(rig: Rig) -> None:
    account = await make_account(rig.pool)
    draft = await draft_of(rig, account, input_tokens=10)
    await hold(rig, draft, account, is_sent=False)

    assert await sweeper(rig).sweep() == {"voided": 1, "posted": 1}

    receipt = await receipt_of(rig, draft)
    assert (receipt["outcome"], receipt["price_nanos"], receipt["input_tokens"]) == ("voided", 0, 0)
    await at_peace(rig, account, 0)


async def test_a_recovered_price_never_exceeds_the_hold(rig: Rig) -> None:
    account = await make_account(rig.pool)
    draft = await draft_of(rig, account, output_tokens=10**6)
    await hold(rig, draft, account)

    await sweeper(rig).sweep()

    receipt = await receipt_of(rig, draft)
    assert receipt["price_nanos"] == HOLD
    assert receipt["overrun_nanos"] == 8 * 10**9 - HOLD
    await at_peace(rig, account, HOLD)


async def test_a_hold_is_left_alone_while_its_lease_or_its_worker_lives(rig: Rig) -> None:
    account = await make_account(rig.pool)
    draft = await draft_of(rig, account, input_tokens=10)
    request_id = await hold(rig, draft, account)
    leases = account.scopes.leases_key
    second, _ = await rig.till.link.command(("TIME",))
    async with acquire(rig.pool) as conn:
        await say_alive(conn, "w_test")

    patient, quick = sweeper(rig, grace_s=600), sweeper(rig, grace_s=0.3)
    await rig.till.link.command(("ZADD", leases, int(second) * 1000 - 500_000, request_id))
    leased = [await patient.sweep() for _ in range(2)]
    alive = [await quick.sweep() for _ in range(2)]
    async with acquire(rig.pool) as conn:
        await say_gone(conn, "w_test")

    async def swept() -> dict[str, int] | None:
        return await quick.sweep() or None

    assert (*leased, *alive) == ({}, {}, {}, {})
    assert await eventually(swept) == {"recovered": 1, "posted": 1}


async def test_nobody_is_dead_before_the_sweeper_has_watched_for_a_while(rig: Rig) -> None:
    """Till and book were away for long: all leases are over, and nobody could say that it lives."""
    account = await make_account(rig.pool)
    request_id = await hold(rig, await draft_of(rig, account, input_tokens=1), account)
    one = sweeper(rig, grace_s=5)

    at_first = [await one.sweep() for _ in range(3)]
    renewed = Renewal(request_id=request_id, hold_nanos=HOLD, is_forwarded=True)
    await rig.till.renew(account.scopes, renewed)

    assert at_first == [{}] * 3
    assert await sweeper(rig).sweep() == {}


async def test_what_a_live_worker_forgot_for_long_is_swept(rig: Rig) -> None:
    """Its end was lost with the till's last second: nobody else would ever end it."""
    account = await make_account(rig.pool)
    await hold(rig, await draft_of(rig, account, input_tokens=1), account)
    async with acquire(rig.pool) as conn:
        await say_alive(conn, "w_test")
    one = sweeper(rig, grace_s=0.05)

    async def swept() -> bool | None:
        return await one.sweep() == {"recovered": 1, "posted": 1} or None

    # Not at first sight: the till may have been away, and nobody could renew anything.
    assert await one.sweep() == {}
    await eventually(swept)


async def test_a_till_that_was_away_for_long_ends_nothing_of_a_live_worker(rig: Rig) -> None:
    account = await make_account(rig.pool)
    request_id = await hold(rig, await draft_of(rig, account, input_tokens=1), account)
    async with acquire(rig.pool) as conn:
        await say_alive(conn, "w_test")
    one = sweeper(rig, grace_s=0.05)

    for ends_ms in range(1, 20):
        await rig.till.link.command(("ZADD", account.scopes.leases_key, ends_ms, request_id))
        assert await one.sweep() == {}
        await asyncio.sleep(0.02)


async def test_a_request_that_was_forwarded_while_the_sweeper_looked_is_not_free(rig: Rig) -> None:
    account = await make_account(rig.pool)
    draft = await draft_of(rig, account, input_tokens=10)
    await hold(rig, draft, account)
    voided = replace(draft, outcome=Outcome.VOIDED, input_tokens=0)

    assert await rig.till.sweep(account.scopes, voided, "H", 0) == b"changed"
    assert (await rig.look(account)).held == HOLD


async def test_two_sweepers_at_once_end_everything_once(rig: Rig) -> None:
    account = await make_account(rig.pool)
    drafts = [await draft_of(rig, account, input_tokens=10) for _ in range(30)]
    for draft in drafts:
        await hold(rig, draft, account)

    await asyncio.gather(*(sweeper(rig).sweep() for _ in range(3)))

    assert await rig.pool.fetchval("SELECT count(*) FROM charge_receipts") == 30
    await at_peace(rig, account, 30 * 20_000)


async def test_a_receipt_that_its_worker_never_posted_is_posted(rig: Rig) -> None:
    account = await make_account(rig.pool)
    receipt = account.receipt(700, hold_nanos=HOLD)
    request_id = receipt.source_reference
    await rig.till.admit(account.scopes, request_id, HOLD, encode_receipt(receipt))
    await rig.till.settle(account.scopes, request_id, 700, encode_receipt(receipt))
    slow = sweeper(rig, takeover_s=60)

    assert await slow.sweep() == {}
    assert await sweeper(rig).sweep() == {"posted": 1}

    await at_peace(rig, account, 700)


@pytest.mark.parametrize("price", [0, 30_000, 60_000, 500_000])
async def test_a_worker_that_wakes_up_posts_the_difference_once(rig: Rig, price: int) -> None:
    account = await make_account(rig.pool)
    draft = await draft_of(rig, account, input_tokens=10, output_tokens=5)
    request_id = await hold(rig, draft, account)
    await sweeper(rig).sweep()
    own = replace(
        account.receipt(price, hold_nanos=HOLD),
        request_id=draft.request_id,
        source_reference=request_id,
    )

    for _ in range(2):
        settled = rig.settler.submit(account.scopes, request_id, replace(own))
        await settled.committed
        await rig.at_rest()

    wanted = [] if price == 60_000 else [(60_000 - price, str(draft.request_id))]
    assert await adjustments(rig) == wanted
    assert (await receipt_of(rig, draft))["price_nanos"] == 60_000
    seen = await rig.look(account)
    assert (seen.available, seen.outbox, seen.holds) == (10**9 - price, {}, {})


async def test_an_adjustment_never_takes_more_than_was_held_when_it_was_swept(rig: Rig) -> None:
    """The till had forgotten a growth of the hold that the worker knows of."""
    account = await make_account(rig.pool)
    draft = await draft_of(rig, account, input_tokens=10, output_tokens=5)
    await hold(rig, draft, account)
    await sweeper(rig).sweep()
    own = replace(
        account.receipt(2 * HOLD),
        request_id=draft.request_id,
        source_reference=draft.source_reference,
    )

    await rig.settler.submit(account.scopes, own.source_reference, own).committed
    await rig.at_rest()

    assert await adjustments(rig) == [(60_000 - HOLD, str(draft.request_id))]
    assert (await rig.look(account)).available == 10**9 - HOLD


async def test_a_sweeper_never_corrects_what_the_worker_said(rig: Rig) -> None:
    """The till lost the settlement; what the worker posted stands."""
    account = await make_account(rig.pool)
    draft = await draft_of(rig, account, input_tokens=10)
    own = replace(
        account.receipt(700, hold_nanos=HOLD),
        request_id=draft.request_id,
        source_reference=draft.source_reference,
    )
    settled = rig.settler.submit(account.scopes, own.source_reference, own)
    await settled.committed
    await rig.at_rest()
    await hold(rig, draft, account)

    await sweeper(rig).sweep()

    assert await adjustments(rig) == []
    assert (await receipt_of(rig, draft))["usage_source"] == UsageSource.NONE
    await at_peace(rig, account, 700)


async def test_what_cannot_be_read_is_said_once_and_holds_up_nobody(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    account = await make_account(rig.pool)
    draft = await draft_of(rig, account, input_tokens=10)
    request_id = await hold(rig, draft, account)
    broken = await draft_of(rig, account)
    await hold(rig, broken, account)
    name = f"{account.scopes.hold_prefix}{broken.source_reference}"
    await rig.till.link.command(("HSET", name, "draft", "{}"))
    one = sweeper(rig)

    done = [await one.sweep() for _ in range(2)]

    assert done == [{"recovered": 1, "posted": 1}, {}]
    assert [r.message for r in caplog.records].count("sweep.unreadable") == 1
    assert list((await rig.look(account)).holds) == [broken.source_reference]
    assert request_id == id_text(draft.request_id)


async def test_more_settled_receipts_than_ages_are_kept_for_are_all_posted(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("billing.sweep.SEEN_MAX", 4)
    one = sweeper(rig, takeover_s=0.05)
    for _ in range(9):
        account = await make_account(rig.pool)
        receipt = account.receipt(5)
        data = encode_receipt(receipt)
        await rig.till.settle(account.scopes, receipt.source_reference, 5, data)

    async def all_posted() -> bool | None:
        await one.sweep()
        return await rig.pool.fetchval("SELECT count(*) FROM charge_receipts") == 9 or None

    await eventually(all_posted)
    await check_book(rig.pool)


async def test_a_lease_that_cannot_be_dropped_keeps_nobody_else_waiting(rig: Rig) -> None:
    broken = await make_account(rig.pool)
    await rig.till.link.command(("SET", broken.scopes.outbox_key, "no hash"))
    await rig.till.link.command(("ZADD", broken.scopes.leases_key, 1, "0" * 26))
    account = await make_account(rig.pool)
    while account.scopes.outbox_key <= broken.scopes.outbox_key:  # a later shard
        account = await make_account(rig.pool)
    await hold(rig, await draft_of(rig, account), account)

    assert await sweeper(rig).sweep() == {"recovered": 1, "posted": 1}
