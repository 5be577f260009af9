"""What a dead worker held on a budget comes back, and what it spent is spent."""

from collections.abc import AsyncIterator

import pytest
from msgspec.structs import replace

from billing.book import acquire
from billing.errors import KeyLimitReached
from billing.prices_store import sync_config_prices
from billing.receipts import encode_receipt
from billing.till_wire import Renewal
from config.ids import id_text, new_id
from tests.integration.work.test_sweep import HOLD, RATES, draft_of, hold, sweeper
from tests.support.books import Account, check_book, make_account
from tests.support.settlers import Rig, running_settler


@pytest.fixture
async def rig(book_url: str, till_url: str) -> AsyncIterator[Rig]:
    async with running_settler(book_url, till_url) as rig:
        async with acquire(rig.pool) as conn:
            await sync_config_prices(conn, {"m": RATES})
        yield rig


async def budget_of(rig: Rig, account: Account) -> dict[str, int]:
    names = ("posted", "version", "uncommitted", "held", "open")
    found = await rig.till.link.command(("HMGET", account.scopes.scope_keys[-1], *names))
    return {name: int(value or 0) for name, value in zip(names, found, strict=True)}


def at_rest(posted: int, version: int) -> dict[str, int]:
    return {"posted": posted, "version": version, "uncommitted": 0, "held": 0, "open": 0}


async def test_a_hold_of_a_killed_worker_gives_its_budget_back(rig: Rig) -> None:
    account = await make_account(rig.pool, limit=HOLD + 50_000)
    await hold(rig, await draft_of(rig, account, input_tokens=10, output_tokens=5), account)
    with pytest.raises(KeyLimitReached):
        await rig.till.admit(account.scopes, id_text(new_id()), HOLD, b"{}")

    assert await sweeper(rig).sweep() == {"recovered": 1, "posted": 1}

    assert await budget_of(rig, account) == at_rest(60_000, 1)
    await rig.till.admit(account.scopes, id_text(new_id()), HOLD - 10_000, b"{}")
    await check_book(rig.pool)


async def test_a_receipt_that_its_worker_never_posted_is_spent(rig: Rig) -> None:
    account = await make_account(rig.pool, limit=HOLD)
    receipt = account.receipt(700, hold_nanos=HOLD)
    request_id, data = receipt.source_reference, encode_receipt(receipt)
    await rig.till.admit(account.scopes, request_id, HOLD, data)
    await rig.till.settle(account.scopes, request_id, 700, data)
    before = await budget_of(rig, account)

    assert await sweeper(rig).sweep() == {"posted": 1}

    assert before["uncommitted"] == 700
    assert await budget_of(rig, account) == at_rest(700, 1)


@pytest.mark.parametrize("price", [0, 30_000, 500_000])
async def test_a_worker_that_wakes_up_corrects_what_was_spent(rig: Rig, price: int) -> None:
    account = await make_account(rig.pool, limit=HOLD)
    draft = await draft_of(rig, account, input_tokens=10, output_tokens=5)
    request_id = await hold(rig, draft, account)
    await sweeper(rig).sweep()
    own = replace(
        account.receipt(price, hold_nanos=HOLD),
        request_id=draft.request_id,
        source_reference=request_id,
    )

    for _ in range(2):
        await rig.settler.submit(account.scopes, request_id, replace(own)).committed
        await rig.at_rest()

    assert await budget_of(rig, account) == at_rest(price, 2)
    await check_book(rig.pool)


async def test_a_guess_of_nothing_is_corrected_on_a_day_without_a_row(rig: Rig) -> None:
    account = await make_account(rig.pool, limit=HOLD)
    draft = await draft_of(rig, account)
    request_id = await hold(rig, draft, account, is_sent=False)
    assert (await sweeper(rig).sweep())["voided"] == 1
    own = replace(
        account.receipt(500, hold_nanos=HOLD),
        request_id=draft.request_id,
        source_reference=request_id,
    )

    await rig.settler.submit(account.scopes, request_id, own).committed
    await rig.at_rest()

    assert await budget_of(rig, account) == at_rest(500, 1)


async def test_a_hold_grows_within_its_budget_and_not_beyond(rig: Rig) -> None:
    account = await make_account(rig.pool, limit=1000)
    request_id = id_text(new_id())
    await rig.till.admit(account.scopes, request_id, 400, b"{}")

    answers = [
        await rig.till.renew(
            account.scopes, Renewal(request_id=request_id, hold_nanos=nanos, is_forwarded=True)
        )
        for nanos in (1000, 1001)
    ]

    assert answers == [[b"ok", 1000, 0], [b"short", 1000, 0]]


async def test_a_lowered_budget_refuses_what_is_new_and_ends_nothing(rig: Rig) -> None:
    account = await make_account(rig.pool, limit=1000)
    settled = await rig.end(account, 600)
    open_still = account.receipt(300, hold_nanos=400)
    await rig.till.admit(account.scopes, open_still.source_reference, 400, b"{}")
    lowered = Account(account.id, account.virtual_key_id, account.app_key_id, "", 500)
    with pytest.raises(KeyLimitReached) as caught:
        await rig.till.admit(lowered.scopes, id_text(new_id()), 1, b"{}")
    await settled.committed
    await rig.submit(account, open_still).committed
    await rig.at_rest()

    assert (caught.value.limit_nanos, caught.value.available_nanos) == (500, 500 - 1000)
    assert await budget_of(rig, account) == at_rest(900, 2)
