"""Execution grants: keys that an account mints for one execution, with an end and a budget.

A grant is a key with a virtual key of its own, so that its budget and spend are its own; the
account pays. It may only infer. Its run and graph stand on its receipts, from nowhere else.
Failure: KeysUnavailable when Postgres does not answer in time; KeyNotFound for a grant that is not
there or is another account's, by the same path.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Literal
from uuid import UUID

import asyncpg
import msgspec

from config.ids import new_id
from keys.api_key import Kind, NewKey, digest, generate
from keys.errors import KeyNotFound, TooManyGrants
from keys.principal import Permission
from keys.store import Connection, translated

LIFETIME_MAX = timedelta(days=30)
TEXT_MAX = 200
PERMISSIONS: tuple[Permission, ...] = ("infer",)


class GrantTerms(msgspec.Struct, frozen=True, kw_only=True):
    """What a new grant is for, and what it may do."""

    name: str
    kind: Kind = "live"
    expires_at: datetime
    budget_nanos: int
    """For all of its life."""
    models: Sequence[str] | None = None
    run_id: str | None = None
    graph_id: str | None = None


class GrantRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What may be shown of a grant."""

    id: UUID
    billing_account_id: UUID
    virtual_key_id: UUID
    name: str
    prefix: str
    last4: str
    status: Literal["active", "revoked"]
    budget_nanos: int
    spent_nanos: int
    """As far as it is in the book."""
    models: tuple[str, ...] | None
    run_id: str | None
    graph_id: str | None
    created_at: datetime
    expires_at: datetime
    revoked_at: datetime | None

    @property
    def hint(self) -> str:
        """Enough of the secret to tell grants apart."""
        return f"{self.prefix}...{self.last4}"

    def state(self, now: datetime) -> Literal["active", "expired", "revoked"]:
        if self.status == "revoked":
            return "revoked"
        return "expired" if self.expires_at <= now else "active"


def check_expiry(expires_at: datetime, now: datetime) -> None:
    """Raises ValueError, with a sentence for people, for an end that no grant may have."""
    if expires_at <= now:
        raise ValueError("The time at which the grant expires is in the past.")
    if expires_at - now > LIFETIME_MAX:
        raise ValueError(f"A grant may last for {LIFETIME_MAX.days} days at most.")


# Makes the count of an account's grants and the insertion of another one step, without a lock on
# the row of the account, for which every receipt waits.
LOCK_GRANTS = "SELECT pg_advisory_xact_lock(hashtextextended('grants of ' || $1::uuid, 0))"
# All count for an hour: minted and revoked for ever, they would fill the book and the till.
COUNT_GRANTS = """
SELECT count(*)
FROM app_api_keys
WHERE billing_account_id = $1 AND kind = 'grant' AND (
    status = 'active' AND expires_at > now() OR created_at > now() - interval '1 hour'
)
"""
INSERT_GRANT = """
WITH own AS (
    INSERT INTO virtual_keys (id, billing_account_id, budget_nanos, budget_window)
    VALUES ($3, $2, $9, 'total')
    RETURNING id
)
INSERT INTO app_api_keys (
    id, billing_account_id, virtual_key_id, kind, name, prefix, last4, digest, expires_at, scopes,
    models, run_id, graph_id
)
SELECT $1, $2, own.id, 'grant', $4, $5, $6, $7, $8, $10, $11, $12, $13
FROM own
"""


