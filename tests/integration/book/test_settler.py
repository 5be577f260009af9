"""Group commit: few commits, no receipt lost or charged twice, whatever happens on the way."""

import asyncio

import asyncpg
import msgspec
import pytest

from billing import book
from billing.book import BookRefused, Pool
from billing.errors import BillingError, TillUnavailable
from billing.receipts import ChargeReceipt
from billing.settler import Settled
from config.ids import id_text
from tests.support.books import balance, check_book, make_account, open_pool
from tests.support.faultproxy import FaultProxy, Mode, running_proxy
from tests.support.gateway import eventually
from tests.support.settlers import commits, running_settler


async def test_many_receipts_need_few_commits(book_url: str, till_url: str) -> None:
    async with running_settler(book_url, till_url) as rig:
        accounts = [await make_account(rig.pool) for _ in range(5)]
        ended = [await rig.end(accounts[n % 5], n, hold=1000) for n in range(50)]
        await rig.at_rest()
        before = await commits(rig.pool)
        more = [accounts[n % 5].receipt(n) for n in range(1000)]
        late = [rig.submit(accounts[n % 5], receipt) for n, receipt in enumerate(more)]
        await asyncio.gather(*(settled.committed for settled in late))
        await rig.at_rest()
        used = await commits(rig.pool) - before
        await check_book(rig.pool)
        balances = [await balance(rig.pool, account) for account in accounts]
        tills = [await rig.look(account) for account in accounts]

    assert used == 4
    assert rig.results == {"committed": 1050}
    assert sum(balances) == 5 * 10**9 - sum(range(50)) - sum(range(1000))
    assert [seen.posted for seen in tills] == balances
    for seen in tills:
        assert (seen.held, seen.uncommitted, seen.open) == (0, 0, 0)
        assert (seen.outbox, seen.holds) == ({}, {})
    assert all(settled.committed.done() for settled in ended)


