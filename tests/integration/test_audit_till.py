"""The till's side of the audit: corrupted tills, traffic during the audit, and the command."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from billing import book, till_scan
from billing.audit import Invariant, Report
from billing.errors import AccountFrozen, KeyRevoked, TillUnavailable
from billing.till_epoch import AccountState
from billing.till_scopes import account_scope_key, shard_prefix
from config.ids import new_id
from gateway.cli.audit import audit as audit_command
from gateway.cli.audit import run_audit
from tests.support.audit_spoiler import PLAIN_KEY, TILL, Spoiler
from tests.support.audit_world import (
    COPY_DB,
    OPEN_DB,
    REST_DB,
    SOUND,
    TRAFFIC_DB,
    Customer,
    Desk,
    World,
    build,
    client_of,
    command,
    copy_till,
    explain,
    found,
    open_desk,
    tear_down,
)

L6 = Invariant.TILL


@pytest.fixture(scope="module")
def world(postgres_url: str, valkey_url: str) -> Iterator[World]:
    yield asyncio.run(build(postgres_url, valkey_url))
    asyncio.run(tear_down(postgres_url))


async def audit_at(world: World, number: int, *, at_rest: bool = False) -> Report:
    return await run_audit(world.url(SOUND), world.till(number), at_rest)


async def test_a_till_with_open_requests_raises_no_alarm(world: World) -> None:
    report = await audit_at(world, OPEN_DB)

    assert report.is_clean, explain(report)
    notes = {note.what: note.count for note in report.notes}
    assert (notes["open holds"], notes["outbox entries"]) == (2, 1)


async def test_a_till_at_rest_is_clean(world: World) -> None:
    report = await audit_at(world, REST_DB, at_rest=True)

    assert report.is_clean, explain(report)
    (check,) = (check for check in report.checks if check.invariant == L6)
    assert check.checked == 8


async def test_at_rest_every_hold_and_outbox_entry_is_a_finding(world: World) -> None:
    report = await audit_at(world, OPEN_DB, at_rest=True)

    assert found(report, L6) == ["at rest"] * 3
    assert report.violated() == {L6}


@pytest.mark.parametrize("name", TILL)
async def test_a_corrupt_till_is_found(world: World, name: str) -> None:
    invariant, what, spoil = TILL[name]
    await copy_till(world, OPEN_DB, COPY_DB)
    async with client_of(world.till(COPY_DB)) as client:
        await spoil(Spoiler(world, client))

    report = await audit_at(world, COPY_DB)

    what = what.format(waiting=world.waiting.source_reference)
    assert what in found(report, invariant), explain(report)
    assert PLAIN_KEY not in explain(report)


async def keep_serving(
    desk: Desk, customer: Customer, stop: asyncio.Event, done: list[int]
) -> None:
    while not stop.is_set() and len(done) < 20_000:
        await desk.serve(customer, customer.receipt(hold_nanos=2_000_000), 0.003)
        done.append(1)


async def keep_granting(world: World, desk: Desk, stop: asyncio.Event, url: str) -> None:
    """Credit that arrives while requests run: the book first, then the till."""
    number = 0
    while not stop.is_set():
        customer = world.customers[number % 2]
        number += 1
        async with book.acquire(desk.pool) as conn:
            reference = f"during {number}"
            state = await book.grant(conn, customer.account_id, 10**9, reference, "")
        await till_scan.tell_account(url, state, 1)
        await asyncio.sleep(0.002)


async def test_traffic_during_audits_raises_no_false_alarm(world: World) -> None:
    await copy_till(world, REST_DB, TRAFFIC_DB)
    till_url, stop = world.till(TRAFFIC_DB), asyncio.Event()
    done: list[int] = []
    async with world.copy(SOUND) as book_url:
        async with open_desk(book_url, till_url) as desk, asyncio.TaskGroup() as tasks:
            for number in range(8):
                customer = world.customers[number % 2]
                tasks.create_task(keep_serving(desk, customer, stop, done))
            tasks.create_task(keep_granting(world, desk, stop, till_url))
            reports = [await run_audit(book_url, till_url, False) for _ in range(20)]
            stop.set()
        last = await run_audit(book_url, till_url, True)

    for report in [*reports, last]:
        assert report.is_clean, explain(report)
        checked = {check.invariant: check.checked for check in report.checks}
        # All checks of one report saw the same receipts.
        assert checked[Invariant.CHARGES] == checked[Invariant.PRICE]
    assert len(done) > 200
    # The audits met requests in flight; else this test would prove nothing.
    notes = [note for report in reports for note in report.notes if note.what == "open holds"]
    assert sum(note.count for note in notes) > 0


async def test_a_fault_is_found_during_traffic(world: World) -> None:
    await copy_till(world, REST_DB, TRAFFIC_DB)
    till_url, stop = world.till(TRAFFIC_DB), asyncio.Event()
    done: list[int] = []
    customer = world.customers[0]
    async with client_of(till_url) as client:
        await client.hincrby(account_scope_key(customer.account_id), "held", 1)
    async with (
        world.copy(SOUND) as book_url,
        open_desk(book_url, till_url) as desk,
        asyncio.TaskGroup() as tasks,
    ):
        for _ in range(4):
            tasks.create_task(keep_serving(desk, customer, stop, done))
        report = await run_audit(book_url, till_url, False)
        stop.set()

    assert found(report, L6) == ["held"], explain(report)
    (finding,) = (finding for check in report.checks for finding in check.findings)
    assert int(finding.found) == int(finding.expected) + 1


async def test_a_grant_reaches_a_warm_till_and_is_told_once(world: World) -> None:
    await copy_till(world, REST_DB, COPY_DB)
    url, account_id = world.till(COPY_DB), world.customers[0].account_id
    scope = await till_scan.read_account_scope(url, account_id)
    assert scope is not None
    assert scope.posted is not None
    assert scope.version == 9
    state = AccountState(
        account_id=account_id, balance_nanos=scope.posted + 5, version=10, status="frozen"
    )

    answers = [await till_scan.tell_account(url, state, epoch) for epoch in (1, 1, 2)]

    assert answers == ["seeded", "kept", "epoch"]
    scope = await till_scan.read_account_scope(url, account_id)
    assert scope is not None
    assert (scope.posted, scope.version, scope.status) == (state.balance_nanos, 10, "frozen")
    assert await till_scan.read_account_scope(url, new_id()) is None


async def test_a_status_is_obeyed_by_the_next_request(world: World) -> None:
    await copy_till(world, REST_DB, COPY_DB)
    url, first, second = world.till(COPY_DB), *world.customers[:2]
    async with world.copy(SOUND) as book_url:
        # A worker that is refused asks the book: the till alone freezes nobody for long.
        await command(book_url, "UPDATE billing_accounts SET status = 'frozen'")
        async with open_desk(book_url, url) as desk:
            await desk.hold(second, second.receipt())
            await till_scan.set_key_status(url, first.account_id, first.app_key_id, "revoked")
            await till_scan.set_account_status(url, second.account_id, "frozen")

            with pytest.raises(KeyRevoked):
                await desk.hold(first, first.receipt())
            with pytest.raises(AccountFrozen):
                await desk.hold(second, second.receipt())
            await till_scan.set_account_status(url, second.account_id, "active")
            await desk.hold(second, second.receipt())


async def test_shards_are_read_with_all_that_they_hold(world: World) -> None:
    async with till_scan.open_till(world.till(OPEN_DB)) as till:
        shards = {shard.prefix: shard async for shard in till.shards(await till.patterns())}

    customer = world.customers[0]
    shard = shards[shard_prefix(customer.account_id)]
    assert shard.epoch == 1
    assert shard.keys[customer.app_key_id].open == 2
    (budget,) = shard.budgets.values()
    assert budget.budget == replace(customer.budget, limit_nanos=0)
    for scope in (shard.accounts[customer.account_id], budget):
        assert scope.held == world.held.hold_nanos + world.forwarded.hold_nanos
        assert scope.uncommitted == world.waiting.price_nanos
    held, forwarded = world.held.source_reference, world.forwarded.source_reference
    assert {name: hold.state for name, hold in shard.holds.items()} == {held: "H", forwarded: "F"}
    assert shard.holds[held].draft == world.held
    assert shard.outbox[world.waiting.source_reference].receipt == world.waiting
    assert set(shard.leases) == {held, forwarded}


def test_a_large_till_is_scanned_in_passes() -> None:
    patterns = [till_scan.scan_patterns(total) for total in (10**5, 10**6, 10**8)]

    assert [len(passes) for passes in patterns] == [1, 16, 256]


@asynccontextmanager
async def silent_server() -> AsyncIterator[str]:
    """It takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}/0"


