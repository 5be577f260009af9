"""Each script on the real server: every status, all scopes or none, again and again the same."""

import asyncio
from uuid import uuid4

import pytest
import redis.asyncio

from billing.errors import (
    AccountFrozen,
    AccountUnknown,
    InsufficientCredit,
    KeyRevoked,
    TillRefused,
    TillUnavailable,
    TooManyOpenRequests,
)
from billing.money import NANOS_MAX
from billing.till import SpendScopes, spend_scopes
from config.ids import id_text, new_id
from tests.support.tills import (
    SCRIPTS,
    Said,
    admit,
    confirmation,
    look,
    running_link,
    running_till,
    settle,
)


def limited(scopes: SpendScopes, *, account: int = 0, key: int = 0) -> SpendScopes:
    return spend_scopes(scopes.account_id, uuid4(), account_open_max=account, key_open_max=key)


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
    scopes = spend_scopes(uuid4(), uuid4(), account_open_max=0, key_open_max=0)
    async with running_till(till_url, said) as till:
        with pytest.raises(AccountUnknown):
            await admit(till, scopes, 1)


async def test_settle_moves_the_price_into_the_outbox_once(till_url: str) -> None:
    said = Said()
    scopes = said.account(1000)
    async with running_till(till_url, said) as till:
        request_id = await admit(till, scopes, 300)
        first = await settle(till, scopes, request_id, 120)
        again = await settle(till, scopes, request_id, 120)

    assert (first, again) == ([b"settled", 880], [b"exists", 880])
    seen = await look(till_url, scopes)
    assert (seen.outbox, seen.open, seen.key_open) == ({request_id: 120}, 0, 0)
    seen.check()


async def test_a_price_above_the_hold_changes_nothing(till_url: str) -> None:
    said = Said()
    scopes = said.account(1000)
    async with running_till(till_url, said) as till:
        request_id = await admit(till, scopes, 300)
        with pytest.raises(TillRefused, match="error of its own") as caught:
            await settle(till, scopes, request_id, 301)

    assert "PRICE above the hold" in caught.value.reply
    seen = await look(till_url, scopes)
    assert (seen.holds, seen.outbox) == ({request_id: 300}, {})
    seen.check()


async def test_the_price_of_a_lost_hold_counts_all_the_same(till_url: str) -> None:
    said = Said()
    scopes = said.account(1000)
    request_id = id_text(new_id())
    async with running_till(till_url, said) as till:
        await admit(till, scopes, 10)
        unknown = await settle(till, scopes, request_id, 70)
        again = await settle(till, scopes, request_id, 70)
        seen = await look(till_url, scopes)
        state = said.put(scopes.account_id, 930, 2)
        await till.confirm(confirmation(state, scopes, request_id))

    assert (unknown[0], again[0]) == (b"unknown", b"exists")
    assert (seen.uncommitted, seen.held, seen.open, seen.available) == (70, 10, 1, 920)
    seen.check()
    after = await look(till_url, scopes)
    assert (after.posted, after.available, after.outbox) == (930, 920, {})


async def test_a_settle_into_an_empty_till_survives_the_seed(till_url: str) -> None:
    said = Said()
    scopes = said.account(1000)
    async with running_till(till_url, said) as till:
        assert await settle(till, scopes, "r1", 70) == [b"unknown", -70]
        await admit(till, scopes, 900)
        with pytest.raises(InsufficientCredit) as caught:
            await admit(till, scopes, 31)

    assert caught.value.available_nanos == 30


async def test_confirm_takes_the_books_word_once(till_url: str) -> None:
    said = Said()
    scopes = said.account(1000)
    async with running_till(till_url, said) as till:
        request_ids = [await admit(till, scopes, 300) for _ in range(3)]
        for request_id in request_ids:
            await settle(till, scopes, request_id, 100)
        state = said.put(scopes.account_id, 700, 4)
        for _ in range(3):
            await till.confirm(confirmation(state, scopes, *request_ids))

    seen = await look(till_url, scopes)
    assert (seen.posted, seen.version, seen.available, seen.outbox) == (700, 4, 700, {})
    seen.check()


async def test_a_receipt_named_twice_in_one_confirm_counts_once(till_url: str) -> None:
    """It was taken out of `uncommitted` twice: credit from nothing."""
    said = Said()
    scopes = said.account(1000)
    async with running_till(till_url, said) as till:
        request_id = await admit(till, scopes, 300)
        await settle(till, scopes, request_id, 100)
        lost = await admit(till, scopes, 50)
        state = said.put(scopes.account_id, 900, 2)
        await till.confirm(confirmation(state, scopes, request_id, request_id, lost, lost))

    seen = await look(till_url, scopes)
    assert (seen.uncommitted, seen.held, seen.open, seen.available) == (0, 0, 0, 900)
    seen.check()


async def test_confirm_ends_a_hold_whose_settle_was_lost(till_url: str) -> None:
    said = Said()
    scopes = said.account(1000)
    async with running_till(till_url, said) as till:
        request_id = await admit(till, scopes, 300)
        state = said.put(scopes.account_id, 900, 2)
        await till.confirm(confirmation(state, scopes, request_id))

    seen = await look(till_url, scopes)
    assert (seen.available, seen.held, seen.holds, seen.key_open) == (900, 0, {}, 0)
    seen.check()