async def test_a_killed_backend_costs_a_retry_and_no_receipt(book_url: str, till_url: str) -> None:
    async with running_settler(book_url, till_url) as rig:
        account = await make_account(rig.pool)
        others = (
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        total = 0
        for turn in range(30):
            await rig.end(account, turn)
            total += turn
            async with book.acquire(rig.pool) as conn:
                await conn.execute(others)
        await rig.at_rest()

        async def checked() -> bool | None:
            try:
                await check_book(rig.pool)
            except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                return None
            return True

        await eventually(checked)
        left = await balance(rig.pool, account)
        seen = await rig.look(account)

    assert left == 10**9 - total
    assert rig.results["committed"] == 30
    assert rig.results["refused"] == 0
    assert (seen.posted, seen.outbox, seen.held) == (left, {}, 0)


async def test_a_lost_answer_of_a_commit_charges_nobody_twice(book_url: str, till_url: str) -> None:
    async with running_proxy(book_url) as (proxy, url), running_settler(url, till_url) as rig:
        account = await make_account(rig.pool)
        for turn in range(8):
            await rig.end(account, 100)
            await rig.at_rest()
            proxy.to_client.mode = Mode.SWALLOW
            receipt = account.receipt(7, hold_nanos=7)
            rig.submit(account, receipt)
            async with open_pool(book_url, 1) as direct:

                async def in_the_book(
                    direct: Pool = direct, receipt: ChargeReceipt = receipt
                ) -> bool | None:
                    query = "SELECT true FROM charge_receipts WHERE request_id = $1"
                    return await direct.fetchval(query, receipt.request_id)

                await eventually(in_the_book)
            assert rig.settler.pending == 1
            proxy.cut()
            proxy.heal()
            await rig.at_rest()
            assert rig.results["retried"] >= turn + 1
        async with open_pool(book_url, 1) as direct:
            await check_book(direct)
            left = await balance(direct, account)

    assert left == 10**9 - 8 * 107
    assert rig.results["committed"] == 16


async def test_a_poison_row_holds_up_nobody_else(book_url: str, till_url: str) -> None:
    async with running_settler(book_url, till_url) as rig:
        account = await make_account(rig.pool)
        good = [account.receipt(n) for n in range(20)]
        bad = [
            account.receipt(5, provider_cost_nanos=2**70),
            account.receipt(5, attempt=0),
            account.receipt(5, price_version=404),
        ]
        settled = [rig.submit(account, receipt) for receipt in (*good[:10], *bad, *good[10:])]
        answers = await asyncio.gather(*(s.committed for s in settled), return_exceptions=True)
        await rig.at_rest()
        await check_book(rig.pool)
        left = await balance(rig.pool, account)
        seen = await rig.look(account)

    refused = [answer for answer in answers if isinstance(answer, BookRefused)]
    assert len(refused) == 3
    assert rig.results == {"committed": 20, "refused": 3}
    assert left == 10**9 - sum(range(20))
    # What the book refused stays in the outbox, where the audit finds it.
    assert sorted(seen.outbox) == sorted(id_text(receipt.request_id) for receipt in bad)


async def test_odd_texts_of_a_provider_do_not_keep_a_receipt_out(
    book_url: str, till_url: str
) -> None:
    async with running_settler(book_url, till_url) as rig:
        account = await make_account(rig.pool)
        odd = account.receipt(5, served_model="a\x00b\ud800", upstream_id="x" * 10_000)
        await rig.submit(account, odd).committed
        row = await rig.pool.fetchrow("SELECT served_model, upstream_id FROM charge_receipts")

    assert row is not None
    assert (row["served_model"], row["upstream_id"]) == ("ab", "x" * 1000)


async def test_receipts_that_wait_are_bounded(book_url: str, till_url: str) -> None:
    async with (
        running_proxy(book_url) as (proxy, url),
        running_settler(url, till_url, pending_max=10) as rig,
    ):
        account = await make_account(rig.pool)
        assert rig.settler.accepts
        assert rig.settler.oldest_age_s() == 0
        proxy.refuse()
        accepted = []
        for _ in range(10):
            rig.submit(account, account.receipt(1))
            accepted.append(rig.settler.accepts)
        assert accepted == [True] * 7 + [False] * 3
        age = rig.settler.oldest_age_s()

        async def older() -> bool | None:
            return rig.settler.oldest_age_s() > age or None

        await eventually(older)
        proxy.heal()
        await rig.at_rest()
        assert rig.settler.accepts
        assert rig.settler.pending == 0


async def test_stop_commits_and_confirms_what_is_left(book_url: str, till_url: str) -> None:
    async with running_settler(book_url, till_url, batch_max=7) as rig:
        account = await make_account(rig.pool)
        settled = [await rig.end(account, n) for n in range(100)]
        rig.settler.stop()
        await asyncio.gather(*rig.tasks)
        assert all(one.committed.done() for one in settled)
        seen = await rig.look(account)
        left = await balance(rig.pool, account)

    assert left == 10**9 - sum(range(100))
    assert (seen.posted, seen.outbox, seen.holds) == (left, {}, {})


async def test_stop_does_not_wait_for_a_till_that_is_away(book_url: str, till_url: str) -> None:
    async with (
        running_proxy(till_url) as (proxy, url),
        running_settler(book_url, till_url, till_at=url) as rig,
    ):
        accounts = [await make_account(rig.pool) for _ in range(30)]
        for account in accounts:
            await rig.end(account, 5)
        await rig.at_rest()
        proxy.refuse()
        for account in accounts:
            rig.submit(account, account.receipt(7))
        rig.settler.stop()
        async with asyncio.timeout(4):
            await asyncio.gather(*rig.tasks)
        assert [await balance(rig.pool, account) for account in accounts] == [10**9 - 12] * 30


@pytest.mark.parametrize("fault", ["refuse", "stall", "swallow"])
async def test_confirms_follow_when_the_till_comes_back(
    book_url: str, till_url: str, fault: str
) -> None:
    async with (
        running_proxy(till_url) as (proxy, url),
        running_settler(book_url, till_url, till_at=url) as rig,
    ):
        accounts = [await make_account(rig.pool) for _ in range(3)]
        holds = []
        for n in range(30):
            receipt = accounts[n % 3].receipt(n, hold_nanos=1000)
            request_id = id_text(receipt.request_id)
            await rig.till.admit(accounts[n % 3].scopes, request_id, 1000, b"{}")
            holds.append((accounts[n % 3], receipt))
        harm(proxy, fault)
        settled = [rig.submit(*hold) for hold in holds]
        # The book has them although the till is away.
        await asyncio.gather(*(one.committed for one in settled))
        for one in settled:
            with pytest.raises(TillUnavailable):
                await one.till_reply
        assert not rig.settler.is_idle
        proxy.heal()
        await rig.at_rest()
        for account in accounts:
            seen = await rig.look(account)
            assert seen.posted == await balance(rig.pool, account)
            assert (seen.held, seen.open, seen.uncommitted) == (0, 0, 0)
            assert (seen.holds, seen.outbox) == ({}, {})


def harm(proxy: FaultProxy, fault: str) -> None:
    if fault == "refuse":
        proxy.refuse()
    else:
        proxy.to_client.mode = Mode(fault)


async def test_two_workers_that_settle_the_same_requests_charge_once(
    book_url: str, till_url: str
) -> None:
    async with (
        running_settler(book_url, till_url) as one,
        running_settler(book_url, till_url) as two,
    ):
        account = await make_account(one.pool)
        receipts = [account.receipt(n) for n in range(100)]
        settled: list[Settled] = []
        for receipt in receipts:
            for rig in (one, two):
                settled.append(rig.submit(account, msgspec.structs.replace(receipt)))
        await asyncio.gather(*(each.committed for each in settled))
        await one.at_rest()
        await two.at_rest()
        await check_book(one.pool)
        left = await balance(one.pool, account)

    assert left == 10**9 - sum(range(100))


async def test_a_hold_of_a_settled_request_is_ended_by_its_commit(
    book_url: str, till_url: str
) -> None:
    async with running_settler(book_url, till_url) as rig:
        account = await make_account(rig.pool)
        receipt = account.receipt(2000, hold_nanos=2000)
        # The till holds less than the receipt says: it refuses the price, the book does not.
        await rig.till.admit(account.scopes, id_text(receipt.request_id), 1000, b"{}")
        settled = rig.submit(account, receipt)
        with pytest.raises(BillingError):
            await settled.till_reply
        await settled.committed
        await rig.at_rest()
        seen = await rig.look(account)

    assert (seen.available, seen.holds, seen.open) == (10**9 - 2000, {}, 0)