async def test_every_word_to_a_silent_till_ends_in_time(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(till_scan, "CALL_TIMEOUT_S", 0.2)
    account_id = world.customers[0].account_id
    state = AccountState(account_id=account_id, balance_nanos=1, version=1, status="active")
    begun = time.monotonic()
    async with silent_server() as url:
        for ask in (
            till_scan.set_key_status(url, account_id, new_id(), "revoked"),
            till_scan.set_account_status(url, account_id, "frozen"),
            till_scan.tell_account(url, state, 1),
            till_scan.read_account_scope(url, account_id),
            run_audit(world.url(SOUND), url, False),
        ):
            with pytest.raises(TillUnavailable):
                await ask

    assert time.monotonic() - begun < 5
    with pytest.raises(TillUnavailable):
        await till_scan.read_account_scope("redis://127.0.0.1:1/0", account_id)


@pytest.mark.parametrize(
    ("database", "till", "flags", "status"),
    [
        (SOUND, OPEN_DB, [], 0),
        (SOUND, REST_DB, ["--at-rest"], 0),
        (SOUND, OPEN_DB, ["--at-rest"], 1),
        ("no_such_database", OPEN_DB, [], 2),
        (SOUND, -1, [], 2),
    ],
)
def test_the_exit_status_tells_clean_from_violated_from_unknown(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    database: str,
    till: int,
    flags: list[str],
    status: int,
) -> None:
    till_url = world.till(till) if till >= 0 else "redis://127.0.0.1:1/0"
    monkeypatch.setenv("FAREBOX_DATABASE_URL", world.url(database))
    monkeypatch.setenv("FAREBOX_BOOK__ROLES", "shared")
    monkeypatch.setenv("FAREBOX_TILL_URL", till_url)

    table = CliRunner().invoke(audit_command, flags)
    as_json = CliRunner().invoke(audit_command, [*flags, "--json"])

    assert (table.exit_code, as_json.exit_code) == (status, status), table.output
    if status == 2:
        assert "could not check" in table.stderr
        assert as_json.stdout == ""
        return
    assert "L4 price recomputes" in table.stdout
    report = json.loads(as_json.stdout)
    assert report["clean"] is (status == 0)
    assert [check["invariant"][:2] for check in report["checks"]] == [f"L{n}" for n in range(1, 9)]
