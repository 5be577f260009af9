"""A transfer becomes credit once: whoever says it, how often, and whatever is cut off."""

import asyncio
import random
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import msgspec
import pytest

from billing import book
from billing.book import Pool
from billing.errors import (
    BookUnavailable,
    TransferChanged,
)
from billing.payment_attempts import events_of, find_attempt, transfers_of
from billing.payments import (
    REVERSED_REASON,
    see_transfer,
)
from tests.support.payments import (
    check,
    credit,
    intent,
    ledger,
    new_hash,
    payer,
    posted,
    reverse,
    state_of,
    status,
    submitted,
    transfer_from,
)

FIVE_USD = 5_000_000_000


async def test_a_submitted_payment_is_credited_exactly(pool: Pool) -> None:
    account_id, wallet = await payer(pool)
    transfer = transfer_from(wallet)
    attempt_id = await submitted(pool, account_id, transfer.tx_hash)

    settled = await credit(pool, transfer)

    assert settled.outcome == "credited"
    assert settled.account is not None
    assert (settled.account.balance_nanos, settled.account.version) == (FIVE_USD, 1)
    reference = f"8453:{transfer.tx_hash}:0"
    assert await ledger(pool, account_id) == [("deposit", reference, FIVE_USD)]
    assert await status(pool, attempt_id) == "CREDITED"
    async with book.acquire(pool) as conn:
        steps = [(e["event"], e["to_status"]) for e in await events_of(conn, attempt_id)]
        record = await find_attempt(conn, account_id, attempt_id)
        (shown,) = await transfers_of(conn, attempt_id)
    assert [step for step in steps if step[0] != "TRANSFER_CHANGED"] == [
        ("INTENT_CREATED", "CREATED_INTENT"),
        ("TX_SUBMITTED", "PENDING_UNVERIFIED"),
        ("STATUS_CHANGED", "PENDING_UNVERIFIED"),
        ("STATUS_CHANGED", "CREDITED"),
    ]
    assert ("TRANSFER_CHANGED", "credited") in steps
    assert record.credited_units == record.units == 5_000_000
    assert shown["state"] == "credited"
    await check(pool)


async def test_twenty_at_once_and_again_are_one_credit(pool: Pool) -> None:
    account_id, wallet = await payer(pool)
    transfer = transfer_from(wallet, 1_234_567)

    settled = await asyncio.gather(*(credit(pool, transfer) for _ in range(20)))
    again = [await credit(pool, transfer) for _ in range(3)]

    assert sorted(each.outcome for each in settled) == ["credited", *["known"] * 19]
    states = {each.account for each in (*settled, *again)}
    assert [state.balance_nanos for state in states if state is not None] == [1_234_567_000]
    assert len(await ledger(pool, account_id)) == 1
    assert await posted(pool, account_id) == 1_234_567_000
    await check(pool)


async def test_many_transfers_of_many_accounts_at_once_deadlock_nobody(pool: Pool) -> None:
    payers = [await payer(pool) for _ in range(4)]
    sent = [transfer_from(wallet, 1_000_000 + n) for n in range(6) for _, wallet in payers]
    jobs = sent * 3
    random.Random(7).shuffle(jobs)

    await asyncio.gather(*(credit(pool, transfer) for transfer in jobs))

    each = sum(1_000_000 + n for n in range(6)) * 1000
    assert [await posted(pool, account_id) for account_id, _ in payers] == [each] * 4
    await check(pool)


async def test_the_prover_of_the_sender_is_credited_whoever_submitted(pool: Pool) -> None:
    thief, _ = await payer(pool)
    owner, wallet = await payer(pool)
    transfer = transfer_from(wallet)
    stolen = await submitted(pool, thief, transfer.tx_hash)

    await credit(pool, transfer)

    assert (await posted(pool, thief), await posted(pool, owner)) == (0, FIVE_USD)
    assert await status(pool, stolen) == "PENDING_UNVERIFIED"
    await check(pool)


