"""Many connections settle at once what overlaps: every receipt once, whoever posts it.

Workers, sweepers and takeovers post the same receipts in batches of any order, over a few
accounts; connections are killed at any moment, also after the commit and before its answer.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from uuid import UUID

import asyncpg
import pytest
from msgspec.structs import replace

from billing.book import Connection, Pool, acquire, grant
from billing.errors import BookUnavailable
from billing.posting import post_receipts
from billing.receipts import ChargeReceipt, Outcome
from billing.usage import UsageSource
from tests.support.books import Account, check_book, make_account, open_pool
from tests.support.gateway import eventually

ACCOUNTS, RECEIPTS, POSTERS, BATCH_MAX = 6, 300, 12, 24
HOLD, CREDIT = 1000, 10**9


class Story:
    """What every request costs by its worker's word, and by a sweeper's guess if there was one."""

    def __init__(self, accounts: Sequence[Account], seeded: random.Random) -> None:
        self.random = seeded
        self.own: dict[UUID, ChargeReceipt] = {}
        self.guesses: dict[UUID, ChargeReceipt] = {}
        for _ in range(RECEIPTS):
            account = seeded.choice(accounts)
            own = account.receipt(seeded.randint(0, HOLD), hold_nanos=HOLD)
            self.own[own.request_id] = own
            if seeded.random() < 0.4:
                price = seeded.randint(0, HOLD)
                self.guesses[own.request_id] = replace(
                    account.receipt(price, hold_nanos=HOLD),
                    request_id=own.request_id,
                    source_reference=own.source_reference,
                    usage_source=UsageSource.CHECKPOINT,
                    outcome=Outcome.RECOVERED,
                )

    def batches(self) -> list[list[ChargeReceipt]]:
        """Every receipt once or more, in batches that overlap."""
        twice = self.random.choices(list(self.own.values()), k=RECEIPTS // 2)
        everything = [*self.own.values(), *twice, *self.guesses.values()]
        self.random.shuffle(everything)
        found = []
        while everything:
            size = self.random.randint(1, BATCH_MAX)
            found.append(everything[:size])
            del everything[:size]
        return found


async def post(pool: Pool, batch: Sequence[ChargeReceipt], tries: Counter[str]) -> None:
    """As a settler does: the same again until there is an answer."""
    while True:
        try:
            async with acquire(pool) as conn:
                await post_receipts(conn, batch)
        except BookUnavailable as exc:
            tries[type(exc.__cause__).__name__] += 1
            await asyncio.sleep(0.01)
        else:
            tries["posted"] += 1
            return


KILL_ANY = """
SELECT pg_terminate_backend(pid)
FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND state <> 'idle'
    AND query LIKE '%charge_receipts%'
