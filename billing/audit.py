"""`farebox audit`: does the money add up? Read-only; safe while traffic runs.

The book is looked at inside one snapshot, so nothing that happens meanwhile can look wrong. The
till is compared with itself at single moments, and with the book read after it.
Failure: BookUnavailable, BookRefused, TillUnavailable or TillRefused: it could not be checked.
"""

from billing.audit_book import check_book
from billing.audit_report import Check, Draft, Finding, Invariant, Note, Report
from billing.audit_till import check_till
from billing.book import Connection, translated
from billing.till_scan import TillScan

__all__ = ["Check", "Finding", "Invariant", "Note", "Report", "audit"]


async def audit(conn: Connection, till: TillScan | None, *, at_rest: bool | None) -> Report:
    """Check every invariant; without a till its part is named as not checked.

    at_rest: nothing runs, so a hold or an outbox entry is a finding. conn must be outside of a
    transaction.
    """
    assert not conn.is_in_transaction()
    draft = Draft()
    async with translated(), conn.transaction(isolation="repeatable_read", readonly=True):
        await check_book(conn, draft)
    if till is None:
        draft[Invariant.TILL].not_checked = "no till was given"
    else:
        await check_till(conn, till, draft, at_rest=at_rest is True)
    checks = list(draft.checks.values())
    return Report(at_rest=at_rest is True, checks=checks, notes=draft.notes)
