"""API keys that exist: read, changed, rotated, revoked. In Postgres.

Every query that acts for a tenant carries its account; what acts for operators says so. Grants
are keys of another kind: only reading one by its id and revoking reach them from here.
Failure: KeysUnavailable when Postgres does not answer in time; KeyNotFound for a key that is not
there or is another account's, by the same path.
"""

import hmac
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

import msgspec

from keys.api_key import NewKey, derive, digest, generate
from keys.errors import (
    KeyNotFound,
    KeyRevoked,
    RotationInProgress,
    RotationMismatch,
    TooManyKeys,
)
from keys.principal import Budget, Limits, Permission
from keys.store import Connection, KeyTerms, create_key, translated


class KeyRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What may be shown of a key."""

    id: UUID
    billing_account_id: UUID
    virtual_key_id: UUID
    kind: Literal["key", "grant"]
    name: str
    prefix: str
    last4: str
    status: Literal["active", "revoked"]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    rotated_at: datetime | None
    previous_expires_at: datetime | None
    limits: Limits
    budget: Budget | None
    permissions: tuple[Permission, ...]
    models: tuple[str, ...] | None
    ip_allow: tuple[str, ...] | None

    @property
    def hint(self) -> str:
        """Enough of the secret to tell keys apart."""
        return f"{self.prefix}...{self.last4}"


class KeyChanges(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of a key. UNSET stays as it is, None is taken away."""

    name: str | msgspec.UnsetType = msgspec.UNSET
    expires_at: datetime | msgspec.UnsetType | None = msgspec.UNSET
    budget: Budget | msgspec.UnsetType | None = msgspec.UNSET
    permissions: Sequence[Permission] | msgspec.UnsetType = msgspec.UNSET
    models: Sequence[str] | msgspec.UnsetType | None = msgspec.UNSET
    ip_allow: Sequence[str] | msgspec.UnsetType | None = msgspec.UNSET
    open_requests: int | msgspec.UnsetType | None = msgspec.UNSET
    requests_per_minute: int | msgspec.UnsetType | None = msgspec.UNSET
    tokens_per_minute: int | msgspec.UnsetType | None = msgspec.UNSET


class Rotation(msgspec.Struct, frozen=True, kw_only=True):
    """A wish for a new secret. peppers: the one in use first."""

    peppers: Sequence[bytes]
    overlap_s: int = 0
    once_key: bytes = b""
    """The Idempotency-Key; empty: whoever asks twice gets two."""


# Makes the count of an account's keys and the insertion of another one step, without a lock on the
# row of the account, for which every receipt waits.
LOCK_COUNT = "SELECT pg_advisory_xact_lock(hashtextextended('keys of ' || $1::uuid, 0))"
# Those of the last day count also when they were revoked: their rows and their words in the till
# stay, so that whoever made and revoked keys for ever would fill both.
COUNT_KEYS = """
SELECT count(*)
FROM app_api_keys
WHERE billing_account_id = $1 AND kind = 'key'
    AND (status = 'active' OR created_at > now() - interval '1 day')
"""


async def create_another_key(
    conn: Connection, account_id: UUID, terms: KeyTerms, *, pepper: bytes, most: int
) -> tuple[UUID, NewKey]:
    """A new key, unless the account has or made too many. Raises TooManyKeys."""
    async with translated(), conn.transaction():
        await conn.execute(LOCK_COUNT, account_id)
        if await conn.fetchval(COUNT_KEYS, account_id) >= most:
            raise TooManyKeys(limit=most)
        return await create_key(conn, account_id, terms, pepper=pepper)


SELECT_KEY = """
SELECT
    k.id, k.billing_account_id, k.virtual_key_id, k.kind, k.name, k.prefix, k.last4, k.status,
    k.created_at, k.expires_at, k.revoked_at, k.rotated_at, k.previous_expires_at,
    k.open_requests_max, k.requests_per_minute, k.tokens_per_minute, k.scopes, k.models,
    k.ip_allow, v.budget_nanos, v.budget_window
FROM app_api_keys AS k
JOIN virtual_keys AS v ON v.id = k.virtual_key_id
WHERE k.id = $1 AND k.billing_account_id = $2
"""


async def find_key(conn: Connection, account_id: UUID, key_id: UUID) -> KeyRecord:
    """One key of an account, of any kind. Raises KeyNotFound."""
    async with translated():
        row = await conn.fetchrow(SELECT_KEY, key_id, account_id)
    if row is None:
        raise KeyNotFound
    return _record(row)


SELECT_KEYS = """
SELECT
    k.id, k.billing_account_id, k.virtual_key_id, k.kind, k.name, k.prefix, k.last4, k.status,
    k.created_at, k.expires_at, k.revoked_at, k.rotated_at, k.previous_expires_at,
    k.open_requests_max, k.requests_per_minute, k.tokens_per_minute, k.scopes, k.models,
    k.ip_allow, v.budget_nanos, v.budget_window
FROM app_api_keys AS k
JOIN virtual_keys AS v ON v.id = k.virtual_key_id
WHERE k.billing_account_id = $1 AND k.kind = 'key' AND ($2::uuid IS NULL OR k.id < $2)
ORDER BY k.id DESC
LIMIT $3
"""


