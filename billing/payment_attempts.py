"""Intents to pay and their attempts: made, given a transaction's hash, ended, looked at.

Money is not moved here: an attempt becomes CREDITED in payments.py only. Each step is one guarded
UPDATE and an event, in one transaction. What a tenant's route calls runs inside `as_tenant`.
Failure: BookUnavailable.
"""

from datetime import datetime, timedelta
from typing import Any, Literal
from uuid import UUID

import asyncpg
import msgspec

from billing.book import Connection, translated
from billing.errors import AttemptClosed, HashTaken, PaymentNotFound
from billing.payment_states import Code, Status, end_of
from billing.payments_store import AttemptEvent, note_attempt
from config.ids import new_id

INTENT_LASTS = timedelta(minutes=30)
UNITS_PER_CENT = 10_000
# Late hashes are taken for this long: somebody who paid at the last moment is not turned away.
GRACE = timedelta(hours=1)

Submission = Literal["submitted", "known", "expired"]


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked for, and where it has to go; addresses in lower case."""

    chain_id: int
    token: str
    treasury: str
    amount_usd_cents: int


INSERT_INTENT = """
INSERT INTO payment_intents (
    id, billing_account_id, chain_id, token, treasury, amount_usd_cents, units, expires_at
)
VALUES ($1, $2, $3, $4, $5, $6, $7, now() + $8::interval)
"""
INSERT_ATTEMPT = """
INSERT INTO payment_attempts (id, payment_intent_id, billing_account_id, chain_id)
VALUES ($1, $2, $3, $4)
"""


async def create_intent(conn: Connection, account_id: UUID, terms: Terms) -> UUID:
    """An intent and its attempt; the attempt's id."""
    intent_id, attempt_id = new_id(), new_id()
    units = terms.amount_usd_cents * UNITS_PER_CENT
    where = (terms.chain_id, terms.token, terms.treasury)
    amount = (terms.amount_usd_cents, units)
    async with translated(), conn.transaction():
        await conn.execute(INSERT_INTENT, intent_id, account_id, *where, *amount, INTENT_LASTS)
        await conn.execute(INSERT_ATTEMPT, attempt_id, intent_id, account_id, terms.chain_id)
        event = AttemptEvent(
            event="INTENT_CREATED",
            account_id=account_id,
            attempt_id=attempt_id,
            after=Status.CREATED_INTENT,
        )
        await note_attempt(conn, event, units=units)
    return attempt_id


LOCK_ATTEMPT = """
SELECT
    a.id, a.billing_account_id, a.status, a.tx_hash, a.chain_id,
    now() > i.expires_at + $3::interval AS is_over
FROM payment_attempts AS a
JOIN payment_intents AS i ON i.id = a.payment_intent_id
WHERE a.id = $1 AND a.billing_account_id = $2
FOR UPDATE OF a
"""
# Of the tenant's own: what others were credited is not there for it.
SELECT_CREDITED_FOR = """
SELECT payment_attempt_id
FROM chain_transfers
WHERE chain_id = $1 AND tx_hash = $2 AND billing_account_id = $3
"""
SUBMIT = """
UPDATE payment_attempts
SET status = 'PENDING_UNVERIFIED', tx_hash = $2, submitted_at = now()
WHERE id = $1 AND status = 'CREATED_INTENT'
"""


async def submit(conn: Connection, account_id: UUID, attempt_id: UUID, tx_hash: str) -> Submission:
    """Give an attempt its transaction; the same one again changes nothing.

    Of all who submit one hash at once, one wins. `expired`: the attempt has ended by that. Raises
    PaymentNotFound, HashTaken, AttemptClosed.
    """
    async with translated(), conn.transaction():
        row = await conn.fetchrow(LOCK_ATTEMPT, attempt_id, account_id, GRACE)
        if row is None:
            raise PaymentNotFound
        of_hash = await conn.fetch(SELECT_CREDITED_FOR, row["chain_id"], tx_hash, account_id)
        credited_for = {each["payment_attempt_id"] for each in of_hash} - {None}
        if row["tx_hash"] == tx_hash or attempt_id in credited_for:
            return "known"
        if row["status"] != "CREATED_INTENT":
            raise AttemptClosed
        if row["is_over"]:
            await _step(conn, row, Status.FAILED, Code.INTENT_EXPIRED)
            return "expired"
        if credited_for:
            raise HashTaken
        await _take_hash(conn, row, tx_hash)
        return "submitted"


