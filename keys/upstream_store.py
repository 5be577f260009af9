"""Credentials for providers that belong to one virtual key. In Postgres, sealed.

A key is named by its id; what is kept belongs to its virtual key, so a rotation keeps it.
Failure: KeysUnavailable when Postgres does not answer in time; KeyNotFound for a key that is not
there, was revoked or is another account's, by the same path.
"""

from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

import asyncpg
import msgspec

from config.secret import Secret
from keys.errors import CredentialNotFound, KeyNotFound
from keys.store import Connection, translated

if TYPE_CHECKING:
    from keys.sealed import Sealer


class UpstreamCredential(msgspec.Struct, frozen=True, kw_only=True):
    """What may be shown of it: that it is there, and since when."""

    provider: str
    created_at: datetime


SELECT_VIRTUAL_KEY = """
SELECT virtual_key_id
FROM app_api_keys
WHERE id = $2 AND billing_account_id = $1 AND status = 'active'
"""


async def virtual_key_of(conn: Connection, account_id: UUID, key_id: UUID) -> UUID:
    """The virtual key of an active key or grant of an account. Raises KeyNotFound."""
    async with translated():
        found: UUID | None = await conn.fetchval(SELECT_VIRTUAL_KEY, account_id, key_id)
    if found is None:
        raise KeyNotFound
    return found


UPSERT_CREDENTIAL = """
INSERT INTO upstream_credentials (virtual_key_id, billing_account_id, provider, sealed)
VALUES ($1, $2, $3, $4)
ON CONFLICT (virtual_key_id, provider) DO UPDATE
SET sealed = $4, created_at = now()
RETURNING provider, created_at
"""


async def put_credential(
    conn: Connection,
    account_id: UUID,
    key_id: UUID,
    provider: str,
    secret: Secret,
    *,
    sealer: "Sealer",
) -> UpstreamCredential:
    """Set or replace the credential of a key. Raises KeyNotFound or SealingKeyMissing."""
    virtual_key_id = await virtual_key_of(conn, account_id, key_id)
    sealed = sealer.seal(secret, virtual_key_id, provider)
    async with translated():
        row = await conn.fetchrow(UPSERT_CREDENTIAL, virtual_key_id, account_id, provider, sealed)
    return _credential(row)


SELECT_CREDENTIALS = """
SELECT provider, created_at
FROM upstream_credentials
WHERE virtual_key_id = $1 AND billing_account_id = $2
ORDER BY provider
"""


async def list_credentials(
    conn: Connection, account_id: UUID, key_id: UUID
) -> list[UpstreamCredential]:
    """All that a key has. Raises KeyNotFound."""
    virtual_key_id = await virtual_key_of(conn, account_id, key_id)
    async with translated():
        rows = await conn.fetch(SELECT_CREDENTIALS, virtual_key_id, account_id)
    return [_credential(row) for row in rows]


async def find_credential(
    conn: Connection, account_id: UUID, key_id: UUID, provider: str
) -> UpstreamCredential:
    """Raises KeyNotFound or CredentialNotFound."""
    for credential in await list_credentials(conn, account_id, key_id):
        if credential.provider == provider:
            return credential
    raise CredentialNotFound


DELETE_CREDENTIAL = """
DELETE FROM upstream_credentials
WHERE virtual_key_id = $1 AND billing_account_id = $2 AND provider = $3
RETURNING provider, created_at
"""


async def delete_credential(
    conn: Connection, account_id: UUID, key_id: UUID, provider: str
) -> UpstreamCredential:
    """Go back to the provider's own key. Raises KeyNotFound or CredentialNotFound."""
    virtual_key_id = await virtual_key_of(conn, account_id, key_id)
    async with translated():
        row = await conn.fetchrow(DELETE_CREDENTIAL, virtual_key_id, account_id, provider)
    if row is None:
        raise CredentialNotFound
    return _credential(row)


SELECT_SEALED = """
SELECT virtual_key_id, provider, sealed
FROM upstream_credentials
WHERE ($1::uuid, $2::text) < (virtual_key_id, provider)
ORDER BY virtual_key_id, provider
LIMIT $3
"""
RESEAL = """
UPDATE upstream_credentials
SET sealed = $4
WHERE virtual_key_id = $1 AND provider = $2 AND sealed = $3
"""
RESEAL_AT_ONCE = 500


async def reseal_all(conn: Connection, sealer: "Sealer") -> int:
    """Seal everything with the newer key, so that the older one can go. Safe to repeat.

    For operators only. Raises SealBroken for what no key opens; all before it is done.
    """
    at, count = (UUID(int=0), ""), 0
    while True:
        async with translated():
            rows = await conn.fetch(SELECT_SEALED, *at, RESEAL_AT_ONCE)
            for row in rows:
                at = (row["virtual_key_id"], row["provider"])
                secret = sealer.open(row["sealed"], *at)
                # Who sets another one meanwhile wins.
                await conn.execute(RESEAL, *at, row["sealed"], sealer.seal(secret, *at))
        count += len(rows)
        if len(rows) < RESEAL_AT_ONCE:
            return count


def _credential(row: asyncpg.Record | Any) -> UpstreamCredential:
    return UpstreamCredential(**dict(row))
