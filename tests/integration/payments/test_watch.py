"""What whoever looks at the chain is told by the book."""

from datetime import timedelta

from billing import book
from billing.book import Pool
from billing.payments import see_transfer
from billing.payments_watch import (
    advance_cursor,
    credited_units,
    read_cursor,
    transfers_above,
)
from tests.support.payments import (
    CHAIN,
    TOKEN,
    TREASURY,
    credit,
    new_address,
    payer,
    reverse,
    transfer_from,
)

DAY = timedelta(days=1)


async def test_a_cursor_never_goes_back(pool: Pool) -> None:
    async with book.acquire(pool) as conn:
        assert await read_cursor(conn, CHAIN, TOKEN, TREASURY) is None
        for block in (0, 70, 50):
            await advance_cursor(conn, CHAIN, TOKEN, TREASURY, block)
        assert await read_cursor(conn, CHAIN, TOKEN, TREASURY) == 70
        assert await read_cursor(conn, CHAIN, TOKEN, TOKEN) is None


async def test_what_a_reorg_may_take_is_listed_until_it_is_final(pool: Pool) -> None:
    _, wallet = await payer(pool)
    sent = [transfer_from(wallet, block_number=number) for number in (10, 11, 12, 13)]
    await credit(pool, sent[0])
    await credit(pool, sent[1])
    async with book.acquire(pool) as conn:
        await see_transfer(conn, sent[2])
        await credit(pool, sent[3])
        await reverse(pool, sent[3])

        assert await transfers_above(conn, CHAIN, 10, 10) == sent[1:3]
        assert await transfers_above(conn, CHAIN, 10, 1) == sent[1:2]
        assert await transfers_above(conn, CHAIN + 1, 0, 10) == []


async def test_what_an_account_got_in_a_day_is_of_all_its_wallets(pool: Pool) -> None:
    account_id, wallet = await payer(pool)
    second = new_address()
    query = (
        "INSERT INTO wallets (address, user_id)"
        " SELECT $2, owner_user_id FROM billing_accounts WHERE id = $1"
    )
    await pool.execute(query, account_id, second)
    await credit(pool, transfer_from(wallet, 5))
    await credit(pool, transfer_from(second, 7))
    lost = transfer_from(wallet, 100)
    await credit(pool, lost)
    await reverse(pool, lost)

    async with book.acquire(pool) as conn:
        assert await credited_units(conn, wallet, DAY) == 12
        assert await credited_units(conn, second, timedelta(0)) == 0
        assert await credited_units(conn, new_address(), DAY) == 0
