"""Admission on the real server: every answer, all scopes or none, and the book asked seldom."""

import asyncio
from uuid import uuid4

import pytest
import redis.asyncio

from billing.errors import (
    AccountFrozen,
    AccountUnknown,
    InsufficientCredit,
    KeyRevoked,
    TillUnavailable,
    TooManyOpenRequests,
)
from billing.till_scopes import spend_scopes
from tests.support.tills import (
    Said,
    admit,
    limited,
    look,
    running_till,
    settle,
)


async def test_a_hold_is_placed_on_a_cold_account(till_url: str) -> None:
    said = Said()
    scopes = said.account(1000)
    async with running_till(till_url, said) as till:
        request_id = await admit(till, scopes, 300)

    seen = await look(till_url, scopes)
    assert (seen.posted, seen.version, seen.status) == (1000, 1, "active")
    assert (seen.available, seen.held, seen.key_open) == (700, 300, 1)
    assert seen.holds == {request_id: 300}
    seen.check()
    assert (said.reads, said.epoch_reads) == (1, 2)


async def test_the_same_request_is_admitted_once(till_url: str) -> None:
    said = Said()
    scopes = said.account(1000)
    async with running_till(till_url, said) as till:
        request_id = await admit(till, scopes, 800)
        await admit(till, scopes, 800, request_id)
        held = await look(till_url, scopes)
        await settle(till, scopes, request_id, 10)
        await admit(till, scopes, 800, request_id)
        settled = await look(till_url, scopes)

    assert (held.held, held.open) == (800, 1)
    assert (settled.held, settled.open, settled.outbox) == (0, 0, {request_id: 10})


async def test_nothing_is_held_when_credit_is_short(till_url: str) -> None:
    said = Said()
    scopes = said.account(1000)
    async with running_till(till_url, said) as till:
        await admit(till, scopes, 600)
        with pytest.raises(InsufficientCredit) as caught:
            await admit(till, scopes, 401)
        await admit(till, scopes, 400)

    assert (caught.value.needed_nanos, caught.value.available_nanos) == (401, 400)
    seen = await look(till_url, scopes)
    assert (seen.available, seen.open) == (0, 2)
    seen.check()


async def test_a_free_hold_needs_no_credit_but_no_debt_either(till_url: str) -> None:
    said = Said()
    scopes, debtor = said.account(0), said.account(-5)
    async with running_till(till_url, said) as till:
        await admit(till, scopes, 0)
        with pytest.raises(InsufficientCredit) as caught:
            await admit(till, debtor, 0)

    assert caught.value.available_nanos == -5


async def test_a_frozen_account_and_a_revoked_key_are_refused(till_url: str) -> None:
    said = Said()
    frozen, revoked = said.account(1000), said.account(1000)
    said.put(frozen.account_id, 1000, 1, "frozen")
    client = redis.asyncio.from_url(till_url)
    await client.hset(revoked.scope_keys[1], "status", "revoked")
    await client.aclose()
    async with running_till(till_url, said) as till:
        with pytest.raises(AccountFrozen):
            await admit(till, frozen, 1)
        with pytest.raises(KeyRevoked):
            await admit(till, revoked, 1)

    for scopes in (frozen, revoked):
        seen = await look(till_url, scopes)
        assert (seen.held, seen.open, seen.key_open, seen.holds) == (0, 0, 0, {})


async def test_a_thawed_account_is_served_although_nobody_told_the_till(till_url: str) -> None:
    said = Said()
    scopes = said.account(1000)
    said.put(scopes.account_id, 1000, 1, "frozen")
    async with running_till(till_url, said) as till:
        with pytest.raises(AccountFrozen):
            await admit(till, scopes, 1)
        said.put(scopes.account_id, 1000, 1, "active")
    async with running_till(till_url, said) as till:
        await admit(till, scopes, 1)


async def test_open_requests_are_limited_by_account_and_key(till_url: str) -> None:
    said = Said()
    scopes = said.account(1000)
    by_account, by_key = limited(scopes, account=2), limited(scopes, key=1)
    async with running_till(till_url, said) as till:
        first = await admit(till, by_account, 1)
        await admit(till, by_account, 1)
        with pytest.raises(TooManyOpenRequests) as account:
            await admit(till, by_account, 1)
        await admit(till, by_key, 1)
        with pytest.raises(TooManyOpenRequests) as key:
            await admit(till, by_key, 1)
        await settle(till, by_account, first, 0)
        with pytest.raises(TooManyOpenRequests):
            await admit(till, by_account, 1)

    assert (account.value.scope, account.value.limit) == ("account", 2)
    assert (key.value.scope, key.value.limit) == ("key", 1)
    seen = await look(till_url, by_account)
    assert (seen.open, seen.key_open) == (2, 1)


async def test_who_cannot_pay_is_told_so_even_when_busy(till_url: str) -> None:
    said = Said()
    scopes = limited(said.account(1000), account=1, key=1)
    async with running_till(till_url, said) as till:
        await admit(till, scopes, 900)
        with pytest.raises(InsufficientCredit):
            await admit(till, scopes, 101)
        with pytest.raises(TooManyOpenRequests):
            await admit(till, scopes, 100)