ORDER BY random()
LIMIT 1
"""


async def killing(conn: Connection, killed: Counter[str]) -> None:
    """For ever: kill a connection that posts, at whatever it does."""
    while True:
        await asyncio.sleep(0.02)
        killed["killed"] += len(await conn.fetch(KILL_ANY))


async def run(pool: Pool, story: Story, killer: Pool | None) -> Counter[str]:
    batches, tries = story.batches(), Counter[str]()
    places = asyncio.Semaphore(POSTERS)

    async def poster(batch: list[ChargeReceipt]) -> None:
        async with places:
            await post(pool, batch, tries)

    async with asyncio.timeout(60):
        if killer is None:
            await asyncio.gather(*map(poster, batches))
            return tries
        async with acquire(killer) as conn:
            killing_task = asyncio.ensure_future(killing(conn, tries))
            await asyncio.gather(*map(poster, batches))
            killing_task.cancel()
            with suppress(asyncio.CancelledError):
                await killing_task
    return tries


async def totals(pool: Pool) -> dict[UUID, int]:
    """What each request cost in all."""
    query = """
        SELECT r.request_id, -coalesce(sum(l.amount_nanos), 0)::bigint AS total
        FROM charge_receipts AS r
        LEFT JOIN credit_ledger AS l
            ON l.reference = r.request_id::text AND l.reason IN ('charge', 'adjust')
        GROUP BY r.request_id
    """
    return {row["request_id"]: row["total"] for row in await pool.fetch(query)}


async def check(pool: Pool, story: Story, accounts: Sequence[Account]) -> None:
    await check_book(pool)
    wanted = {uid: receipt.price_nanos for uid, receipt in story.own.items()}
    assert await totals(pool) == wanted
    for account in accounts:
        spent = sum(
            receipt.price_nanos
            for receipt in story.own.values()
            if receipt.billing_account_id == account.id
        )
        row = await pool.fetchrow(
            "SELECT balance_nanos FROM billing_accounts WHERE id = $1", account.id
        )
        assert row is not None
        assert row["balance_nanos"] == CREDIT - spent


@pytest.mark.parametrize("seed", range(3))
async def test_batches_that_overlap_post_every_receipt_once(book_url: str, seed: int) -> None:
    async with open_pool(book_url, POSTERS + 1) as pool:
        accounts = [await make_account(pool, CREDIT) for _ in range(ACCOUNTS)]
        story = Story(accounts, random.Random(seed))
        tries = await run(pool, story, None)
        await check(pool, story, accounts)

    # With all locks taken in one order nothing has to be done again.
    assert set(tries) == {"posted"}


@pytest.mark.parametrize("seed", range(2))
async def test_connections_that_are_killed_lose_no_receipt_and_double_none(
    book_url: str, seed: int
) -> None:
    async with open_pool(book_url, POSTERS) as pool, open_pool(book_url, 1) as killer:
        accounts = [await make_account(killer, CREDIT) for _ in range(ACCOUNTS)]
        story = Story(accounts, random.Random(seed))
        tries = await run(pool, story, killer)
        await check(killer, story, accounts)

    assert tries["killed"] > 0


async def test_batches_that_get_no_lock_in_time_are_in_once_when_they_do(book_url: str) -> None:
    """Guesses are in already; what corrects them is refused for a while, then posted by four."""
    async with open_pool(book_url) as pool:
        account = await make_account(pool, CREDIT)
        story = Story([account], random.Random(7))
        guesses, own = list(story.guesses.values()), list(story.own.values())
        async with acquire(pool) as conn:
            await post_receipts(conn, guesses)
        conn = await asyncpg.connect(book_url)
        await conn.execute("SET lock_timeout = '50ms'")
        async with pool.acquire() as other, other.transaction():
            await other.execute("SELECT FROM billing_accounts FOR UPDATE")
            for _ in range(3):
                with pytest.raises(BookUnavailable):
                    await post_receipts(conn, own)
        conn.terminate()
        tries: Counter[str] = Counter()
        await asyncio.gather(*(post(pool, own, tries) for _ in range(4)))
        await check(pool, story, [account])


async def test_a_deadlock_with_somebody_else_is_tried_again(book_url: str) -> None:
    """Somebody who locks accounts in another order, as no code of ours does."""
    async with open_pool(book_url) as pool:
        accounts = sorted([await make_account(pool, CREDIT) for _ in range(2)], key=lambda a: a.id)
        first, second = accounts
        story = Story(accounts, random.Random(3))
        tries: Counter[str] = Counter()
        lock = "SELECT FROM billing_accounts WHERE id = $1 FOR UPDATE"
        async with pool.acquire() as other:
            await other.execute("SET deadlock_timeout = '10s'")  # so the settler is the victim
            transaction = other.transaction()
            await transaction.start()
            await other.execute(lock, second.id)
            posting = asyncio.ensure_future(post(pool, list(story.own.values()), tries))
            await _is_waiting(pool)
            await other.execute(lock, first.id)
            await transaction.rollback()
        await posting
        await check(pool, story, accounts)

    assert tries == {"DeadlockDetectedError": 1, "posted": 1}


async def _is_waiting(pool: Pool) -> None:
    async def is_waiting() -> bool | None:
        return await pool.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted") > 0 or None

    await eventually(is_waiting)


async def test_grants_between_the_batches_keep_the_ledger_gapless(book_url: str) -> None:
    async with open_pool(book_url, POSTERS + 1) as pool:
        account = await make_account(pool, CREDIT)
        story = Story([account], random.Random(11))

        async def give(at: int) -> None:
            async with acquire(pool) as conn:
                await grant(conn, account.id, 5, f"extra_{at % 10}", "")

        await asyncio.gather(run(pool, story, None), *(give(at) for at in range(20)))
        await check_book(pool)
        spent = sum(receipt.price_nanos for receipt in story.own.values())
        query = "SELECT balance_nanos FROM billing_accounts WHERE id = $1"
        assert await pool.fetchval(query, account.id) == CREDIT + 50 - spent
