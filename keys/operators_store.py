"""Operator keys in Postgres: who they are, and their end. Making one is in store.py.

Failure: KeysUnavailable when Postgres does not answer in time.
"""

from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec

from keys.errors import KeyNotFound
from keys.store import Connection, translated


class OperatorRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What may be shown of an operator key."""

    id: UUID
    name: str
    last4: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


SELECT_OPERATORS = """
SELECT id, name, last4, created_at, expires_at, revoked_at
FROM operator_keys
ORDER BY id DESC
LIMIT $1
"""


async def list_operators(conn: Connection, limit: int) -> list[OperatorRecord]:
    """Operator keys, newest first."""
    async with translated():
        rows = await conn.fetch(SELECT_OPERATORS, limit)
    return [_record(row) for row in rows]


REVOKE_OPERATOR = """
UPDATE operator_keys
SET revoked_at = coalesce(revoked_at, now())
WHERE id = $1
RETURNING id, name, last4, created_at, expires_at, revoked_at
"""


async def revoke_operator(conn: Connection, key_id: UUID) -> OperatorRecord:
    """Revoke an operator key for good, at once; again changes nothing. Raises KeyNotFound."""
    async with translated():
        row = await conn.fetchrow(REVOKE_OPERATOR, key_id)
    if row is None:
        raise KeyNotFound
    return _record(row)


def _record(row: Any) -> OperatorRecord:
    return OperatorRecord(**dict(row))