async def test_an_unknown_account_is_no_account(till_url: str) -> None:
    said = Said()
    scopes = spend_scopes(uuid4(), uuid4())
    async with running_till(till_url, said) as till:
        with pytest.raises(AccountUnknown):
            await admit(till, scopes, 1)


async def test_another_epoch_fences_the_content(till_url: str) -> None:
    said = Said()
    scopes = said.account(1000)
    async with running_till(till_url, said) as till:
        await admit(till, scopes, 1)
        for to in ("close", "open"):
            await till.epoch.set_shards(7, to)
        with pytest.raises(TillUnavailable) as caught:
            await admit(till, scopes, 1)
        before = await look(till_url, scopes)
        said.epoch = 7
        await admit(till, scopes, 1)

    assert not caught.value.asked
    assert before.open == 1
    assert (await look(till_url, scopes)).open == 2


async def test_a_worker_of_an_old_epoch_seeds_an_empty_till_with_the_new_one(till_url: str) -> None:
    """It wrote its old epoch into the empty shard, and all others were locked out."""
    said = Said()
    scopes, warm = said.account(1000), said.account(1000)
    async with running_till(till_url, said) as till, running_till(till_url, said) as other:
        await admit(till, warm, 1)
        await till.link.command(("FLUSHALL",))
        said.epoch = 2
        await other.epoch.set_shards(2, "close")  # as whoever began it does
        await admit(till, scopes, 1)
        await admit(other, scopes, 1)
        assert await till.link.command(("GET", scopes.epoch_key)) == b"2"


async def test_two_workers_share_one_account(till_url: str) -> None:
    said = Said()
    scopes = said.account(100)
    async with running_till(till_url, said) as one, running_till(till_url, said) as other:
        asked = [admit(till, scopes, 7) for _ in range(20) for till in (one, other)]
        answers = await asyncio.gather(*asked, return_exceptions=True)

    admitted = [answer for answer in answers if isinstance(answer, str)]
    assert len(admitted) == 100 // 7
    assert all(isinstance(a, InsufficientCredit) for a in answers if not isinstance(a, str))
    seen = await look(till_url, scopes)
    assert sorted(seen.holds) == sorted(admitted)
    assert seen.available == 100 % 7
    seen.check()


async def test_short_of_credit_the_book_is_asked_once_a_second(till_url: str) -> None:
    said = Said()
    scopes = said.account(100)
    async with running_till(till_url, said) as till:
        await admit(till, scopes, 100)
        reads = said.reads
        for _ in range(20):
            with pytest.raises(InsufficientCredit):
                await admit(till, scopes, 50)
        asked = said.reads - reads
        said.put(scopes.account_id, 200, 2)
        async with asyncio.timeout(3):
            while (await look(till_url, scopes)).open != 2:
                try:
                    await admit(till, scopes, 50)
                except InsufficientCredit:
                    continue

    assert asked == 1
    assert said.reads - reads == 2


async def test_calls_that_are_short_together_wait_for_one_look_at_the_book(till_url: str) -> None:
    """Found: while the first one asked for credit that had come in, the others were refused."""
    said = Said()
    scopes = said.account(100)
    async with running_till(till_url, said) as till:
        await admit(till, scopes, 100)
        said.put(scopes.account_id, 1000, 2)
        reads = said.reads
        await asyncio.gather(*(admit(till, scopes, 100) for _ in range(5)))

    assert said.reads - reads == 1


async def test_a_book_that_is_away_does_not_hide_a_refusal(till_url: str) -> None:
    """Short of credit with Postgres down, the caller was told of Postgres instead of its credit."""
    said = Said()
    scopes = said.account(100)
    async with running_till(till_url, said) as till:
        await admit(till, scopes, 60)
        said.is_away = True
        await admit(till, scopes, 40)
        with pytest.raises(InsufficientCredit):
            await admit(till, scopes, 1)


async def test_many_cold_calls_read_the_book_once(till_url: str) -> None:
    said = Said()
    scopes = said.account(1000)
    async with running_till(till_url, said) as till:
        await asyncio.gather(*(admit(till, scopes, 1) for _ in range(200)))

    assert said.reads <= 2
    assert said.epoch_reads <= 4
    assert (await look(till_url, scopes)).open == 200


async def test_a_caller_that_leaves_does_not_take_the_reading_with_it(till_url: str) -> None:
    """All who waited for the same account were refused when the first of them hung up."""
    said = Said()
    scopes = said.account(1000)
    async with running_till(till_url, said) as till:
        calls = [asyncio.ensure_future(admit(till, scopes, 1)) for _ in range(10)]
        for _ in range(1000):
            if said.reads:
                break
            await asyncio.sleep(0)
        calls[0].cancel()
        answers = await asyncio.gather(*calls, return_exceptions=True)

    assert isinstance(answers[0], asyncio.CancelledError)
    assert all(isinstance(answer, str) for answer in answers[1:]), answers
