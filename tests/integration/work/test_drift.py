"""Drift is seen within one look, wherever it is, and traffic is never taken for it."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import redis.asyncio

from billing.drift import DriftWatch
from billing.figures import KEY
from billing.receipts import ChargeReceipt, encode_receipt
from config.secret import Secret
from config.settings import Settings
from gateway.work import working
from tests.support.books import Account, make_account
from tests.support.gateway import Gateway, eventually, make_settings, running_gateway
from tests.support.rawclient import RawRequest, chat, exchange
from tests.support.relay import MESSAGES
from tests.support.settlers import Rig, running_settler
from tests.support.upstream.launch import Upstream

METRICS = RawRequest(method="GET", target="/metrics")
DRIFT, AGE = "farebox_ledger_drift_nanos", "farebox_figures_age_seconds"


@pytest.fixture
async def rig(book_url: str, till_url: str) -> AsyncIterator[Rig]:
    async with running_settler(book_url, till_url) as rig:
        yield rig


@pytest.fixture
def watch(rig: Rig) -> DriftWatch:
    return DriftWatch(rig.pool, rig.till_url)


async def spent(rig: Rig) -> Account:
    """An account that all places know of: 1,000 nanos were paid."""
    account = await make_account(rig.pool)
    await serve(rig, account, 1000)
    await rig.at_rest()
    return account


async def serve(rig: Rig, account: Account, price: int) -> None:
    """One request from its hold to its commit."""
    receipt = await hold(rig, account, price)
    await rig.submit(account, receipt).committed


async def hold(rig: Rig, account: Account, nanos: int) -> ChargeReceipt:
    receipt = account.receipt(nanos)
    draft = encode_receipt(receipt)
    await rig.till.admit(account.scopes, receipt.source_reference, nanos, draft)
    return receipt


async def till(rig: Rig, *command: Any) -> None:
    await rig.till.link.command(command)


async def test_nothing_drifts_in_a_sound_world(rig: Rig, watch: DriftWatch) -> None:
    await spent(rig)
    open_one = await make_account(rig.pool)
    await hold(rig, open_one, 700)

    seen = await watch.look()

    assert (seen.drift_nanos, seen.holds, seen.held_nanos) == (0, 1, 700)
    assert seen.liabilities_nanos == 2 * 10**9 - 1000


async def test_names_that_are_no_text_are_looked_at_like_others(
    rig: Rig, watch: DriftWatch
) -> None:
    account = await make_account(rig.pool)
    data, scopes = encode_receipt(account.receipt(5)), account.scopes
    await till(rig, "HSET", scopes.outbox_key, b"\xff", b"5 " + data)
    held = ("nanos", "7", "state", "F", "worker", "w", "draft", data)
    await till(rig, "HSET", scopes.hold_prefix.encode() + b"\xfe", *held)
    await till(rig, "ZADD", scopes.leases_key, 1, b"\xfe")

    assert (await watch.look()).drift_nanos == 5 + 7


@pytest.mark.parametrize(
    ("field", "by"), [("held", 5), ("held", -5), ("uncommitted", 5), ("posted", 5), ("posted", -5)]
)
async def test_a_scope_that_is_off_is_told_by_how_much(
    rig: Rig, watch: DriftWatch, caplog: pytest.LogCaptureFixture, field: str, by: int
) -> None:
    account = await spent(rig)
    scope = account.scopes.scope_keys[0]

    await till(rig, "HINCRBY", scope, field, by)
    wrong = [(await watch.look()).drift_nanos for _ in range(3)]
    await till(rig, "HINCRBY", scope, field, -by)
    mended = (await watch.look()).drift_nanos

    assert (wrong, mended) == ([5] * 3, 0)
    said = [record for record in caplog.records if record.message == "ledger.drift"]
    # Parted by sign as well: what is negative is one more thing that is wrong.
    assert len({record.__dict__["what"] for record in said}) == len(said) > 0
    assert said[0].__dict__["nanos"] == 5
    assert said[0].__dict__["billing_account_id"].startswith("acct_")


@pytest.mark.parametrize(
    ("change", "drift"),
    [
        ("UPDATE billing_accounts SET balance_nanos = balance_nanos + 7", 7),
        ("UPDATE billing_accounts SET version = version + 1", 1),
    ],
)
async def test_a_balance_that_is_not_its_ledgers_is_found(
    rig: Rig, watch: DriftWatch, change: str, drift: int
) -> None:
    await make_account(rig.pool)
    before = await watch.look()
    await rig.pool.execute(change)

    after = await watch.look()

    assert (before.drift_nanos, after.drift_nanos) == (0, drift)


async def test_all_accounts_are_looked_at_in_turn_and_wrong_ones_always(
    rig: Rig, watch: DriftWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("billing.drift.ACCOUNTS_PER_LOOK", 2)
    for _ in range(5):
        last = await make_account(rig.pool)
    change = "UPDATE billing_accounts SET balance_nanos = balance_nanos + 7 WHERE id = $1"
    await rig.pool.execute(change, last.id)

    drifts = [(await watch.look()).drift_nanos for _ in range(7)]

    assert drifts == [0, 0, 7, 7, 7, 7, 7]


async def test_traffic_is_never_taken_for_drift(rig: Rig, watch: DriftWatch) -> None:
    accounts = [await make_account(rig.pool) for _ in range(3)]
    stop = asyncio.Event()
    ended = 0

    async def keep_serving(account: Account) -> None:
        nonlocal ended
        while not stop.is_set():
            await serve(rig, account, 10)
            ended += 1

    async with asyncio.TaskGroup() as tasks:
        for number in range(3):
            tasks.create_task(keep_serving(accounts[number]))
        seen = [await watch.look() for _ in range(10)]
        stop.set()

    assert {look.drift_nanos for look in seen} == {0}
    # The looks met requests under way; else this would prove nothing.
    assert sum(look.holds + look.entries for look in seen) > 0
    assert ended > 100


def quick(settings: Settings, gateway: Gateway, till_url: str) -> Settings:
    replace = msgspec.structs.replace
    return replace(
        settings,
        book=replace(settings.book, url=Secret(gateway.book_url)),
        till=replace(settings.till, url=Secret(till_url)),
        work=replace(settings.work, every_s=0.05, audit_every_s=0.05),
    )


async def shown(gateway: Gateway) -> dict[str, float]:
    answer = await exchange(gateway.origin, METRICS)
    assert answer.status == 200
    lines = (line.rpartition(" ") for line in answer.body.decode().splitlines() if line[0] != "#")
    return {name: float(value) for name, _, value in lines}


async def test_the_work_process_finds_out_and_every_worker_shows_it(
    book_url: str, till_url: str, upstream: Upstream
) -> None:
    settings = make_settings(upstream.base_url)
    async with running_gateway(book_url, till_url, upstream.base_url, settings) as gateway:
        key = await gateway.key(credits="1000")
        await exchange(gateway.origin, chat(key, {"model": "plain", "messages": MESSAGES}))
        await gateway.at_rest()

        async def drift_is(wanted: float | None) -> dict[str, float]:
            async def is_shown() -> dict[str, float] | None:
                found = await shown(gateway)
                return found if found.get(DRIFT) == wanted else None

            found: dict[str, float] = await eventually(is_shown)
            return found

        assert DRIFT not in await shown(gateway)
        async with working(quick(settings, gateway, till_url)):
            sound = await drift_is(0)
            balance = await gateway.pool.fetchval("SELECT balance_nanos FROM billing_accounts")
            await gateway.tamper("UPDATE billing_accounts SET balance_nanos = 3")
            await drift_is(balance - 3)
            await gateway.tamper("UPDATE billing_accounts SET balance_nanos = $1", balance)
            await drift_is(0)

        assert sound["farebox_liabilities_usd"] == balance / 10**9
        assert sound["farebox_holds_usd"] == sound["farebox_outbox_entries"] == 0
        assert sound['farebox_swept_holds_total{outcome="recovered"}'] == 0
        assert 0 <= sound[AGE] < 5
        client = redis.asyncio.from_url(till_url)
        # Nobody publishes any more: what is shown grows old, and is gone after some periods.
        assert 0 < await client.pttl(KEY) <= 250 or not await client.exists(KEY)
        await client.delete(KEY)
        await client.aclose()
        assert DRIFT not in await shown(gateway)
