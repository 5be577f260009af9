"""What a client wants to be done only once: the table `idempotent_requests`.

A request claims its key before it is admitted; the claim names the request, and the request's
receipt in the book says how it ended: the till may have lost things, the book has not. A claim
passes to another request only when the one that had it did nothing that can be billed.
Failure: BookUnavailable, and then nobody may go on: the claim may or may not be there.
"""

import hashlib
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

import msgspec

from billing.book import Connection, translated
from billing.errors import IdempotencyCompleted, IdempotencyInFlight, IdempotencyMismatch
from billing.receipts import Outcome
from billing.usage import UsageSource
from config.clock import Seconds

# A request is admitted within seconds of its claim. One that was not admitted by then never was,
# unless the till has lost it.
ABANDONED_AFTER_S = 60
TRIES = 4
PURGED_AT_ONCE = 10_000


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """One request's claim to a key. Only digests: neither the key nor the body can be read back."""

    virtual_key_id: UUID
    key_digest: bytes
    body_digest: bytes
    request_id: UUID


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """The request that has a claim but no receipt. Ages are by the book's clock."""

    request_id: UUID
    age_s: int
    epoch: int
    epoch_age_s: int
    """How long the till's content has been of that epoch: what it lost before counts for more."""
    is_guessed: bool = False
    """A sweeper voided it for a worker that may live after all, and then charges for it."""


def claim_of(virtual_key_id: UUID, key: bytes, body: bytes, request_id: UUID) -> Claim:
    """The claim of a request. The body's digest is salted with the key: it confirms no guess."""
    key_digest = hashlib.sha256(virtual_key_id.bytes + key).digest()
    return Claim(
        virtual_key_id=virtual_key_id,
        key_digest=key_digest,
        body_digest=hashlib.sha256(key_digest + body).digest(),
        request_id=request_id,
    )


INSERT_CLAIM = """
INSERT INTO idempotent_requests (virtual_key_id, key_digest, body_digest, request_id)
VALUES ($1, $2, $3, $4)
ON CONFLICT DO NOTHING
RETURNING request_id
"""
SELECT_HOLDER = """
SELECT
    i.body_digest, i.request_id, r.outcome, r.price_nanos, r.usage_source, e.epoch,
    extract(epoch FROM clock_timestamp() - i.created_at)::bigint AS age_s,
    extract(epoch FROM clock_timestamp() - e.changed_at)::bigint AS epoch_age_s
FROM idempotent_requests AS i
CROSS JOIN till_epoch AS e
LEFT JOIN charge_receipts AS r ON r.request_id = i.request_id
WHERE i.virtual_key_id = $1 AND i.key_digest = $2
"""
# Compare and swap. Looked at once more in the same statement: a receipt may have come since.
TAKE_OVER = """
UPDATE idempotent_requests AS i
SET request_id = $3, created_at = now()
WHERE i.virtual_key_id = $1 AND i.key_digest = $2 AND i.request_id = $4
    AND NOT EXISTS (
        SELECT 1
        FROM charge_receipts AS r
        WHERE r.request_id = $4 AND (r.outcome <> 'voided' OR r.price_nanos <> 0)
    )
RETURNING i.request_id
"""


async def claim_request(
    conn: Connection, claim: Claim, is_abandoned: Callable[[Holder], Awaitable[bool]]
) -> UUID | None:
    """Claim the key for this request; None, or the request from which the claim was taken over.

    is_abandoned is asked of an old claim without a receipt. Raises IdempotencyMismatch,
    IdempotencyInFlight or IdempotencyCompleted when another request has the claim.
    """
    key = (claim.virtual_key_id, claim.key_digest)
    for _ in range(TRIES):
        async with translated():
            inserted = await conn.fetchval(INSERT_CLAIM, *key, claim.body_digest, claim.request_id)
            row = None if inserted else await conn.fetchrow(SELECT_HOLDER, *key)
        if inserted:
            return None
        if row is None:
            continue  # released since
        await _refuse_unless_free(claim, row, is_abandoned)
        async with translated():
            taken = await conn.fetchval(TAKE_OVER, *key, claim.request_id, row["request_id"])
        if taken:
            holder = row["request_id"]
            assert isinstance(holder, UUID)
            return holder
    raise IdempotencyInFlight


async def _refuse_unless_free(
    claim: Claim, row: Any, is_abandoned: Callable[[Holder], Awaitable[bool]]
) -> None:
    if row["body_digest"] != claim.body_digest:
        raise IdempotencyMismatch
    if row["outcome"] is not None:
        if row["outcome"] != Outcome.VOIDED or row["price_nanos"]:
            raise IdempotencyCompleted(request_id=row["request_id"], price_nanos=row["price_nanos"])
        if row["usage_source"] != UsageSource.CHECKPOINT:
            return
    holder = Holder(
        request_id=row["request_id"],
        age_s=row["age_s"],
        epoch=row["epoch"],
        epoch_age_s=row["epoch_age_s"],
        is_guessed=row["outcome"] is not None,
    )
    if holder.age_s < ABANDONED_AFTER_S or not await is_abandoned(holder):
        raise IdempotencyInFlight


DELETE_CLAIM = """
DELETE FROM idempotent_requests
WHERE virtual_key_id = $1 AND key_digest = $2 AND request_id = $3
"""


async def release_claim(conn: Connection, claim: Claim) -> None:
    """Give the key free: this request was refused. Does nothing to another request's claim."""
    async with translated():
        await conn.execute(DELETE_CLAIM, claim.virtual_key_id, claim.key_digest, claim.request_id)


DELETE_OLD_CLAIMS = """
DELETE FROM idempotent_requests
WHERE (virtual_key_id, key_digest) IN (
    SELECT virtual_key_id, key_digest
    FROM idempotent_requests
    WHERE created_at < now() - $1::bigint * interval '1 second'
    ORDER BY created_at
    LIMIT $2
)
"""


async def purge_idempotent_requests(conn: Connection, older_than_s: Seconds = 86_400) -> int:
    """Forget keys of that age, in statements of bounded size; returns how many.

    What is younger than the longest request must stay: it may still be in flight.
    """
    purged = 0
    while True:
        async with translated():
            status = await conn.execute(DELETE_OLD_CLAIMS, int(older_than_s), PURGED_AT_ONCE)
        count = int(status.rpartition(" ")[2])
        purged += count
        if count < PURGED_AT_ONCE:
            return purged