async def _take_hash(conn: Connection, row: Any, tx_hash: str) -> None:
    try:
        async with conn.transaction():
            moved = await conn.execute(SUBMIT, row["id"], tx_hash)
    except asyncpg.UniqueViolationError as exc:
        raise HashTaken from exc
    assert moved == "UPDATE 1"  # the row is locked
    for name in ("TX_SUBMITTED", "STATUS_CHANGED"):
        event = AttemptEvent(
            event=name,
            account_id=row["billing_account_id"],
            attempt_id=row["id"],
            tx_hash=tx_hash,
            before=Status.CREATED_INTENT,
            after=Status.PENDING_UNVERIFIED,
        )
        await note_attempt(conn, event)


LOCK_ANY_ATTEMPT = """
SELECT id, billing_account_id, status, tx_hash
FROM payment_attempts
WHERE id = $1
FOR UPDATE
"""
END_ATTEMPT = """
UPDATE payment_attempts
SET status = $3, error_code = $4, ended_at = now()
WHERE id = $1 AND status = $2
"""


async def end_attempt(
    conn: Connection, attempt_id: UUID, code: Code, **metadata: Any
) -> Literal["ended", "known"]:
    """Reject or fail an attempt that waits for its transaction; one that has ended stays so.

    Raises PaymentNotFound. A code of a lagging node (RETRY_LATER) is a bug of the caller.
    """
    after = end_of(code)
    async with translated(), conn.transaction():
        row = await conn.fetchrow(LOCK_ANY_ATTEMPT, attempt_id)
        if row is None:
            raise PaymentNotFound
        if row["status"] != "PENDING_UNVERIFIED":
            return "known"
        await _step(conn, row, after, code, **metadata)
        return "ended"


async def _step(conn: Connection, row: Any, after: Status, code: Code, **metadata: Any) -> None:
    before = Status(row["status"])
    moved = await conn.execute(END_ATTEMPT, row["id"], before, after, code)
    assert moved == "UPDATE 1"  # the row is locked
    event = AttemptEvent(
        event="STATUS_CHANGED",
        account_id=row["billing_account_id"],
        attempt_id=row["id"],
        tx_hash=row["tx_hash"],
        before=before,
        after=after,
        code=code,
    )
    await note_attempt(conn, event, **metadata)


LOCK_OVERDUE = """
SELECT a.id, a.billing_account_id, a.status, a.tx_hash
FROM payment_attempts AS a
JOIN payment_intents AS i ON i.id = a.payment_intent_id
WHERE a.status = 'CREATED_INTENT' AND i.expires_at < now() - $1::interval
ORDER BY a.id
LIMIT $2
FOR UPDATE OF a SKIP LOCKED
"""


async def expire_attempts(conn: Connection, after: timedelta, limit: int) -> int:
    """End attempts for which nothing came, this long after their intents expired; how many.

    Finality takes its time: with less than an hour, a transfer that was sent in time and never
    submitted is credited without its attempt.
    """
    async with translated(), conn.transaction():
        rows = await conn.fetch(LOCK_OVERDUE, after, limit)
        for row in rows:
            await _step(conn, row, Status.FAILED, Code.INTENT_EXPIRED)
    return len(rows)


SELECT_DUE = """
SELECT
    a.id, a.billing_account_id, a.chain_id, a.tx_hash, a.created_at, a.submitted_at,
    a.checked_at, a.checked_code, i.units
FROM payment_attempts AS a
JOIN payment_intents AS i ON i.id = a.payment_intent_id
WHERE a.status = 'PENDING_UNVERIFIED' AND a.chain_id = $1
    AND (a.checked_at IS NULL OR a.checked_at < now() - $2::interval)
ORDER BY a.checked_at NULLS FIRST, a.id
LIMIT $3
"""


async def due_attempts(
    conn: Connection, chain_id: int, every: timedelta, limit: int
) -> list[dict[str, Any]]:
    """Attempts that were submitted and not looked at for this long, the longest first."""
    async with translated():
        rows = await conn.fetch(SELECT_DUE, chain_id, every, limit)
    return [dict(row) for row in rows]


NOTE_CHECK = """
UPDATE payment_attempts AS a
SET checked_at = now(), checked_code = $2
FROM (SELECT id, checked_code FROM payment_attempts WHERE id = $1 FOR UPDATE) AS before
WHERE a.id = before.id
RETURNING
    a.billing_account_id, a.tx_hash,
    before.checked_code IS DISTINCT FROM a.checked_code OR before.checked_code IS NULL AS is_new
"""


