"""Who is calling, through the real gateway: no query when warm, and out within 5 seconds."""

import asyncio
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import httpx
import msgspec
import pytest

from billing import book, till_scan
from billing.errors import AccountFrozen
from config.ids import id_text, new_id
from config.secret import Secret
from gateway.relay import authenticate
from gateway.relay.call import Caller
from keys import store
from keys.api_key import digest, generate
from keys.errors import KeyExpired, KeyInvalid, KeyNotFound, KeysUnavailable
from keys.keys_store import list_keys, revoke_any_key
from keys.store import KeyTerms, create_key
from tests.support.books import PEPPER, make_account, open_pool
from tests.support.doors import open_door
from tests.support.faultproxy import Mode, running_proxy
from tests.support.gateway import Gateway, eventually, make_settings, running_gateway
from tests.support.upstream.launch import Upstream

BODY = {"model": "plain", "messages": [{"role": "user", "content": "hello"}]}


async def test_a_warm_key_costs_no_query(book_url: str) -> None:
    async with open_door(book_url, cache_ttl_ms=60_000) as door:
        account = await make_account(door.pool)
        before = door.queries.count()
        callers = [await door.enter(account.secret) for _ in range(200)]
        await door.pool.fetchval("SELECT 1")  # query loggers speak one turn of the loop later
        asked = door.queries.count() - before

    assert asked == 1
    principal = callers[0].principal
    assert (principal.account_id, principal.app_key_id) == (account.id, account.app_key_id)
    assert principal.virtual_key_id == account.virtual_key_id
    assert all(caller is callers[0] for caller in callers)
    assert account.secret not in repr(principal)


async def test_many_at_once_ask_once(book_url: str) -> None:
    async with open_door(book_url) as door:
        account = await make_account(door.pool)
        before = door.queries.count()
        await asyncio.gather(*(door.enter(account.secret) for _ in range(300)))
        await door.pool.fetchval("SELECT 1")

        assert door.queries.count() - before == 1


async def test_an_unknown_key_is_remembered_for_a_short_time_only(book_url: str) -> None:
    async with open_door(book_url, cache_ttl_ms=200) as door:
        account = await make_account(door.pool)
        new = generate("live")
        before = door.queries.count()
        for _ in range(50):
            with pytest.raises(KeyInvalid):
                await door.enter(new.secret)
        asked = door.queries.count() - before
        await door.pool.execute(
            "UPDATE app_api_keys SET digest = $1 WHERE id = $2",
            digest(new.secret.encode(), PEPPER),
            account.app_key_id,
        )

        async def known() -> Caller | None:
            try:
                return await door.enter(new.secret)
            except KeyInvalid:
                return None

        caller = await eventually(known)

    assert asked <= 2
    assert caller.principal.account_id == account.id


async def test_a_revoked_key_is_out_when_its_answer_is_old(book_url: str) -> None:
    async with open_door(book_url, cache_ttl_ms=300) as door:
        account = await make_account(door.pool)
        await door.enter(account.secret)
        async with book.acquire(door.pool) as conn:
            await revoke_any_key(conn, account.app_key_id)
        revoked_at = time.monotonic()

        async def refused() -> bool | None:
            try:
                await door.enter(account.secret)
            except KeyInvalid:
                return True
            return None

        await eventually(refused)

    assert time.monotonic() - revoked_at < 0.3 + 1


async def test_a_used_key_is_renewed_before_it_gets_old(book_url: str) -> None:
    """No caller waits for the book as long as the key is in use."""
    async with open_door(book_url, cache_ttl_ms=200) as door:
        account = await make_account(door.pool)
        await door.enter(account.secret)
        before, waits = door.queries.count(), []

        async def renewed() -> bool | None:
            started = door.queries.count()
            await door.enter(account.secret)
            waits.append(door.queries.count() - started)
            return door.queries.count() - before >= 4 or None

        await eventually(renewed)

    assert sum(waits) <= 1


