"""Money that nobody can be credited for waits, and is credited once when somebody can be."""

import asyncio
from typing import Any

import pytest

from billing import book
from billing.book import Pool
from billing.errors import (
    AccountUnknown,
    CreditTooLarge,
    TransferNotInSuspense,
    TransferUnknown,
)
from billing.money import NANOS_MAX
from billing.payment_states import Suspense
from billing.payments import (
    Settlement,
    claim_for,
    claim_suspense,
    credit_transfer,
)
from config.ids import new_id
from tests.support.payments import (
    INSERT_WALLET,
    check,
    credit,
    key_of,
    new_address,
    payer,
    posted,
    transfer_from,
)

FIVE_USD = 5_000_000_000


async def test_an_unknown_senders_money_waits_and_is_claimed_by_proving_the_wallet(
    pool: Pool,
) -> None:
    account_id, _ = await payer(pool)
    wallet = new_address()
    transfer = transfer_from(wallet)
    assert (await credit(pool, transfer)).outcome == "suspense"
    assert (await credit(pool, transfer)).suspense_reason == "unknown_sender"
    await check(pool)

    async with book.acquire(pool) as conn:
        assert await claim_suspense(conn, wallet) == [Settlement(**SUSPENSE)]
        await conn.execute(INSERT_WALLET, account_id, wallet)
        (settled,) = await claim_suspense(conn, wallet.upper().replace("X", "x"))
        assert await claim_suspense(conn, wallet) == []

    assert settled.outcome == "credited"
    assert await posted(pool, account_id) == FIVE_USD
    await check(pool)


SUSPENSE: dict[str, Any] = {"outcome": "suspense", "suspense_reason": "unknown_sender"}


async def test_a_wallet_that_is_proved_at_the_same_moment_loses_nothing(pool: Pool) -> None:
    for _ in range(15):
        account_id, _ = await payer(pool)
        transfer = transfer_from(wallet := new_address())

        async def prove(owner: Any = account_id, address: str = wallet) -> None:
            async with book.acquire(pool) as conn:
                await conn.execute(INSERT_WALLET, owner, address)
                await claim_suspense(conn, address)

        await asyncio.gather(credit(pool, transfer), prove())

        assert await posted(pool, account_id) == FIVE_USD


async def test_what_is_held_back_is_nobodys_until_an_operator_says_whose(pool: Pool) -> None:
    account_id, wallet = await payer(pool)
    transfer = transfer_from(wallet)
    settled = await credit(pool, transfer, hold_back=Suspense.FROM_SWEEP)
    assert settled.outcome == "suspense"
    async with book.acquire(pool) as conn:
        assert await claim_suspense(conn, wallet) == []
        first = await claim_for(conn, key_of(transfer), account_id, "by letter")
        again = await claim_for(conn, key_of(transfer), account_id, "by letter")

    assert (first.outcome, again.outcome) == ("credited", "known")
    assert await posted(pool, account_id) == FIVE_USD
    await check(pool)


async def test_an_operator_gives_away_nothing_that_is_somebodys(pool: Pool) -> None:
    _, wallet = await payer(pool)
    other, _ = await payer(pool)
    transfer = transfer_from(wallet)
    async with book.acquire(pool) as conn:
        with pytest.raises(TransferUnknown):
            await claim_for(conn, key_of(transfer), other, "")
        unknown = transfer_from(new_address())
        await credit_transfer(conn, unknown)
        with pytest.raises(AccountUnknown):
            await claim_for(conn, key_of(unknown), unused_id(), "")
        await credit_transfer(conn, transfer)
        with pytest.raises(TransferNotInSuspense):
            await claim_for(conn, key_of(transfer), other, "")
    assert await posted(pool, other) == 0


def unused_id() -> Any:
    return new_id()


async def test_what_the_till_cannot_count_waits_until_there_is_room(pool: Pool) -> None:
    account_id, wallet = await payer(pool)
    rich = (NANOS_MAX - FIVE_USD) // 1000
    await credit(pool, transfer_from(wallet, rich))
    too_much = transfer_from(wallet, 6_000_000)

    settled = await credit(pool, too_much)

    assert (settled.outcome, settled.suspense_reason) == ("suspense", "too_large")
    async with book.acquire(pool) as conn:
        with pytest.raises(CreditTooLarge):
            await claim_for(conn, key_of(too_much), account_id, "")
    assert (await credit(pool, transfer_from(wallet, 5_000_000))).outcome == "credited"
    assert await posted(pool, account_id) == rich * 1000 + FIVE_USD <= NANOS_MAX
    await check(pool)
