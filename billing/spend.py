"""What virtual keys have spent, summed over days of UTC: reading, for people. Never for admission.

Failure: BookUnavailable.
"""

from collections.abc import Mapping
from datetime import datetime
from uuid import UUID

import msgspec

from billing.book import Connection, translated
from billing.errors import AccountUnknown
from billing.windows import window_start


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """In nanos, in the windows that are under way."""

    day: int
    week: int
    month: int
    total: int


SELECT_USAGE = """
SELECT
    coalesce(sum(s.spent_nanos) FILTER (WHERE s.window_start >= $3), 0)::bigint AS day,
    coalesce(sum(s.spent_nanos) FILTER (WHERE s.window_start >= $4), 0)::bigint AS week,
    coalesce(sum(s.spent_nanos) FILTER (WHERE s.window_start >= $5), 0)::bigint AS month,
    coalesce(sum(s.spent_nanos), 0)::bigint AS total
FROM scope_spend AS s
JOIN virtual_keys AS v ON v.id = s.virtual_key_id
WHERE v.id = $1 AND v.billing_account_id = $2
"""


async def usage_of(
    conn: Connection, account_id: UUID, virtual_key_id: UUID, now: datetime
) -> Usage:
    """The spend of one virtual key of an account in all windows of now."""
    starts = (window_start("day", now), window_start("week", now), window_start("month", now))
    async with translated():
        row = await conn.fetchrow(SELECT_USAGE, virtual_key_id, account_id, *starts)
    assert row is not None  # sums without GROUP BY are one row
    return Usage(**dict(row))


SELECT_SPENT = """
SELECT v.id, coalesce(sum(s.spent_nanos), 0)::bigint AS spent
FROM unnest($2::uuid[], $3::timestamptz[]) AS wanted (id, since)
JOIN virtual_keys AS v ON v.id = wanted.id AND v.billing_account_id = $1
LEFT JOIN scope_spend AS s ON s.virtual_key_id = v.id AND s.window_start >= wanted.since
GROUP BY v.id
"""


async def spent_since(
    conn: Connection, account_id: UUID, since: Mapping[UUID, datetime]
) -> dict[UUID, int]:
    """What each of these virtual keys of an account spent from a day on."""
    async with translated():
        rows = await conn.fetch(SELECT_SPENT, account_id, list(since), list(since.values()))
    return {row["id"]: row["spent"] for row in rows}


# One statement, one moment: both change with the commit of a receipt.
SELECT_TOTALS = """
SELECT
    a.balance_nanos,
    (SELECT coalesce(sum(s.spent_nanos), 0)::bigint
     FROM virtual_keys AS v
     JOIN scope_spend AS s ON s.virtual_key_id = v.id
     WHERE v.billing_account_id = a.id) AS spent_nanos
FROM billing_accounts AS a
WHERE a.id = $1
"""


async def totals_of(conn: Connection, account_id: UUID) -> tuple[int, int]:
    """(balance, spent) of an account, in nanos. Raises AccountUnknown."""
    async with translated():
        row = await conn.fetchrow(SELECT_TOTALS, account_id)
    if row is None:
        raise AccountUnknown
    return row["balance_nanos"], row["spent_nanos"]
