"""A till that cannot be trusted is made anew, from whatever state, and nothing is lost."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import asyncpg
import pytest
from click.testing import CliRunner
from redis.asyncio import Redis

from billing.audit import Invariant, Report
from billing.fleet import REBUILD_LOCK
from billing.receipts import Outcome, encode_receipt
from billing.till_rebuild import RebuildRefused
from billing.till_scan import open_till
from billing.till_status import drop_aside, list_aside
from billing.till_wire import Renewal
from gateway.cli.audit import run_audit
from gateway.cli.till import till as till_command
from tests.support.audit_spoiler import TILL, Spoiler
from tests.support.audit_world import (
    COPY_DB,
    GUESSED,
    OPEN_DB,
    SOUND,
    Customer,
    Desk,
    World,
    build,
    client_of,
    command,
    copy_till,
    explain,
    open_desk,
    tear_down,
)
from tests.support.rebuilds import rebuild_at


@pytest.fixture(scope="module")
def world(postgres_url: str, valkey_url: str) -> Iterator[World]:
    yield asyncio.run(build(postgres_url, valkey_url))
    asyncio.run(tear_down(postgres_url))


def whats(report: Report, invariant: Invariant) -> list[str]:
    (check,) = (check for check in report.checks if check.invariant == invariant)
    return [finding.what for finding in check.findings]


async def contents(client: Redis, prefix: str) -> set[Any]:
    """Every draft and every outbox entry, wherever it is by now."""
    found: set[Any] = set()
    async for key in client.scan_iter(f"{prefix}*", count=1000):
        kind = await client.type(key)
        if kind == b"hash":
            fields = await client.hgetall(key)
            is_scope = key.removeprefix(prefix.encode())[:2] in {b"a:", b"k:"}
            found |= set() if is_scope else set(fields.values())
        elif kind == b"string" and not key.endswith(b"epoch"):
            found.add(await client.get(key))
    return {value for value in found if len(value) > 20 or value == b"x"}


@pytest.mark.sampled(14)
@pytest.mark.parametrize("name", TILL)
async def test_whatever_was_wrong_is_mended_and_nothing_is_lost(world: World, name: str) -> None:
    invariant, _, spoil = TILL[name]
    await copy_till(world, OPEN_DB, COPY_DB)
    url = world.till(COPY_DB)
    async with world.copy(SOUND) as book_url, client_of(url) as client:
        spoiler = Spoiler(world, client)
        await spoil(spoiler)
        before = await contents(client, spoiler.prefix)

        done = await rebuild_at(book_url, url)
        report = await run_audit(book_url, url, False)
        after = await contents(client, spoiler.prefix)

        assert whats(report, Invariant.TILL) == [], explain(report)
        assert done.epoch >= 2
        assert before - after == set()
        # Whatever was known is seeded anew and serves.
        if invariant == Invariant.TILL:
            async with open_desk(book_url, url) as desk:
                await desk.serve(world.customers[1], world.customers[1].receipt())


# With an epoch that is no text nothing is admitted, so there is nothing new to sweep.
@pytest.mark.sampled(14)
@pytest.mark.parametrize("name", [name for name in TILL if name != "a list for the epoch"])
async def test_whatever_is_wrong_keeps_no_sweeper_from_its_work(world: World, name: str) -> None:
    _, _, spoil = TILL[name]
    await copy_till(world, OPEN_DB, COPY_DB)
    url, spoilt = world.till(COPY_DB), world.customers[0].scopes.epoch_key
    other = next(c for c in world.customers[1:] if c.scopes.epoch_key != spoilt)
    async with world.copy(SOUND) as book_url, client_of(url) as client:
        await spoil(Spoiler(world, client))
        async with open_desk(book_url, url) as desk:
            draft = other.receipt(usage=GUESSED, outcome=Outcome.RECOVERED)
            await desk.abandon(other, draft, is_sent=True)
            query = "SELECT outcome FROM charge_receipts WHERE request_id = $1"
            outcome = await desk.pool.fetchval(query, draft.request_id)

    assert outcome == "recovered"


async def test_a_sound_till_stays_what_it_is(world: World) -> None:
    await copy_till(world, OPEN_DB, COPY_DB)
    url = world.till(COPY_DB)
    async with world.copy(SOUND) as book_url:
        done = await rebuild_at(book_url, url)
        report = await run_audit(book_url, url, False)

    assert (done.holds, done.outbox, done.wrong_scopes, done.set_aside) == (2, 1, 0, [])
    assert report.is_clean, explain(report)
    notes = {note.what: note.count for note in report.notes}
    assert (notes["open holds"], notes["outbox entries"]) == (2, 1)


async def test_what_cannot_be_read_is_set_aside_under_a_name_that_is_told(world: World) -> None:
    await copy_till(world, OPEN_DB, COPY_DB)
    url = world.till(COPY_DB)
    async with world.copy(SOUND) as book_url, client_of(url) as client:
        spoiler = Spoiler(world, client)
        await client.hset(spoiler.hold, "draft", "{")
        await client.hset(spoiler.outbox, world.waiting.source_reference, "1.5 {}")

        done = await rebuild_at(book_url, url)
        report = await run_audit(book_url, url, False)
        hold, entry = done.set_aside
        kept = await client.hget(hold, "draft")
        key, _, field = entry.partition(" ")
        kept_entry = await client.hget(key, field)
        async with open_till(url) as scan:
            shown = {row["key"]: row["content"] for row in await list_aside(scan)}
            dropped = [await drop_aside(scan, name) for name in (hold, hold, spoiler.account)]
        there = await client.exists(hold, spoiler.account)

    assert (kept, kept_entry) == (b"{", b"1.5 {}")
    assert set(shown) == {hold, key}
    assert "1.5 {}" in shown[key]
    # Only what was set aside can be dropped this way.
    assert (dropped, there) == ([True, False, False], 1)
    assert report.is_clean, explain(report)
    notes = {note.what: note.count for note in report.notes}
    assert notes["keys set aside by a rebuild"] == 2
    assert (done.holds, done.outbox) == (1, 0)


async def keep_ending(desk: Desk, customer: Customer, count: int) -> None:
    """Requests that were under way end one by one, and ones that the till had lost come back."""
    for _ in range(count):
        receipt = customer.receipt()
        renewal = Renewal(
            request_id=receipt.source_reference,
            hold_nanos=receipt.hold_nanos,
            is_forwarded=True,
            draft=encode_receipt(receipt),
            is_new=True,
        )
        await desk.till.renew(customer.scopes, renewal)
        await asyncio.sleep(0.005)
        settled = desk.settler.submit(customer.scopes, receipt.source_reference, receipt)
        await settled.committed


async def test_requests_that_end_meanwhile_are_counted_once(world: World) -> None:
    await copy_till(world, OPEN_DB, COPY_DB)
    url = world.till(COPY_DB)
    async with world.copy(SOUND) as book_url:
        async with open_desk(book_url, url) as desk, asyncio.TaskGroup() as tasks:
            for customer in world.customers[:2]:
                tasks.create_task(keep_ending(desk, customer, 15))
            await rebuild_at(book_url, url)
        report = await run_audit(book_url, url, False)

    assert report.is_clean, explain(report)
    notes = {note.what: note.count for note in report.notes}
    assert (notes["open holds"], notes["outbox entries"]) == (2, 1)


async def test_only_one_rebuilds_at_a_time(world: World) -> None:
    async with world.copy(SOUND) as book_url:
        conn = await asyncpg.connect(book_url)
        await conn.execute("SELECT pg_advisory_lock($1)", REBUILD_LOCK)
        with pytest.raises(RebuildRefused):
            await rebuild_at(book_url, world.till(COPY_DB))
        await conn.close()


async def test_the_commands_say_what_there_is_and_what_was_done(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await copy_till(world, OPEN_DB, COPY_DB)
    async with world.copy(SOUND) as book_url:
        await command(book_url, "INSERT INTO workers (name) VALUES ('w_one')")
        monkeypatch.setenv("FAREBOX_DATABASE_URL", book_url)
        monkeypatch.setenv("FAREBOX_BOOK__ROLES", "shared")
        monkeypatch.setenv("FAREBOX_TILL_URL", world.till(COPY_DB))
        runner = CliRunner()

        def run(*args: str) -> Any:
            return runner.invoke(till_command, args)

        before = await asyncio.to_thread(run, "status", "--json")
        unsure = await asyncio.to_thread(run, "rebuild")
        done = await asyncio.to_thread(run, "rebuild", "--yes", "--json")
        after = await asyncio.to_thread(run, "status")

    facts = json.loads(before.stdout)
    assert (facts["state"], facts["epoch"], facts["shards_open"]) == ("open", 1, 256)
    assert (facts["holds"], facts["outbox"], facts["accounts"]) == (2, 1, 3)
    assert [worker["name"] for worker in facts["workers"]] == ["w_one"]
    assert unsure.exit_code == 2
    assert "--yes" in unsure.stderr
    assert json.loads(done.stdout)["epoch"] == 2
    assert "1 workers place their holds again" in done.stderr
    assert after.exit_code == 0
    assert "256" in after.stdout
    assert "w_one" in after.stdout
