"""Do ledger, balances and till agree? A look at them again and again, cheap enough for that.

The audit recomputes everything; this compares sums. Balances are looked at a window of accounts at
a time, a large till a part at a time; what was found wrong is looked at each time until it agrees.
Everything is compared at single moments, so traffic raises no alarm.
Failure: what the book and the till raise; TimeoutError when a look takes too long.
"""

import asyncio
import logging
from uuid import UUID

from billing.audit_book import balance_drift
from billing.audit_report import Draft, Finding, Invariant
from billing.audit_till import Totals, check_till
from billing.book import Connection, Pool, acquire, translated
from billing.till_scan import TillScan, open_till
from config.clock import seconds

log = logging.getLogger("billing.drift")

LOOK_S = seconds(20_000)
ACCOUNTS_PER_LOOK = 10_000
WRONG_MAX = 1000
# A shard with more is counted in part and its sums are not checked: a look at one moment would
# keep everybody else waiting.
ENTRIES_PER_SHARD_MAX = 2000
SAID_MAX = 10_000
FIRST, LAST = UUID(int=0), UUID(int=2**128 - 1)


SELECT_WINDOW_END = """
SELECT id
FROM billing_accounts
WHERE id > $1
ORDER BY id
OFFSET $2
LIMIT 1
"""
SELECT_DRIFTED = """
SELECT
    a.id, a.balance_nanos, a.version,
    coalesce(l.seq, 0) AS seq, coalesce(l.balance_after_nanos, 0) AS balance_after_nanos
FROM billing_accounts AS a
LEFT JOIN LATERAL (
    SELECT seq, balance_after_nanos
    FROM credit_ledger
    WHERE billing_account_id = a.id
    ORDER BY seq DESC
    LIMIT 1
) AS l ON true
WHERE ((a.id > $1 AND a.id <= $2) OR a.id = ANY($3::uuid[]))
  AND (a.balance_nanos <> coalesce(l.balance_after_nanos, 0)
       OR a.version <> coalesce(l.seq, 0))
ORDER BY a.id
LIMIT $4
"""
SELECT_LIABILITIES = """
SELECT coalesce(sum(balance_nanos), 0)
FROM billing_accounts
WHERE balance_nanos > 0
"""


class Seen(Totals):
    """What a look found."""

    drift_nanos: int = 0
    liabilities_nanos: int = 0


class DriftWatch:
    """One watcher and what it remembers between looks."""

    def __init__(self, pool: Pool, till_url: str) -> None:
        self._pool = pool
        self._till_url = till_url
        self._after = FIRST
        self._wrong: set[UUID] = set()
        self._parts: dict[str, tuple[int, Totals]] = {}
        self._turn = 0
        self._said: set[tuple[str, ...]] = set()

    async def look(self) -> Seen:
        """One look. Each thing that is wrong is logged when it is found."""
        draft = Draft()
        async with asyncio.timeout(LOOK_S), acquire(self._pool) as conn:
            await self._look_at_balances(conn, draft)
            async with open_till(self._till_url, entries_max=ENTRIES_PER_SHARD_MAX) as till:
                await self._look_at_till(conn, till, draft)
            async with translated():
                owed = int(await conn.fetchval(SELECT_LIABILITIES))
        seen = self._sums(draft[Invariant.LEDGER].drift_nanos, owed)
        if not seen.drift_nanos:
            self._said.clear()
        for check in draft.checks.values():
            for finding in check.findings:
                self._say_once(finding)
        return seen

    async def _look_at_balances(self, conn: Connection, draft: Draft) -> None:
        async with translated():
            after = self._after
            until = await conn.fetchval(SELECT_WINDOW_END, after, ACCOUNTS_PER_LOOK - 1)
            window = (after, until or LAST, list(self._wrong), WRONG_MAX)
            rows = await conn.fetch(SELECT_DRIFTED, *window)
        self._after = until or FIRST
        self._wrong = {row["id"] for row in rows}
        for row in rows:
            expected = f"{row['balance_after_nanos']} at version {row['seq']}"
            found = f"{row['balance_nanos']} at version {row['version']}"
            drift = balance_drift(row)
            ledger = draft[Invariant.LEDGER]
            ledger.add_drift(drift, "balance", expected, found, billing_account_id=row["id"])

    async def _look_at_till(self, conn: Connection, till: TillScan, draft: Draft) -> None:
        patterns = await till.patterns()
        if not set(patterns) >= set(self._parts):
            self._parts.clear()
        part = patterns[self._turn % len(patterns)]
        self._turn += 1
        totals = await check_till(conn, till, draft, at_rest=False, patterns=[part])
        self._parts[part] = (draft[Invariant.TILL].drift_nanos, totals)

    def _sums(self, book_drift: int, owed: int) -> Seen:
        seen = Seen(drift_nanos=book_drift, liabilities_nanos=owed)
        for drift, part in self._parts.values():
            seen.drift_nanos += drift
            seen.holds += part.holds
            seen.held_nanos += part.held_nanos
            seen.entries += part.entries
            seen.hold_age_s = max(seen.hold_age_s, part.hold_age_s)
            seen.entry_age_s = max(seen.entry_age_s, part.entry_age_s)
        return seen

    def _say_once(self, finding: Finding) -> None:
        key = (finding.what, *finding.ids.values())
        if finding.nanos and key not in self._said and len(self._said) < SAID_MAX:
            self._said.add(key)
            facts = {"what": finding.what, "expected": finding.expected, "found": finding.found}
            log.error("ledger.drift", extra={**facts, **finding.ids, "nanos": finding.nanos})