async def list_keys(
    conn: Connection, account_id: UUID, limit: int, *, before: UUID | None = None
) -> list[KeyRecord]:
    """The keys of an account, newest first; `before` is the last id of the page before."""
    async with translated():
        rows = await conn.fetch(SELECT_KEYS, account_id, before, limit)
    return [_record(row) for row in rows]


SELECT_ALL_KEYS = """
SELECT
    k.id, k.billing_account_id, k.virtual_key_id, k.kind, k.name, k.prefix, k.last4, k.status,
    k.created_at, k.expires_at, k.revoked_at, k.rotated_at, k.previous_expires_at,
    k.open_requests_max, k.requests_per_minute, k.tokens_per_minute, k.scopes, k.models,
    k.ip_allow, v.budget_nanos, v.budget_window
FROM app_api_keys AS k
JOIN virtual_keys AS v ON v.id = k.virtual_key_id
WHERE k.kind = 'key'
ORDER BY k.id DESC
LIMIT $1
"""


async def list_all_keys(conn: Connection, limit: int) -> list[KeyRecord]:
    """The newest keys of all accounts. For operators only."""
    async with translated():
        rows = await conn.fetch(SELECT_ALL_KEYS, limit)
    return [_record(row) for row in rows]


SELECT_OWNER = "SELECT billing_account_id FROM app_api_keys WHERE id = $1"


async def owner_of_key(conn: Connection, key_id: UUID) -> UUID:
    """The account of a key. For operators only. Raises KeyNotFound."""
    async with translated():
        account_id: UUID | None = await conn.fetchval(SELECT_OWNER, key_id)
    if account_id is None:
        raise KeyNotFound
    return account_id


LOCK_KEY = """
SELECT status
FROM app_api_keys
WHERE id = $1 AND billing_account_id = $2 AND kind = 'key'
FOR UPDATE
"""
UPDATE_KEY = """
UPDATE app_api_keys
SET name = $3, expires_at = $4, open_requests_max = $5, requests_per_minute = $6,
    tokens_per_minute = $7, scopes = $8, models = $9, ip_allow = $10::cidr[]
WHERE id = $1 AND billing_account_id = $2
"""
UPDATE_BUDGET = """
UPDATE virtual_keys
SET budget_nanos = $3, budget_window = $4
WHERE id = $1 AND billing_account_id = $2
"""


async def update_key(
    conn: Connection, account_id: UUID, key_id: UUID, changes: KeyChanges
) -> KeyRecord:
    """Change what is asked for. Raises KeyNotFound, or KeyRevoked: that one is history."""
    async with translated(), conn.transaction():
        status = await conn.fetchval(LOCK_KEY, key_id, account_id)
        if status is None:
            raise KeyNotFound
        if status == "revoked":
            raise KeyRevoked
        new = _changed(await find_key(conn, account_id, key_id), changes)
        await conn.execute(
            UPDATE_KEY,
            key_id,
            account_id,
            new.name,
            new.expires_at,
            *msgspec.structs.astuple(new.limits),
            new.permissions,
            new.models,
            new.ip_allow,
        )
        budget = (new.budget.nanos, new.budget.window) if new.budget else (None, None)
        await conn.execute(UPDATE_BUDGET, new.virtual_key_id, account_id, *budget)
        return await find_key(conn, account_id, key_id)


def _changed(record: KeyRecord, changes: KeyChanges) -> KeyRecord:
    wanted = {
        name: value
        for name, value in msgspec.structs.asdict(changes).items()
        if value is not msgspec.UNSET
    }
    limits = {name: wanted.pop(name) for name in Limits.__struct_fields__ if name in wanted}
    replaced = msgspec.structs.replace(record.limits, **limits)
    return msgspec.structs.replace(record, limits=replaced, **wanted)


REVOKE_KEY = """
UPDATE app_api_keys
SET status = 'revoked', revoked_at = coalesce(revoked_at, now())
WHERE id = $1 AND billing_account_id = $2
"""


async def revoke_key(conn: Connection, account_id: UUID, key_id: UUID) -> KeyRecord:
    """Revoke a key of any kind for good; again changes nothing. Raises KeyNotFound."""
    async with translated(), conn.transaction():
        await conn.execute(REVOKE_KEY, key_id, account_id)
        return await find_key(conn, account_id, key_id)


async def revoke_any_key(conn: Connection, key_id: UUID) -> KeyRecord:
    """The same for a key of any account. For operators only."""
    return await revoke_key(conn, await owner_of_key(conn, key_id), key_id)