async def note_check(conn: Connection, attempt_id: UUID, code: Code, **metadata: Any) -> None:
    """Note that an attempt was looked at and still waits; an event only when that is news."""
    async with translated(), conn.transaction():
        row = await conn.fetchrow(NOTE_CHECK, attempt_id, code)
        if row is None:
            raise PaymentNotFound
        if row["is_new"]:
            event = AttemptEvent(
                event="VERIFICATION_ATTEMPTED",
                account_id=row["billing_account_id"],
                attempt_id=attempt_id,
                tx_hash=row["tx_hash"],
                code=code,
            )
            await note_attempt(conn, event, **metadata)


class AttemptRecord(msgspec.Struct, frozen=True, kw_only=True):
    """An attempt with its intent, and what came for it."""

    id: UUID
    billing_account_id: UUID
    status: str
    error_code: str | None
    checked_code: str | None
    chain_id: int
    token: str
    treasury: str
    amount_usd_cents: int
    units: int
    tx_hash: str | None
    credited_units: int
    created_at: datetime
    expires_at: datetime
    submitted_at: datetime | None
    ended_at: datetime | None


# An account of NULL: of all of them.
SELECT_ATTEMPTS = """
SELECT
    a.id, a.billing_account_id, a.status, a.error_code, a.checked_code, a.chain_id, i.token,
    i.treasury, i.amount_usd_cents, i.units, a.tx_hash, a.created_at, i.expires_at,
    a.submitted_at, a.ended_at,
    (
        SELECT coalesce(sum(t.units), 0)::bigint
        FROM chain_transfers AS t
        WHERE t.payment_attempt_id = a.id AND t.state = 'credited'
    ) AS credited_units
FROM payment_attempts AS a
JOIN payment_intents AS i ON i.id = a.payment_intent_id
WHERE ($1::uuid IS NULL OR a.billing_account_id = $1)
    AND ($2::uuid IS NULL OR a.id < $2)
    AND ($4::uuid IS NULL OR a.id = $4)
ORDER BY a.id DESC
LIMIT $3
"""


async def list_attempts(
    conn: Connection, account_id: UUID | None, limit: int, *, before: UUID | None = None
) -> list[AttemptRecord]:
    """Newest first; `before` is the last id of the page before."""
    async with translated():
        rows = await conn.fetch(SELECT_ATTEMPTS, account_id, before, limit, None)
    return [AttemptRecord(**dict(row)) for row in rows]


async def find_attempt(
    conn: Connection, account_id: UUID | None, attempt_id: UUID
) -> AttemptRecord:
    """One attempt of an account (None: of any). Raises PaymentNotFound."""
    async with translated():
        row = await conn.fetchrow(SELECT_ATTEMPTS, account_id, None, 1, attempt_id)
    if row is None:
        raise PaymentNotFound
    return AttemptRecord(**dict(row))


# What waits under the attempt's hash is shown as soon as it is seen.
SELECT_TRANSFERS_OF = """
SELECT t.chain_id, t.tx_hash, t.ordinal, t.sender, t.units, t.nanos, t.state, t.suspense_reason,
    t.block_number, t.block_time
FROM payment_attempts AS a
JOIN chain_transfers AS t
    ON t.billing_account_id = a.billing_account_id
    AND (t.payment_attempt_id = a.id
         OR (t.payment_attempt_id IS NULL AND t.chain_id = a.chain_id AND t.tx_hash = a.tx_hash))
WHERE a.id = $1
ORDER BY t.block_number, t.tx_hash, t.ordinal
LIMIT 100
"""


async def transfers_of(conn: Connection, attempt_id: UUID) -> list[dict[str, Any]]:
    """What came for an attempt, to its own account."""
    async with translated():
        rows = await conn.fetch(SELECT_TRANSFERS_OF, attempt_id)
    return [dict(row) for row in rows]


SELECT_EVENTS = """
SELECT id, event, tx_hash, from_status, to_status, error_code, metadata, created_at
FROM payment_events
WHERE payment_attempt_id = $1
ORDER BY id
LIMIT 1000
"""


async def events_of(conn: Connection, attempt_id: UUID) -> list[dict[str, Any]]:
    """What happened to an attempt, in order."""
    async with translated():
        rows = await conn.fetch(SELECT_EVENTS, attempt_id)
    return [dict(row) for row in rows]
