"""Credit comes in once for each reference, and never more than the till can count."""

import asyncio
from collections import Counter
from uuid import uuid4

import pytest

from billing import book, fleet
from billing.book import BookRefused
from billing.errors import AccountUnknown, BookUnavailable, CreditTooLarge, ReferenceConflict
from billing.money import NANOS_MAX
from billing.till_epoch import AccountState
from tests.support.books import balance, check_book, make_account, open_pool


async def test_the_same_reference_grants_once(book_url: str) -> None:
    async with open_pool(book_url) as pool:
        account = await make_account(pool, 0)
        async with book.acquire(pool) as conn:
            first = await book.grant(conn, account.id, 500, "gift", "hello")
            again = await book.grant(conn, account.id, 500, "gift", "other words")
        await check_book(pool)

    assert first == again
    assert (first.balance_nanos, first.version, first.status) == (500, 1, "active")


async def test_a_reference_of_other_content_is_a_conflict(book_url: str) -> None:
    async with open_pool(book_url) as pool:
        account, other = await make_account(pool, 0), await make_account(pool, 0)
        async with book.acquire(pool) as conn:
            await book.grant(conn, account.id, 500, "gift", "")
            for who, nanos in ((account, 501), (other, 500)):
                with pytest.raises(ReferenceConflict):
                    await book.grant(conn, who.id, nanos, "gift", "")

        assert (await balance(pool, account), await balance(pool, other)) == (500, 0)


async def test_credit_beyond_what_the_till_counts_is_refused(book_url: str) -> None:
    async with open_pool(book_url) as pool:
        account = await make_account(pool, 10)
        async with book.acquire(pool) as conn:
            for nanos in (NANOS_MAX - 9, NANOS_MAX, 2**62):
                with pytest.raises(CreditTooLarge):
                    await book.grant(conn, account.id, nanos, f"g{nanos}", "")
            state = await book.grant(conn, account.id, NANOS_MAX - 10, "all", "")

    assert state.balance_nanos == NANOS_MAX


async def test_an_unknown_account_gets_nothing(book_url: str) -> None:
    async with open_pool(book_url) as pool, book.acquire(pool) as conn:
        with pytest.raises(AccountUnknown):
            await book.grant(conn, uuid4(), 1, "g", "")
        with pytest.raises(AccountUnknown):
            await book.read_account(conn, uuid4())
        with pytest.raises(BookRefused):
            await book.create_account(conn, "a\x00b")


async def test_one_reference_from_many_sides_is_granted_once(book_url: str) -> None:
    async with open_pool(book_url, 6) as pool:
        account = await make_account(pool, 0)

        async def grant() -> int:
            async with book.acquire(pool) as conn:
                return (await book.grant(conn, account.id, 70, "same", "")).balance_nanos

        assert await asyncio.gather(*(grant() for _ in range(12))) == [70] * 12
        await check_book(pool)


async def test_two_accounts_that_race_for_a_reference_have_one_winner(book_url: str) -> None:
    """The loser was told of a broken row instead of a conflict."""
    async with open_pool(book_url, 6) as pool:
        accounts = [await make_account(pool, 0) for _ in range(6)]

        async def grant(number: int, reference: str) -> AccountState:
            async with book.acquire(pool) as conn:
                return await book.grant(conn, accounts[number].id, 5, reference, "")

        for turn in range(10):
            asked = (grant(number, f"race {turn}") for number in range(6))
            answers = await asyncio.gather(*asked, return_exceptions=True)
            kinds = Counter(type(answer) for answer in answers)
            assert kinds == {ReferenceConflict: 5, AccountState: 1}
        await check_book(pool)


async def test_an_unreachable_book_is_unavailable() -> None:
    with pytest.raises(BookUnavailable):
        await book.connect("postgresql://127.0.0.1:1/none")
    with pytest.raises(BookUnavailable):
        await book.open_pool("postgresql://127.0.0.1:1/none", 1, 1, 1000)


async def test_a_connection_that_dies_in_use_is_unavailable_to_the_end(book_url: str) -> None:
    """An end that was not noticed in time raised what no caller expected, and the task of the
    commits ended with it."""
    async with open_pool(book_url, 2) as pool:

        async def read_with_a_dead_one() -> None:
            async with book.acquire(pool) as conn:
                pid = await conn.fetchval("SELECT pg_backend_pid()")
                await pool.execute("SELECT pg_terminate_backend($1)", pid)
                await fleet.read_epoch(conn)

        for _ in range(10):
            with pytest.raises(BookUnavailable):
                await read_with_a_dead_one()
        async with book.acquire(pool) as conn:
            assert (await fleet.read_epoch(conn)).number == 1


async def test_waiting_for_a_free_connection_has_an_end(
    book_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(book, "ACQUIRE_TIMEOUT_S", 0.1)
    async with open_pool(book_url, 1) as pool, book.acquire(pool):
        with pytest.raises(BookUnavailable):
            async with book.acquire(pool):
                pass
