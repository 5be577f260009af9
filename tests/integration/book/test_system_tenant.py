"""The system tenant in the book: one, whoever makes it at once, and audited like anybody."""

import asyncio

import asyncpg
import pytest

from billing import book
from billing.errors import CreditTooLarge
from billing.money import NANOS_MAX
from billing.system_tenant import FIRST_CAPS, FIRST_CREDITS_NANOS, Caps, ensure_system_tenant
from tests.support.books import check_book, open_pool


async def test_many_at_once_make_one(book_url: str) -> None:
    async with open_pool(book_url, size=8) as pool:

        async def ensure() -> object:
            async with book.acquire(pool) as conn:
                return (await ensure_system_tenant(conn, Caps())).state.account_id

        found = await asyncio.gather(*(ensure() for _ in range(20)))
        await check_book(pool)

        assert len(set(found)) == 1
        assert await pool.fetchval("SELECT count(*) FROM billing_accounts") == 1
        assert await pool.fetchval("SELECT count(*) FROM credit_ledger") == 1


async def test_it_begins_with_finite_caps_and_keeps_what_is_not_named(book_url: str) -> None:
    async with open_pool(book_url) as pool, book.acquire(pool) as conn:
        first = await ensure_system_tenant(conn, Caps(requests_per_minute=7))
        again = await ensure_system_tenant(conn, Caps(budget_nanos=5), 1)

    assert first.is_new
    assert first.state.balance_nanos == again.state.balance_nanos == FIRST_CREDITS_NANOS
    assert first.caps == Caps(
        budget_nanos=FIRST_CAPS.budget_nanos,
        open_requests=FIRST_CAPS.open_requests,
        requests_per_minute=7,
        tokens_per_minute=FIRST_CAPS.tokens_per_minute,
    )
    assert (again.is_new, again.caps.budget_nanos, again.caps.requests_per_minute) == (False, 5, 7)


async def test_without_its_credits_there_is_no_half_of_it(book_url: str) -> None:
    async with open_pool(book_url) as pool, book.acquire(pool) as conn:
        with pytest.raises(CreditTooLarge):
            await ensure_system_tenant(conn, Caps(), NANOS_MAX + 1)

        assert await conn.fetchval("SELECT count(*) FROM billing_accounts") == 0


async def test_the_schema_takes_no_second_one(book_url: str) -> None:
    async with open_pool(book_url) as pool, book.acquire(pool) as conn:
        await ensure_system_tenant(conn, Caps())
        other = await book.create_account(conn, "other")
        with pytest.raises(asyncpg.UniqueViolationError):
            await conn.execute(
                "UPDATE billing_accounts SET is_system_tenant = true WHERE id = $1", other
            )
