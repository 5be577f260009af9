"""Posting batches of receipts: each once, ledgers gapless, and never a deadlock."""

import asyncio
import random
import time
from decimal import Decimal
from uuid import UUID, uuid4

import pytest

from billing import book, history
from billing.book import BookRefused, Pool
from billing.errors import BookUnavailable
from billing.posting import post_receipts
from billing.receipts import (
    ChargeReceipt,
    FailedAttempt,
    Outcome,
    decode_receipt,
    encode_receipt,
)
from billing.till_epoch import AccountState
from tests.support.books import Account, balance, check_book, make_account, open_pool


async def post(pool: Pool, *receipts: ChargeReceipt) -> dict[UUID, AccountState]:
    async with book.acquire(pool) as conn:
        return {state.account_id: state for state in await post_receipts(conn, receipts)}


async def test_a_batch_of_several_accounts_is_posted_at_once(book_url: str) -> None:
    async with open_pool(book_url) as pool:
        one, two, idle = [await make_account(pool, 1000) for _ in range(3)]
        states = await post(
            pool, one.receipt(100), two.receipt(7), one.receipt(0), one.receipt(50), two.receipt(3)
        )
        await check_book(pool)

        assert (states[one.id].balance_nanos, states[one.id].version) == (850, 3)
        assert (states[two.id].balance_nanos, states[two.id].version) == (990, 3)
        assert idle.id not in states
        assert await pool.fetchval("SELECT count(*) FROM charge_receipts") == 5
        assert await pool.fetchval("SELECT count(*) FROM credit_ledger") == 3 + 4


async def test_every_field_of_a_receipt_is_kept(book_url: str) -> None:
    async with open_pool(book_url) as pool:
        account = await make_account(pool)
        receipt = account.receipt(
            123,
            hold_nanos=123,
            overrun_nanos=7,
            served_model="m-2",
            input_tokens=100,
            output_tokens=60,
            cached_tokens=11,
            cache_write_tokens=12,
            audio_input_tokens=13,
            reasoning_tokens=14,
            audio_output_tokens=15,
            reported_cost_usd=Decimal("0.0000001230000000000000000001"),
            upstream_id="chatcmpl-1",
            upstream_request_id="req",
            run_id="run",
            attempt=2,
            failed_attempts=(
                FailedAttempt(
                    provider="p", upstream_model='m "1"', status=503, reason="server_error", ms=7
                ),
            ),
            graph_id="graph",
            client_retry_count=3,
            client_request_id="mine",
            outcome=Outcome.CLIENT_LEFT,
        )
        # By way of the outbox, as the sweeper would post it.
        await post(pool, decode_receipt(encode_receipt(receipt)))
        async with book.acquire(pool) as conn:
            row = await history.find_receipt(conn, receipt.request_id)
            ledger = await history.find_ledger_row(conn, receipt.request_id)

    assert row is not None
    for name in ChargeReceipt.__struct_fields__:
        assert row[name] == getattr(receipt, name), name
    assert ledger is not None
    assert (ledger["amount_nanos"], ledger["balance_after_nanos"]) == (-123, 10**9 - 123)


async def test_a_replay_changes_nothing_and_says_the_state(book_url: str) -> None:
    async with open_pool(book_url) as pool:
        account = await make_account(pool, 1000)
        receipt = account.receipt(100)
        first = await post(pool, receipt)
        again = await post(pool, receipt)
        mixed = await post(pool, receipt, account.receipt(1), receipt)
        await check_book(pool)

    assert first == again
    assert mixed[account.id].balance_nanos == 899
    assert mixed[account.id].version == 3


async def test_duplicates_inside_one_batch_are_posted_once(book_url: str) -> None:
    async with open_pool(book_url) as pool:
        account = await make_account(pool, 1000)
        receipt, free = account.receipt(100), account.receipt(0)
        states = await post(pool, receipt, free, receipt, receipt, free)
        await check_book(pool)

        assert states[account.id].balance_nanos == 900
        assert await pool.fetchval("SELECT count(*) FROM charge_receipts") == 2


async def test_the_first_receipt_of_a_request_stands(book_url: str) -> None:
    """A sweeper and a worker that wakes up meet in the same primary key."""
    async with open_pool(book_url) as pool:
        account = await make_account(pool, 1000)
        worker = account.receipt(100, hold_nanos=500)
        sweeper = account.receipt(40, hold_nanos=500, request_id=worker.request_id)
        await post(pool, sweeper)
        states = await post(pool, worker)
        await check_book(pool)

    assert states[account.id].balance_nanos == 960


async def test_free_receipts_make_no_ledger_row_and_no_version(book_url: str) -> None:
    async with open_pool(book_url) as pool:
        account = await make_account(pool, 1000)
        states = await post(pool, *(account.receipt(0) for _ in range(20)))

    assert (states[account.id].balance_nanos, states[account.id].version) == (1000, 1)