async def test_an_intent_of_which_nobody_spoke_is_confirmed_all_the_same(pool: Pool) -> None:
    account_id, wallet = await payer(pool)
    other = await intent(pool, account_id, 700)
    attempt_id = await intent(pool, account_id, 500)

    await credit(pool, transfer_from(wallet))

    assert await status(pool, attempt_id) == "CREDITED"
    assert await status(pool, other) == "CREATED_INTENT"


@pytest.mark.parametrize("units", [4_000_000, 6_000_000])
async def test_under_and_over_are_credited_as_they_are(pool: Pool, units: int) -> None:
    account_id, wallet = await payer(pool)
    transfer = transfer_from(wallet, units, block_time=datetime.now(UTC) + timedelta(hours=9))
    attempt_id = await submitted(pool, account_id, transfer.tx_hash)

    await credit(pool, transfer)

    assert await posted(pool, account_id) == units * 1000
    async with book.acquire(pool) as conn:
        record = await find_attempt(conn, account_id, attempt_id)
    assert (record.status, record.credited_units) == ("CREDITED", units)


async def test_each_log_of_a_transaction_is_its_own_senders(pool: Pool) -> None:
    one, first = await payer(pool)
    other, second = await payer(pool)
    tx = new_hash()
    attempt_id = await submitted(pool, one, tx)
    logs = [(first, 1_000_000), (second, 2_000_000), (first, 3_000_000)]
    for ordinal, (sender, units) in enumerate(logs):
        await credit(pool, transfer_from(sender, units, tx_hash=tx, ordinal=ordinal))

    assert await posted(pool, one) == 4_000_000_000
    assert await posted(pool, other) == 2_000_000_000
    async with book.acquire(pool) as conn:
        assert (await find_attempt(conn, one, attempt_id)).credited_units == 4_000_000
    await check(pool)


async def test_a_hash_that_is_submitted_after_the_credit_confirms_its_attempt(pool: Pool) -> None:
    account_id, wallet = await payer(pool)
    transfer = transfer_from(wallet, 4_000_000)
    await credit(pool, transfer)
    attempt_id = await submitted(pool, account_id, transfer.tx_hash)

    settled = await credit(pool, transfer)

    assert settled.outcome == "known"
    assert await status(pool, attempt_id) == "CREDITED"
    assert await posted(pool, account_id) == 4_000_000_000


async def test_a_reversal_takes_back_freezes_and_gives_again(pool: Pool) -> None:
    account_id, wallet = await payer(pool)
    transfer = transfer_from(wallet)
    attempt_id = await submitted(pool, account_id, transfer.tx_hash)
    await credit(pool, transfer)
    await spend(pool, account_id, 1)

    gone = await asyncio.gather(*(reverse(pool, transfer) for _ in range(5)))

    assert sorted(each.outcome for each in gone) == ["known"] * 4 + ["reversed"]
    assert {each.account.status for each in gone if each.account} == {"frozen"}
    assert await posted(pool, account_id) == -1
    await check(pool)
    moved = msgspec.structs.replace(transfer, block_hash=new_hash(), block_number=101)
    back = await asyncio.gather(*(credit(pool, moved) for _ in range(5)))
    assert sorted(each.outcome for each in back) == ["credited"] + ["known"] * 4
    assert {each.account.status for each in back if each.account} == {"active"}
    assert await posted(pool, account_id) == FIVE_USD - 1
    reference = f"8453:{transfer.tx_hash}:0"
    assert [row[:2] for row in await ledger(pool, account_id)] == [
        ("deposit", reference),
        ("adjust", "spent"),
        ("reversal", reference),
        ("deposit", f"{reference}:1"),
    ]
    assert await status(pool, attempt_id) == "CREDITED"
    await reverse(pool, moved)
    await credit(pool, moved)
    assert await posted(pool, account_id) == FIVE_USD - 1
    await check(pool)


