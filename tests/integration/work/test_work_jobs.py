"""The jobs of the work process beside one another."""

import logging

import msgspec
import pytest

from billing.prices import CostSource
from billing.receipts import encode_receipt
from config.secret import Secret
from gateway.work import working
from tests.support.books import make_account
from tests.support.gateway import eventually, make_settings
from tests.support.settlers import running_settler

replace = msgspec.structs.replace


async def test_a_job_with_a_bug_does_not_keep_the_sweeper_from_its_work(
    book_url: str, till_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The sweeper must have watched a lease for a while: begun anew each time, it never would."""
    monkeypatch.setattr("billing.drift.ACCOUNTS_PER_LOOK", None)
    settings = make_settings("http://127.0.0.1:1")
    settings = replace(
        settings,
        book=replace(settings.book, url=Secret(book_url)),
        till=replace(settings.till, url=Secret(till_url)),
        work=replace(settings.work, every_s=0.05, audit_every_s=0.05, sweep_grace_s=0.3),
    )
    async with running_settler(book_url, till_url) as rig:
        account = await make_account(rig.pool)
        draft = account.receipt(0, reported_cost_usd=None, cost_source=CostSource.NONE)
        await rig.till.admit(account.scopes, draft.source_reference, 1000, encode_receipt(draft))
        lease = ("ZADD", account.scopes.leases_key, 1, draft.source_reference)
        await rig.till.link.command(lease)

        async def is_swept() -> bool | None:
            return await rig.pool.fetchval("SELECT count(*) FROM charge_receipts") == 1 or None

        async with working(settings):
            await eventually(is_swept)

    crashes = [record for record in caplog.records if record.message == "work.crashed"]
    assert {(record.levelno, record.job) for record in crashes} == {(logging.ERROR, "audit")}  # type: ignore[attr-defined]