async def test_debt_is_booked_not_refused(book_url: str) -> None:
    """The till refuses what cannot be paid; what was delivered is in the book in any case."""
    async with open_pool(book_url) as pool:
        account = await make_account(pool, 0)
        states = await post(pool, account.receipt(100))
        await check_book(pool)

    assert states[account.id].balance_nanos == -100


async def test_nothing_of_a_batch_with_a_bad_row_is_posted(book_url: str) -> None:
    async with open_pool(book_url) as pool:
        account = await make_account(pool, 1000)
        stranger = Account(uuid4(), account.virtual_key_id, account.app_key_id, "")
        for bad in (
            account.receipt(100, hold_nanos=99),
            account.receipt(1, served_model="a\x00b"),
            account.receipt(1, provider_cost_nanos=2**63),
            account.receipt(1, attempt=2**31),
            account.receipt(1, upstream_id="\ud800"),
            account.receipt(1, started_at="the day before"),
            account.receipt(1, price_version=404, outcome=Outcome.COMPLETE),
            stranger.receipt(1),
        ):
            with pytest.raises(BookRefused) as caught:
                await post(pool, account.receipt(5), bad)
            assert caught.value.reason
        with pytest.raises(BookRefused, match="can never be posted"):
            await post(pool, stranger.receipt(1), stranger.receipt(0))

        assert await balance(pool, account) == 1000
        assert await pool.fetchval("SELECT count(*) FROM charge_receipts") == 0


async def test_what_a_server_refuses_for_now_is_not_refused_for_good(book_url: str) -> None:
    """A fail-over to a read-only server threw every receipt of the moment away."""
    async with open_pool(book_url) as pool:
        account = await make_account(pool, 1000)
        receipt = account.receipt(1)
        async with book.acquire(pool) as conn:
            for trouble, mended in (
                ("SET default_transaction_read_only = on", "RESET default_transaction_read_only"),
                (
                    "ALTER TABLE charge_receipts RENAME COLUMN graph_id TO g",
                    "ALTER TABLE charge_receipts RENAME COLUMN g TO graph_id",
                ),
            ):
                await conn.execute(trouble)
                with pytest.raises(BookUnavailable):
                    await post_receipts(conn, [receipt])
                await conn.execute(mended)
        assert (await post(pool, receipt))[account.id].balance_nanos == 999


async def test_concurrent_batches_never_deadlock_and_lose_nothing(book_url: str) -> None:
    seeded = random.Random(11)
    async with open_pool(book_url, 6) as pool:
        accounts = [await make_account(pool, 10**9) for _ in range(8)]
        known: list[ChargeReceipt] = []
        ends_at = time.monotonic() + 3

        async def writer(number: int) -> int:
            own = random.Random(number)
            batches = 0
            while time.monotonic() < ends_at:
                fresh = [
                    own.choice(accounts).receipt(own.choice([0, 1, own.randrange(10**6)]))
                    for _ in range(own.randint(1, 40))
                ]
                replays = own.sample(known, min(len(known), 10))
                batch = fresh + replays
                own.shuffle(batch)
                known.extend(fresh)
                await post(pool, *batch)
                batches += 1
            return batches

        async def granter() -> None:
            while time.monotonic() < ends_at:
                async with book.acquire(pool) as conn:
                    account = seeded.choice(accounts)
                    await book.grant(conn, account.id, 5, f"g_{uuid4()}", "")

        batches = await asyncio.gather(*(writer(number) for number in range(6)), granter())
        await check_book(pool)
        spent = {account.id: 0 for account in accounts}
        for receipt in known:
            spent[receipt.billing_account_id] += receipt.price_nanos
        charged = await pool.fetch(
            "SELECT billing_account_id AS id, -sum(amount_nanos)::bigint AS nanos "
            "FROM credit_ledger WHERE reason = 'charge' GROUP BY 1"
        )
        assert {row["id"]: row["nanos"] for row in charged} == spent
        assert await pool.fetchval("SELECT count(*) FROM charge_receipts") == len(known)
        deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        assert await pool.fetchval(deadlocks) == 0
        assert sum(filter(None, batches)) > 30


async def test_a_connection_given_back_in_a_transaction_is_rolled_back(book_url: str) -> None:
    """The pool's own reset is off: nothing may leak from one use of a connection to the next."""
    async with open_pool(book_url, 1) as pool:
        loop = asyncio.get_running_loop()
        told: list[str] = []
        loop.set_exception_handler(lambda _, context: told.append(context["message"]))
        async with book.acquire(pool) as conn:
            await conn.transaction().start()
            await conn.execute("INSERT INTO users (id, label) VALUES ($1, 'x')", uuid4())
        async with book.acquire(pool) as conn:
            assert not conn.is_in_transaction()
            assert await conn.fetchval("SELECT count(*) FROM users") == 0
        loop.set_exception_handler(None)

    assert len(told) == 1
