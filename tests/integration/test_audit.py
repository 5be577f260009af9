"""The audit is audited: copies of a book are corrupted, and a sound book raises no alarm."""

import asyncio
from collections.abc import Iterator

import asyncpg
import pytest

from billing.audit import Invariant, Report, audit
from tests.support.audit_corruptions import BOOK, PLAIN_KEY
from tests.support.audit_deposits import DEPOSITS
from tests.support.audit_world import (
    LOOSE,
    SOUND,
    World,
    build,
    command,
    explain,
    found,
    receipts_of,
    tear_down,
)


@pytest.fixture(scope="module")
def world(postgres_url: str, valkey_url: str) -> Iterator[World]:
    yield asyncio.run(build(postgres_url, valkey_url))
    asyncio.run(tear_down(postgres_url))


async def audit_book_at(url: str) -> Report:
    conn = await asyncpg.connect(url)
    try:
        return await audit(conn, None, at_rest=None)
    finally:
        await conn.close()


@pytest.mark.parametrize("template", [SOUND, LOOSE])
async def test_a_sound_book_raises_no_alarm(world: World, template: str) -> None:
    async with world.copy(template) as url:
        report = await audit_book_at(url)

    assert report.is_clean, explain(report)
    checked = {check.invariant: check.checked for check in report.checks}
    assert checked[Invariant.PRICE] == checked[Invariant.CHARGES] == 30 + 3
    # Grants, charges, what the sweeper charged, what was adjusted afterwards, what was paid in.
    assert checked[Invariant.LEDGER] == 4 + 3 + 3 * 7 + 2 + 2 + 6
    assert checked[Invariant.DEPOSITS] == 4
    skipped = {check.invariant for check in report.checks if check.not_checked}
    assert skipped == {Invariant.TILL}


async def test_the_exceptions_of_price_covers_cost_are_summed(world: World) -> None:
    async with world.copy(SOUND) as url:
        report = await audit_book_at(url)

    sums = {note.what: (note.count, note.nanos) for note in report.notes}
    receipts = receipts_of(world.customers[0])
    overrun = sum(receipt.overrun_nanos for receipt in receipts)
    assert sums["cost beyond the hold, borne by the operator"] == (3, 3 * overrun)
    loss = sum(max(0, r.provider_cost_nanos - r.price_nanos) for r in receipts)
    assert loss > 0
    assert sums["price below cost: overrun"] == (3, 3 * loss)
    assert sums["free: served without a price"] == (3, None)


CORRUPTIONS = {**BOOK, **DEPOSITS}


@pytest.mark.parametrize("name", CORRUPTIONS)
async def test_a_corrupt_book_is_found(world: World, name: str) -> None:
    invariant, what, corruption = CORRUPTIONS[name]
    async with world.copy(LOOSE) as url:
        await command(url, "SET session_replication_role = replica;" + corruption)

        report = await audit_book_at(url)

    assert what in found(report, invariant), explain(report)
    assert PLAIN_KEY not in explain(report)


async def test_the_count_is_exact_and_what_is_shown_is_bounded(world: World) -> None:
    change = "UPDATE charge_receipts SET markup_bps = 1"
    async with world.copy(LOOSE) as url:
        await command(url, "SET session_replication_role = replica;" + change)

        report = await audit_book_at(url)

    (check,) = (check for check in report.checks if check.invariant == Invariant.PRICE)
    assert (check.violations, len(check.findings)) == (33, 20)


async def test_drift_is_what_a_balance_differs_by(world: World) -> None:
    change = "UPDATE billing_accounts SET balance_nanos = balance_nanos - 3 WHERE version > 9"
    async with world.copy(LOOSE) as url:
        await command(url, "SET session_replication_role = replica;" + change)

        report = await audit_book_at(url)

    drifts = {check.invariant: check.drift_nanos for check in report.checks if check.drift_nanos}
    assert drifts == {Invariant.LEDGER: 3}