SELECT_ROTATION = """
SELECT
    prefix, status, digest, previous_digest, previous_expires_at, rotated_at, rotation_digest,
    clock_timestamp() AS now
FROM app_api_keys
WHERE id = $1 AND billing_account_id = $2 AND kind = 'key'
"""
# The digest that was read decides between two rotations at once: the second finds another one.
ROTATE_KEY = """
UPDATE app_api_keys
SET digest = $4, prefix = $5, last4 = $6, rotation_digest = $7, previous_digest = digest,
    rotated_at = now(), previous_expires_at = now() + make_interval(secs => $8)
WHERE id = $1 AND billing_account_id = $2 AND digest = $3 AND status = 'active'
RETURNING id
"""


async def rotate_key(
    conn: Connection, account_id: UUID, key_id: UUID, rotation: Rotation
) -> tuple[KeyRecord, NewKey]:
    """A new secret for the same key, whose budget, spend and receipts stay what they are.

    The old secret works for overlap_s more. The same once_key again gives the same answer.
    Raises KeyNotFound, KeyRevoked, RotationInProgress (an overlap lasts, or another rotation was
    faster) or RotationMismatch.
    """
    async with translated():
        new = await _rotated(conn, account_id, key_id, rotation)
    return await find_key(conn, account_id, key_id), new


async def _rotated(conn: Connection, account_id: UUID, key_id: UUID, rotation: Rotation) -> NewKey:
    row = await conn.fetchrow(SELECT_ROTATION, key_id, account_id)
    if row is None:
        raise KeyNotFound
    known = _known_answer(row, key_id, rotation)
    if known is not None:
        return known
    if row["status"] == "revoked":
        raise KeyRevoked
    ends_at = row["previous_expires_at"]
    if rotation.overlap_s and ends_at is not None and ends_at > row["now"]:
        # Dropping the old secret before its time would break whoever was promised that time. No
        # overlap at all is for whoever has lost a secret: every one before the new ends now.
        raise RotationInProgress(ends_at=ends_at)
    pepper = rotation.peppers[0]
    kind = row["prefix"].split("_")[1]
    new, mark = generate(kind), None
    if rotation.once_key:
        new = derive(kind, _seed(pepper, key_id, row["digest"], rotation.once_key))
        mark = _mark(pepper, key_id, rotation.once_key)
    sealed = digest(new.secret.encode(), pepper)
    values = (sealed, new.prefix, new.last4, mark, rotation.overlap_s)
    if await conn.fetchval(ROTATE_KEY, key_id, account_id, row["digest"], *values) is not None:
        return new
    row = await conn.fetchrow(SELECT_ROTATION, key_id, account_id)
    assert row is not None  # keys are never deleted
    known = _known_answer(row, key_id, rotation)
    if known is None:
        if row["status"] == "revoked":
            raise KeyRevoked
        raise RotationInProgress(ends_at=row["previous_expires_at"])
    return known


def _known_answer(row: Any, key_id: UUID, rotation: Rotation) -> NewKey | None:
    """The secret of the last rotation when this is a repetition of it, else None.

    A client whose answer was lost must get the same secret again, and no secret may be stored. So
    it is computed: from the pepper, which is in no database, and from the Idempotency-Key, of
    which only a digest is kept. The digest that was replaced goes in as well, so that one
    Idempotency-Key, used again later, never brings an old secret back.
    """
    mark = row["rotation_digest"]
    if not rotation.once_key or mark is None or row["status"] == "revoked":
        return None
    for pepper in rotation.peppers:
        if not hmac.compare_digest(mark, _mark(pepper, key_id, rotation.once_key)):
            continue
        overlap = row["previous_expires_at"] - row["rotated_at"]
        if overlap.total_seconds() != rotation.overlap_s:
            raise RotationMismatch
        seed = _seed(pepper, key_id, row["previous_digest"], rotation.once_key)
        known = derive(row["prefix"].split("_")[1], seed)
        assert digest(known.secret.encode(), pepper) == row["digest"]
        return known
    return None


def _seed(pepper: bytes, key_id: UUID, replaced: bytes, once_key: bytes) -> bytes:
    return hmac.digest(pepper, b"rotate\0" + key_id.bytes + replaced + once_key, "sha256")


def _mark(pepper: bytes, key_id: UUID, once_key: bytes) -> bytes:
    return hmac.digest(pepper, b"rotation\0" + key_id.bytes + once_key, "sha256")


def _record(row: Any) -> KeyRecord:
    fields = dict(row)
    nanos, window = fields.pop("budget_nanos"), fields.pop("budget_window")
    networks = fields.pop("ip_allow")
    models = fields.pop("models")
    return KeyRecord(
        budget=None if nanos is None else Budget(nanos=nanos, window=window),
        limits=Limits(
            open_requests=fields.pop("open_requests_max"),
            requests_per_minute=fields.pop("requests_per_minute"),
            tokens_per_minute=fields.pop("tokens_per_minute"),
        ),
        permissions=tuple(fields.pop("scopes")),
        models=None if models is None else tuple(models),
        ip_allow=None if networks is None else tuple(str(network) for network in networks),
        **fields,
    )
