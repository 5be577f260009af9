"""What follows an admission, on the real server: each script, again and again the same."""

import pytest

from billing.errors import (
    InsufficientCredit,
    TillRefused,
    TillUnavailable,
)
from billing.money import NANOS_MAX
from config.ids import id_text, new_id
from tests.support.tills import (
    SCRIPTS,
    Said,
    admit,
    confirmation,
    limited,
    look,
    running_link,
    running_till,
    settle,
)


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
        assert await link.run(SCRIPTS.seed, keys, (1, 5, 1, "active", "")) == b"epoch"
        assert await link.run(SCRIPTS.shard, keys[:1], (1, "close")) == b"closed"
        assert await link.run(SCRIPTS.seed, keys, (1, 5, 1, "active", "")) == b"epoch"
        assert await link.run(SCRIPTS.shard, keys[:1], (1, "open")) == b"open"
        assert await link.run(SCRIPTS.seed, keys, (1, 5, 1, "active", "")) == b"seeded"
        assert await link.run(SCRIPTS.seed, keys, (2, 9, 2, "active", "")) == b"epoch"
        assert await link.run(SCRIPTS.seed, keys, (1, 5, 1, "", "")) == b"kept"
        assert await link.command(("HGET", keys[1], "posted")) == b"5"