async def test_a_reversal_does_not_thaw_what_an_operator_froze(pool: Pool) -> None:
    account_id, wallet = await payer(pool)
    transfer = transfer_from(wallet)
    await credit(pool, transfer)
    freeze = "UPDATE billing_accounts SET status = 'frozen', status_reason = 'abuse' WHERE id = $1"
    await pool.execute(freeze, account_id)

    await reverse(pool, transfer)
    back = await credit(pool, transfer)

    assert back.account is not None
    assert back.account.status == "frozen"
    reason = "SELECT status_reason FROM billing_accounts WHERE id = $1"
    assert await pool.fetchval(reason, account_id) == "abuse" != REVERSED_REASON


async def spend(pool: Pool, account_id: Any, more: int) -> None:
    """Everything and a bit more, as a charge that came late would."""
    async with book.acquire(pool) as conn:
        state = await book.read_account(conn, account_id)
        nanos, seq = state.balance_nanos, state.version + 1
        row = (account_id, seq, nanos, -more, nanos - more, "adjust", "spent", "{}")
        await conn.execute(book.INSERT_LEDGER_ROW, *row)
        await conn.execute(book.UPDATE_BALANCE, account_id, nanos - more, seq)


async def test_what_is_seen_is_shown_and_is_no_credit(pool: Pool) -> None:
    account_id, wallet = await payer(pool)
    transfer = transfer_from(wallet)
    attempt_id = await submitted(pool, account_id, transfer.tx_hash)
    async with book.acquire(pool) as conn:
        await see_transfer(conn, transfer)
        await see_transfer(conn, transfer)
        (shown,) = await transfers_of(conn, attempt_id)
    assert (shown["state"], await posted(pool, account_id)) == ("seen", 0)
    assert (await reverse(pool, transfer)).outcome == "reversed"
    async with book.acquire(pool) as conn:
        await see_transfer(conn, transfer)
    assert await state_of(pool, transfer) == "seen"

    await credit(pool, transfer)

    async with book.acquire(pool) as conn:
        await see_transfer(conn, transfer)
    assert await state_of(pool, transfer) == "credited"
    assert await posted(pool, account_id) == FIVE_USD
    await check(pool)


async def test_a_credit_is_not_changed_under_its_key(pool: Pool) -> None:
    account_id, wallet = await payer(pool)
    other, thief = await payer(pool)
    transfer = transfer_from(wallet)
    await credit(pool, transfer)
    changed = msgspec.structs.replace(transfer, sender=thief, units=7_000_000)

    with pytest.raises(TransferChanged):
        await credit(pool, changed)
    async with book.acquire(pool) as conn:
        with pytest.raises(TransferChanged):
            await see_transfer(conn, changed)
    await reverse(pool, transfer)
    await credit(pool, changed)

    assert (await posted(pool, account_id), await posted(pool, other)) == (0, 7_000_000_000)
    await check(pool)


@pytest.mark.parametrize("table", ["chain_transfers", "credit_ledger", "billing_accounts"])
async def test_a_connection_that_is_cut_in_the_middle_leaves_nothing_half_done(
    pool: Pool, book_url: str, table: str
) -> None:
    account_id, wallet = await payer(pool)
    transfer = transfer_from(wallet)
    attempt_id = await submitted(pool, account_id, transfer.tx_hash)
    admin = await asyncpg.connect(book_url)
    await admin.execute(CUT.format(table=table))

    with pytest.raises(BookUnavailable):
        await credit(pool, transfer)

    assert await admin.fetchval("SELECT count(*) FROM chain_transfers") == 0
    assert await ledger(pool, account_id) == []
    assert await status(pool, attempt_id) == "PENDING_UNVERIFIED"
    await admin.execute(f"DROP TRIGGER cut ON {table}")
    await admin.close()
    assert (await credit(pool, transfer)).outcome == "credited"
    assert await posted(pool, account_id) == FIVE_USD
    await check(pool)


# Whoever writes to the table loses the connection, as if the process or the network had died.
CUT = """
CREATE FUNCTION cut() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    PERFORM pg_terminate_backend(pg_backend_pid());
    RETURN NEW;
END
$$;
CREATE TRIGGER cut AFTER INSERT OR UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION cut();
"""