async def test_one_confirm_serves_many_keys_of_an_account(till_url: str) -> None:
    said = Said()
    first = said.account(10_000)
    keys = [limited(first, key=5) for _ in range(40)]
    async with running_till(till_url, said) as till:
        names = [(scopes, await admit(till, scopes, 10)) for scopes in keys for _ in range(5)]
        for scopes, request_id in names[::2]:
            await settle(till, scopes, request_id, 7)
        state = said.put(first.account_id, 9000, 9)
        group = confirmation(state, first)
        group.receipts.extend(names)
        await till.confirm(group)

    for scopes in keys:
        seen = await look(till_url, scopes)
        assert (seen.key_open, seen.open, seen.available) == (0, 0, 9000)


async def test_versions_only_go_up(till_url: str) -> None:
    said = Said()
    scopes = said.account(1000)
    async with running_till(till_url, said) as till:
        await till.seed(said.put(scopes.account_id, 500, 5))
        await till.seed(said.put(scopes.account_id, 400, 4, "frozen"))
        older = await look(till_url, scopes)
        await till.confirm(confirmation(said.put(scopes.account_id, 300, 3), scopes, "none"))
        confirmed = await look(till_url, scopes)
        await till.seed(said.put(scopes.account_id, 999, 5, "frozen"))
        equal = await look(till_url, scopes)
        await till.confirm(confirmation(said.put(scopes.account_id, 600, 6), scopes, "none"))
        newer = await look(till_url, scopes)

    assert (older.posted, older.version, older.status) == (500, 5, "active")
    assert (confirmed.posted, confirmed.version) == (500, 5)
    assert (equal.posted, equal.version, equal.status) == (500, 5, "frozen")
    assert (newer.posted, newer.version) == (600, 6)


async def test_the_largest_amounts_stay_exact(till_url: str) -> None:
    said = Said()
    scopes = said.account(NANOS_MAX)
    async with running_till(till_url, said) as till:
        odd = NANOS_MAX - 1_000_001
        big, small = await admit(till, scopes, odd), await admit(till, scopes, 1_000_000)
        held = await look(till_url, scopes)
        with pytest.raises(InsufficientCredit) as caught:
            await admit(till, scopes, 2)
        assert await settle(till, scopes, small, 999_999) == [b"settled", 2]
        assert await settle(till, scopes, big, odd) == [b"settled", 2]
        settled = await look(till_url, scopes)
        await till.confirm(confirmation(said.put(scopes.account_id, 2, 3), scopes, big, small))

    assert caught.value.available_nanos == 1
    assert (held.held, held.available) == (NANOS_MAX - 1, 1)
    assert settled.uncommitted == NANOS_MAX - 2
    held.check()
    settled.check()
    after = await look(till_url, scopes)
    assert (after.posted, after.uncommitted, after.held, after.available) == (2, 0, 0, 2)


async def test_nothing_of_nothing_is_not_minus_nothing(till_url: str) -> None:
    """HINCRBY refuses `-0` half way through a script."""
    said = Said()
    scopes = said.account(0)
    async with running_till(till_url, said) as till:
        first, second = await admit(till, scopes, 0), await admit(till, scopes, 0)
        assert await settle(till, scopes, first, 0) == [b"settled", 0]
        state = said.put(scopes.account_id, 0, 1)
        await till.confirm(confirmation(state, scopes, first, second, "unheard-of"))

    seen = await look(till_url, scopes)
    assert seen == await look(till_url, scopes)
    assert (seen.holds, seen.outbox, seen.open, seen.held, seen.uncommitted) == ({}, {}, 0, 0, 0)


async def test_forwarded_marks_what_is_there_and_makes_nothing(till_url: str) -> None:
    said = Said()
    scopes = said.account(10)
    async with running_till(till_url, said) as till:
        request_id = await admit(till, scopes, 1)
        till.forwarded(scopes, request_id)
        till.forwarded(scopes, request_id)
        till.forwarded(scopes, "gone")
        await till.link.command(("PING",))
        hold = await till.link.command(("HGET", scopes.hold_prefix + request_id, "state"))

    assert hold == b"F"
    assert list((await look(till_url, scopes)).holds) == [request_id]


async def test_another_epoch_fences_the_content(till_url: str) -> None:
    said = Said()
    scopes = said.account(1000)
    async with running_till(till_url, said) as till:
        await admit(till, scopes, 1)
        await till.link.command(("SET", scopes.epoch_key, "7"))
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


async def test_ending_a_request_works_when_memory_is_short(till_url: str) -> None:
    """Refused for want of memory, the outbox could never have been emptied again."""
    said = Said()
    scopes = said.account(1000)
    async with running_till(till_url, said) as till:
        request_id = await admit(till, scopes, 300)
        await till.link.command(("CONFIG", "SET", "maxmemory", "1"))
        try:
            with pytest.raises(TillUnavailable):
                await admit(till, scopes, 1)
            await settle(till, scopes, request_id, 100)
            state = said.put(scopes.account_id, 900, 2)
            await till.confirm(confirmation(state, scopes, request_id))
        finally:
            await till.link.command(("CONFIG", "SET", "maxmemory", "0"))

    seen = await look(till_url, scopes)
    assert (seen.available, seen.outbox, seen.holds) == (900, {}, {})


async def test_every_script_is_refused_with_an_epoch_of_nobody(till_url: str) -> None:
    async with running_link(till_url) as link:
        keys = ("{s00}:epoch", "{s00}:a:x")
        assert await link.run(SCRIPTS.seed, keys, (1, 5, 1, "active")) == b"seeded"
        assert await link.run(SCRIPTS.seed, keys, (2, 9, 2, "active")) == b"epoch"
        assert await link.run(SCRIPTS.seed, keys, (1, 5, 1, "")) == b"kept"
        assert await link.command(("HGET", keys[1], "posted")) == b"5"