async def test_lookups_that_wait_are_bounded(
    book_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(authenticate, "LOOKUPS_WAITING_MAX", 5)
    async with running_proxy(book_url) as (proxy, url), open_door(url) as door:
        proxy.both(Mode.STALL)
        callers = [asyncio.ensure_future(door.enter(generate("live").secret)) for _ in range(5)]
        for _ in range(3):
            await asyncio.sleep(0)
        with pytest.raises(KeysUnavailable):
            await door.enter(generate("live").secret)
        proxy.heal()
        answers = await asyncio.gather(*callers, return_exceptions=True)

    assert {type(answer) for answer in answers} == {KeyInvalid}


async def test_remembered_answers_are_bounded_and_used_keys_stay(book_url: str) -> None:
    async with open_door(book_url, cache_entries_max=20, cache_ttl_ms=300) as door:
        account = await make_account(door.pool)
        await door.enter(account.secret)
        entries = door.authenticator._entries
        for _ in range(15):
            with pytest.raises(KeyInvalid):
                await door.enter(generate("live").secret)
        sealed = next(iter(entries))

        async def renewed() -> bool | None:
            await door.enter(account.secret)
            return next(iter(entries)) != sealed or None

        await eventually(renewed)
        for _ in range(8):
            with pytest.raises(KeyInvalid):
                await door.enter(generate("live").secret)

        assert len(entries) <= 20
        assert sealed in entries


async def test_made_up_keys_keep_no_revoked_key_alive(book_url: str) -> None:
    """With every lookup taken by strangers, the old answer about a known key was used on."""
    async with open_door(book_url, cache_ttl_ms=50) as door:
        account = await make_account(door.pool)
        await door.enter(account.secret)
        stuck = door.authenticator._strangers.slots
        for _ in range(authenticate.LOOKUPS_AT_ONCE):
            await stuck.acquire()
        strangers = [
            asyncio.ensure_future(door.enter(generate("live").secret))
            for _ in range(authenticate.LOOKUPS_WAITING_MAX)
        ]
        await asyncio.sleep(0)

        async def refused(secret: str) -> Exception | None:
            try:
                await door.enter(secret)
            except (KeyInvalid, KeysUnavailable) as exc:
                return exc
            return None

        with pytest.raises(KeysUnavailable):
            await asyncio.wait_for(door.enter(generate("live").secret), 1)
        async with book.acquire(door.pool) as conn:
            await revoke_any_key(conn, account.app_key_id)
        assert isinstance(await eventually(partial(refused, account.secret)), KeyInvalid)
        for _ in range(authenticate.LOOKUPS_AT_ONCE):
            stuck.release()
        await asyncio.gather(*strangers, return_exceptions=True)


@pytest.mark.parametrize("fault", ["refuse", "stall"])
async def test_known_keys_go_on_while_the_book_is_away(book_url: str, fault: str) -> None:
    """With Postgres silent, every call waited for it before it was let in."""
    async with running_proxy(book_url) as (proxy, url), open_door(url, cache_ttl_ms=50) as door:
        account = await make_account(door.pool)
        await door.enter(account.secret)
        if fault == "refuse":
            proxy.refuse()
        else:
            proxy.both(Mode.STALL)
        waits = []
        ends_at = time.monotonic() + 1
        while time.monotonic() < ends_at:
            started = time.monotonic()
            await door.enter(account.secret)
            waits.append(time.monotonic() - started)
            await asyncio.sleep(0.001)
        if fault == "refuse":
            with pytest.raises(KeysUnavailable):
                await door.enter(generate("live").secret)
        proxy.heal()
        proxy.cut()

    assert sorted(waits)[len(waits) // 2] < 0.01
    assert max(waits) < 0.8
    assert sum(wait > 0.1 for wait in waits) <= 1


async def test_stale_answers_end_and_then_nobody_is_let_in(
    book_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waited for another's lookup got the old answer, however old it was."""
    monkeypatch.setattr(authenticate, "STALE_WHEN_BOOK_AWAY_S", 0.1)
    async with running_proxy(book_url) as (proxy, url), open_door(url, cache_ttl_ms=20) as door:
        account = await make_account(door.pool)
        await door.enter(account.secret)
        proxy.refuse()

        async def shut() -> bool | None:
            calls = (door.enter(account.secret) for _ in range(10))
            answers = await asyncio.gather(*calls, return_exceptions=True)
            return all(isinstance(answer, KeysUnavailable) for answer in answers) or None

        await eventually(shut)
        proxy.heal()

        async def back() -> Caller | None:
            try:
                return await door.enter(account.secret)
            except KeysUnavailable:
                return None

        await eventually(back)


async def test_keys_of_the_previous_pepper_are_known(book_url: str) -> None:
    old, new = PEPPER, b"n" * 32
    async with open_pool(book_url) as pool:
        account = await make_account(pool)
        async with book.acquire(pool) as conn:
            _, fresh = await create_key(conn, account.id, KeyTerms(name="new"), pepper=new)
    both = {"pepper": Secret(new.decode()), "pepper_previous": Secret(old.decode())}
    async with open_door(book_url, **both) as door:
        assert (await door.enter(account.secret)).principal.account_id == account.id
        assert (await door.enter(fresh.secret)).principal.account_id == account.id
        with pytest.raises(KeyInvalid):
            await door.enter(generate("live").secret)
    async with open_door(book_url, pepper=Secret(new.decode())) as door:
        assert (await door.enter(fresh.secret)).principal.account_id == account.id
        with pytest.raises(KeyInvalid):
            await door.enter(account.secret)


async def test_a_key_expires_although_its_answer_is_warm(book_url: str) -> None:
    async with open_door(book_url, cache_ttl_ms=60_000) as door:
        account = await make_account(door.pool)
        terms = KeyTerms(name="short", expires_at=datetime.now(UTC) + timedelta(seconds=0.3))
        async with book.acquire(door.pool) as conn:
            _, key = await create_key(conn, account.id, terms, pepper=PEPPER)
        await door.enter(key.secret)

        async def expired() -> bool | None:
            try:
                await door.enter(key.secret)
            except KeyExpired:
                return True
            return None

        await eventually(expired)


async def test_a_frozen_account_is_refused_by_the_book(book_url: str) -> None:
    async with open_door(book_url) as door:
        account = await make_account(door.pool)
        await door.pool.execute("UPDATE billing_accounts SET status = 'frozen'")
        with pytest.raises(AccountFrozen):
            await door.enter(account.secret)


async def test_limits_of_the_key_and_account_win_over_the_general_ones(book_url: str) -> None:
    async with open_door(book_url) as door:
        account = await make_account(door.pool)
        await door.pool.execute("UPDATE billing_accounts SET open_requests_max = 3")
        await door.pool.execute("UPDATE app_api_keys SET open_requests_max = 2")

        limits = (await door.enter(account.secret)).scopes.limits
        assert [limit.open_requests for limit in limits] == [3, 2]


async def test_a_key_is_kept_as_a_digest_only(book_url: str) -> None:
    async with open_pool(book_url) as pool:
        account = await make_account(pool)
        async with book.acquire(pool) as conn:
            await store.create_operator_key(conn, "op", pepper=PEPPER)
            records = await list_keys(conn, account.id, 10)
            first = await revoke_any_key(conn, account.app_key_id)
            again = await revoke_any_key(conn, account.app_key_id)
            with pytest.raises(KeyNotFound):
                await revoke_any_key(conn, new_id())
            with pytest.raises(KeyNotFound):
                await create_key(conn, new_id(), KeyTerms(name="x"), pepper=PEPPER)
        for table in ("app_api_keys", "operator_keys", "virtual_keys"):
            for row in await pool.fetch(f"SELECT * FROM {table}"):  # noqa: S608 - our own names
                assert account.secret not in str(dict(row))
                assert account.secret[8:40] not in str(dict(row))

    assert [record.id for record in records] == [account.app_key_id]
    assert records[0].status == "active"
    assert first == again
    assert first.revoked_at is not None


async def test_an_operator_key_is_known_until_it_is_revoked(book_url: str) -> None:
    async with open_pool(book_url) as pool:
        async with book.acquire(pool) as conn:
            new = await store.create_operator_key(conn, "op", pepper=PEPPER)
        sealed = digest(new.secret.encode(), PEPPER)
        known = await store.is_operator(pool, [sealed])
        await pool.execute("UPDATE operator_keys SET revoked_at = now()")

        assert known
        assert not await store.is_operator(pool, [sealed])


@pytest.mark.parametrize("told", ["both", "book", "till"])
async def test_a_revoked_key_is_refused_within_five_seconds(
    book_url: str, till_url: str, upstream: Upstream, told: str
) -> None:
    settings = make_settings(upstream.base_url)
    settings = msgspec.structs.replace(
        settings, keys=msgspec.structs.replace(settings.keys, cache_ttl_ms=4000)
    )
    async with running_gateway(book_url, till_url, upstream.base_url, settings) as gateway:
        key = await gateway.key()
        headers = {"authorization": f"Bearer {key}"}
        async with httpx.AsyncClient(base_url=gateway.base_url, headers=headers) as client:
            assert (await client.post("/chat/completions", json=BODY)).status_code == 200
            await revoke(gateway, key, told, till_url)
            started = time.monotonic()

            async def refused() -> Mapping[str, Any] | None:
                answer = await client.post("/chat/completions", json=BODY)
                return dict(answer.json()["error"]) if answer.status_code == 401 else None

            error = await eventually(refused)
            took_s = time.monotonic() - started
        await gateway.at_rest()

    assert error["code"] == "invalid_api_key"
    assert took_s < (0.5 if told != "book" else 5)


async def revoke(gateway: Gateway, key: str, told: str, till_url: str) -> None:
    row = await gateway.pool.fetchrow(
        "SELECT id, billing_account_id FROM app_api_keys WHERE last4 = $1", key[-4:]
    )
    assert row is not None
    if told != "till":
        async with book.acquire(gateway.pool) as conn:
            await revoke_any_key(conn, row["id"])
    if told != "book":
        await till_scan.set_key_status(till_url, row["billing_account_id"], row["id"], "revoked")
    assert id_text(row["id"])