async def create_grant(
    conn: Connection, account_id: UUID, terms: GrantTerms, *, pepper: bytes, open_max: int
) -> tuple[GrantRecord, NewKey]:
    """Mint a grant. The secret is in no table and shown only here.

    Raises TooManyGrants, or KeyNotFound when there is no such account.
    """
    grant_id, new = new_id(), generate(terms.kind)
    values = (
        *(grant_id, account_id, new_id(), terms.name, new.prefix, new.last4),
        *(digest(new.secret.encode(), pepper), terms.expires_at, terms.budget_nanos),
        *(PERMISSIONS, terms.models, terms.run_id, terms.graph_id),
    )
    async with translated():
        try:
            async with conn.transaction():
                await conn.execute(LOCK_GRANTS, account_id)
                if await conn.fetchval(COUNT_GRANTS, account_id) >= open_max:
                    raise TooManyGrants(limit=open_max)
                await conn.execute(INSERT_GRANT, *values)
                return await find_grant(conn, account_id, grant_id), new
        except asyncpg.ForeignKeyViolationError as exc:
            raise KeyNotFound from exc


SELECT_GRANT = """
SELECT
    k.id, k.billing_account_id, k.virtual_key_id, k.name, k.prefix, k.last4, k.status,
    k.models, k.run_id, k.graph_id, k.created_at, k.expires_at, k.revoked_at, v.budget_nanos,
    (SELECT coalesce(sum(s.spent_nanos), 0)::bigint FROM scope_spend AS s
     WHERE s.virtual_key_id = v.id) AS spent_nanos
FROM app_api_keys AS k
JOIN virtual_keys AS v ON v.id = k.virtual_key_id
WHERE k.id = $2 AND k.billing_account_id = $1 AND k.kind = 'grant'
"""


async def find_grant(conn: Connection, account_id: UUID, grant_id: UUID) -> GrantRecord:
    """One grant of an account. Raises KeyNotFound."""
    async with translated():
        row = await conn.fetchrow(SELECT_GRANT, account_id, grant_id)
    if row is None:
        raise KeyNotFound
    return _record(row)


SELECT_GRANTS = """
SELECT
    k.id, k.billing_account_id, k.virtual_key_id, k.name, k.prefix, k.last4, k.status,
    k.models, k.run_id, k.graph_id, k.created_at, k.expires_at, k.revoked_at, v.budget_nanos,
    (SELECT coalesce(sum(s.spent_nanos), 0)::bigint FROM scope_spend AS s
     WHERE s.virtual_key_id = v.id) AS spent_nanos
FROM app_api_keys AS k
JOIN virtual_keys AS v ON v.id = k.virtual_key_id
WHERE k.billing_account_id = $1 AND k.kind = 'grant' AND ($2::uuid IS NULL OR k.id < $2)
ORDER BY k.id DESC
LIMIT $3
"""


async def list_grants(
    conn: Connection, account_id: UUID, limit: int, *, before: UUID | None = None
) -> list[GrantRecord]:
    """The grants of an account, newest first; `before` is the last id of the page before."""
    async with translated():
        rows = await conn.fetch(SELECT_GRANTS, account_id, before, limit)
    return [_record(row) for row in rows]


SELECT_GRANT_OWNER = """
SELECT billing_account_id
FROM app_api_keys
WHERE id = $1 AND kind = 'grant'
"""


async def owner_of_grant(conn: Connection, grant_id: UUID) -> UUID:
    """The account of a grant. For operators only. Raises KeyNotFound."""
    async with translated():
        account_id: UUID | None = await conn.fetchval(SELECT_GRANT_OWNER, grant_id)
    if account_id is None:
        raise KeyNotFound
    return account_id


REVOKE_GRANT = """
UPDATE app_api_keys
SET status = 'revoked', revoked_at = coalesce(revoked_at, now())
WHERE id = $2 AND billing_account_id = $1 AND kind = 'grant'
"""


async def revoke_grant(conn: Connection, account_id: UUID, grant_id: UUID) -> GrantRecord:
    """Revoke a grant for good; again changes nothing. Raises KeyNotFound."""
    async with translated(), conn.transaction():
        await conn.execute(REVOKE_GRANT, account_id, grant_id)
        return await find_grant(conn, account_id, grant_id)


def _record(row: Any) -> GrantRecord:
    fields = dict(row)
    models = fields.pop("models")
    return GrantRecord(**fields, models=None if models is None else tuple(models))
