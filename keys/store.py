"""Who is behind a credential, and new credentials, in Postgres. What is done with keys that exist
stands in keys_store.py. Every query that acts for a tenant carries its account.

Failure: KeysUnavailable when Postgres does not answer in time.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any
from uuid import UUID

import asyncpg
import msgspec

from config.ids import new_id
from keys.api_key import Kind, NewKey, digest, generate
from keys.errors import KeyNotFound, KeysUnavailable
from keys.principal import Budget, Limits, Permission, Principal

Pool = asyncpg.Pool
Connection = asyncpg.Connection | asyncpg.pool.PoolConnectionProxy


class KeyTerms(msgspec.Struct, frozen=True, kw_only=True):
    """What a new key may do."""

    name: str
    kind: Kind = "live"
    expires_at: datetime | None = None
    limits: Limits = Limits()
    budget: Budget | None = None
    permissions: Sequence[Permission] = ("infer", "account")
    models: Sequence[str] | None = None
    ip_allow: Sequence[str] | None = None


ACQUIRE_TIMEOUT_S = 5


@asynccontextmanager
async def translated() -> AsyncIterator[None]:
    """Turn what asyncpg raises into KeysUnavailable."""
    try:
        yield
    except (
        OSError,
        asyncpg.PostgresError,
        asyncpg.InterfaceError,
        asyncpg.InternalClientError,  # a connection whose end was not noticed in time
    ) as exc:
        raise KeysUnavailable from exc


# Revoked and unknown keys give the same empty answer, by the same path.
SELECT_PRINCIPALS = """
SELECT
    k.id, k.billing_account_id, k.virtual_key_id, k.expires_at, k.open_requests_max,
    k.requests_per_minute, k.tokens_per_minute, k.scopes, k.models, k.ip_allow, k.run_id,
    k.graph_id, v.budget_nanos, v.budget_window,
    a.status = 'active' AS account_active, a.open_requests_max AS account_open_max,
    a.requests_per_minute AS account_requests, a.tokens_per_minute AS account_tokens,
    CASE WHEN k.digest = ANY ($1::bytea[]) THEN k.digest ELSE k.previous_digest END AS digest,
    ARRAY(
        SELECT (u.provider, u.sealed) FROM upstream_credentials AS u
        WHERE u.virtual_key_id = k.virtual_key_id
    ) AS upstream_keys
FROM app_api_keys AS k
JOIN billing_accounts AS a ON a.id = k.billing_account_id
JOIN virtual_keys AS v ON v.id = k.virtual_key_id
WHERE k.status = 'active' AND (
    k.digest = ANY ($1::bytea[])
    OR k.previous_digest = ANY ($1::bytea[]) AND k.previous_expires_at > now()
)
"""


async def find_principals(pool: Pool, digests: Sequence[bytes]) -> list[Principal]:
    """The principals of active keys with one of these digests, also from before a rotation."""
    # pool.fetch() would wait for a free connection for ever.
    async with translated(), pool.acquire(timeout=ACQUIRE_TIMEOUT_S) as conn:
        rows = await conn.fetch(SELECT_PRINCIPALS, list(digests))
    return [_principal(row) for row in rows]


def _principal(row: Any) -> Principal:
    budget = None
    if row["budget_nanos"] is not None:
        budget = Budget(nanos=row["budget_nanos"], window=row["budget_window"])
    return Principal(
        account_id=row["billing_account_id"],
        virtual_key_id=row["virtual_key_id"],
        app_key_id=row["id"],
        digest=row["digest"],
        expires_at=row["expires_at"],
        account_active=row["account_active"],
        account_limits=Limits(
            open_requests=row["account_open_max"],
            requests_per_minute=row["account_requests"],
            tokens_per_minute=row["account_tokens"],
        ),
        key_limits=Limits(
            open_requests=row["open_requests_max"],
            requests_per_minute=row["requests_per_minute"],
            tokens_per_minute=row["tokens_per_minute"],
        ),
        budget=budget,
        permissions=frozenset(row["scopes"]),
        models=None if row["models"] is None else frozenset(row["models"]),
        ip_allow=tuple(str(network) for network in row["ip_allow"] or ()),
        run_id=row["run_id"] or "",
        graph_id=row["graph_id"] or "",
        upstream_keys=tuple((provider, sealed) for provider, sealed in row["upstream_keys"]),
    )


SELECT_OPERATOR = """
SELECT id
FROM operator_keys
WHERE digest = ANY ($1::bytea[])
    AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())
"""


async def find_operator(pool: Pool, digests: Sequence[bytes]) -> UUID | None:
    """The valid operator key with one of these digests."""
    async with translated(), pool.acquire(timeout=ACQUIRE_TIMEOUT_S) as conn:
        found: UUID | None = await conn.fetchval(SELECT_OPERATOR, list(digests))
    return found


async def is_operator(pool: Pool, digests: Sequence[bytes]) -> bool:
    """True when one of these digests is that of a valid operator key."""
    return await find_operator(pool, digests) is not None


INSERT_VIRTUAL_KEY = """
INSERT INTO virtual_keys (id, billing_account_id, budget_nanos, budget_window)
VALUES ($1, $2, $3, $4)
"""
INSERT_KEY = """
INSERT INTO app_api_keys (
    id, billing_account_id, virtual_key_id, name, prefix, last4, digest, expires_at,
    open_requests_max, requests_per_minute, tokens_per_minute, scopes, models, ip_allow
)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14::cidr[])
"""


async def create_key(
    conn: Connection, account_id: UUID, terms: KeyTerms, *, pepper: bytes
) -> tuple[UUID, NewKey]:
    """A new key with a virtual key of its own. The secret is in no table and shown only here.

    Raises KeyNotFound when there is no such account.
    """
    key_id, virtual_key_id, new = new_id(), new_id(), generate(terms.kind)
    values = (
        key_id,
        account_id,
        virtual_key_id,
        terms.name,
        new.prefix,
        new.last4,
        digest(new.secret.encode(), pepper),
        terms.expires_at,
        *msgspec.structs.astuple(terms.limits),
        terms.permissions,
        terms.models,
        terms.ip_allow,
    )
    budget = (terms.budget.nanos, terms.budget.window) if terms.budget else (None, None)
    async with translated():
        try:
            async with conn.transaction():
                await conn.execute(INSERT_VIRTUAL_KEY, virtual_key_id, account_id, *budget)
                await conn.execute(INSERT_KEY, *values)
        except asyncpg.ForeignKeyViolationError as exc:
            raise KeyNotFound from exc
    return key_id, new


INSERT_OPERATOR_KEY = """
INSERT INTO operator_keys (id, name, last4, digest, expires_at)
VALUES ($1, $2, $3, $4, $5)
"""


async def create_operator(
    conn: Connection, name: str, *, pepper: bytes, expires_at: datetime | None = None
) -> tuple[UUID, NewKey]:
    """A new operator credential: it can operate and never infer."""
    key_id, new = new_id(), generate("op")
    sealed = digest(new.secret.encode(), pepper)
    async with translated():
        await conn.execute(INSERT_OPERATOR_KEY, key_id, name, new.last4, sealed, expires_at)
    return key_id, new


async def create_operator_key(conn: Connection, name: str, *, pepper: bytes) -> NewKey:
    """The same without its id."""
    _, new = await create_operator(conn, name, pepper=pepper)
    return new
