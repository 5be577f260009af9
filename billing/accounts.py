"""Billing accounts for operators: listed, and stopped at once (the kill switch).

Failure: BookUnavailable.
"""

from typing import Any, Literal
from uuid import UUID

from billing.book import Connection, translated
from billing.errors import AccountUnknown

SELECT_ACCOUNTS = """
SELECT
    a.id, u.label, a.status, a.status_reason, a.status_changed_at, a.balance_nanos,
    a.is_system_tenant, a.created_at
FROM billing_accounts AS a
JOIN users AS u ON u.id = a.owner_user_id
WHERE $1::uuid IS NULL OR a.id < $1
ORDER BY a.id DESC
LIMIT $2
"""


async def list_accounts(
    conn: Connection, limit: int, *, before: UUID | None = None
) -> list[dict[str, Any]]:
    """Newest first; `before` is the last id of the page before."""
    async with translated():
        rows = await conn.fetch(SELECT_ACCOUNTS, before, limit)
    return [dict(row) for row in rows]


SELECT_ACCOUNT_RECORD = """
SELECT
    a.id, u.label, a.status, a.status_reason, a.status_changed_at, a.balance_nanos,
    a.is_system_tenant, a.created_at
FROM billing_accounts AS a
JOIN users AS u ON u.id = a.owner_user_id
WHERE a.id = $1
"""


async def find_account(conn: Connection, account_id: UUID) -> dict[str, Any]:
    """One account. Raises AccountUnknown."""
    async with translated():
        row = await conn.fetchrow(SELECT_ACCOUNT_RECORD, account_id)
    if row is None:
        raise AccountUnknown
    return dict(row)


# The same word again keeps the first reason and time.
SET_STATUS = """
UPDATE billing_accounts
SET status = $2, status_reason = $3, status_changed_at = now()
WHERE id = $1 AND status <> $2
"""


async def set_status(
    conn: Connection, account_id: UUID, status: Literal["active", "frozen"], reason: str
) -> dict[str, Any]:
    """Freeze or thaw an account; whoever says it last wins. Raises AccountUnknown.

    The till has to be told afterwards: a till that is told first could be seeded with the old
    status again.
    """
    async with translated():
        await conn.execute(SET_STATUS, account_id, status, reason)
    return await find_account(conn, account_id)
