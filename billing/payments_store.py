"""Rows of the chain's transfers and of payment events. Nothing here decides anything.

Failure: what asyncpg raises; callers translate it and open the transaction.
"""

from typing import Any
from uuid import UUID

import msgspec

from billing.book import Connection, translated
from billing.chain.transfer import Transfer, transfer_nanos
from billing.payment_states import Code, Status, TransferState

# Everything that changes a transfer holds its lock, and then the sender's: a wallet that is proved
# meanwhile either is seen, or sees the transfer in suspense. Then come account and attempts.
LOCK_TRANSFER = "SELECT pg_advisory_xact_lock(hashtextextended('transfer ' || $1, 0))"
LOCK_SENDER = "SELECT pg_advisory_xact_lock(hashtextextended('sender ' || $1, 0))"


def transfer_key(chain_id: int, tx_hash: str, ordinal: int) -> str:
    """What a transfer is called everywhere."""
    return f"{chain_id}:{tx_hash}:{ordinal}"


async def lock_transfer(conn: Connection, chain_id: int, tx_hash: str, ordinal: int) -> None:
    await conn.execute(LOCK_TRANSFER, transfer_key(chain_id, tx_hash, ordinal))


async def lock_sender(conn: Connection, sender: str) -> None:
    await conn.execute(LOCK_SENDER, sender)


SELECT_TRANSFER = """
SELECT
    chain_id, tx_hash, ordinal, sender, units, nanos, block_number, block_hash, block_time, state,
    suspense_reason, billing_account_id, payment_attempt_id, generation, seen_at, changed_at
FROM chain_transfers
WHERE chain_id = $1 AND tx_hash = $2 AND ordinal = $3
"""


async def find_transfer(conn: Connection, chain_id: int, tx_hash: str, ordinal: int) -> Any:
    """The row of a transfer, or None."""
    return await conn.fetchrow(SELECT_TRANSFER, chain_id, tx_hash, ordinal)


UPSERT_TRANSFER = """
INSERT INTO chain_transfers (
    chain_id, tx_hash, ordinal, sender, units, nanos, block_number, block_hash, block_time, state,
    suspense_reason, billing_account_id, payment_attempt_id, generation
)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)
ON CONFLICT (chain_id, tx_hash, ordinal) DO UPDATE
SET sender = excluded.sender,
    units = excluded.units,
    nanos = excluded.nanos,
    block_number = excluded.block_number,
    block_hash = excluded.block_hash,
    block_time = excluded.block_time,
    state = excluded.state,
    suspense_reason = excluded.suspense_reason,
    billing_account_id = excluded.billing_account_id,
    payment_attempt_id = excluded.payment_attempt_id,
    generation = excluded.generation,
    changed_at = now()
"""


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a transfer stands."""

    state: TransferState
    suspense_reason: str = ""
    account_id: UUID | None = None
    attempt_id: UUID | None = None
    generation: int = 0


async def put_transfer(conn: Connection, transfer: Transfer, place: Place) -> None:
    """Write a transfer as the chain has it, where it stands now."""
    await conn.execute(
        UPSERT_TRANSFER,
        transfer.chain_id,
        transfer.tx_hash,
        transfer.ordinal,
        transfer.sender,
        transfer.units,
        transfer_nanos(transfer),
        transfer.block_number,
        transfer.block_hash,
        transfer.block_time,
        place.state.value,
        place.suspense_reason,
        place.account_id,
        place.attempt_id,
        place.generation,
    )


MOVE_TRANSFER = """
UPDATE chain_transfers
SET block_number = $4, block_hash = $5, block_time = $6, changed_at = now()
WHERE chain_id = $1 AND tx_hash = $2 AND ordinal = $3 AND block_hash <> $5
"""


async def move_transfer(conn: Connection, transfer: Transfer) -> None:
    """Note the block that a transfer is in now: a reorg may have moved it."""
    block = (transfer.block_number, transfer.block_hash, transfer.block_time)
    await conn.execute(MOVE_TRANSFER, transfer.chain_id, transfer.tx_hash, transfer.ordinal, *block)


def transfer_of(row: Any) -> Transfer:
    """The chain's part of a row."""
    return Transfer(**{name: row[name] for name in Transfer.__struct_fields__})


INSERT_TRANSFER_EVENT = """
INSERT INTO payment_events (
    event, billing_account_id, payment_attempt_id, chain_id, tx_hash, ordinal,
    from_status, to_status, metadata
)
VALUES ('TRANSFER_CHANGED', $1, $2, $3, $4, $5, $6, $7, $8::jsonb)
"""


async def note_transfer(
    conn: Connection, transfer: Transfer, before: str | None, place: Place, **metadata: Any
) -> None:
    """Append what became of a transfer."""
    if place.suspense_reason:
        metadata["suspense_reason"] = place.suspense_reason
    key = (transfer.chain_id, transfer.tx_hash, transfer.ordinal)
    about = msgspec.json.encode(metadata).decode()
    ids = (place.account_id, place.attempt_id)
    await conn.execute(INSERT_TRANSFER_EVENT, *ids, *key, before, place.state.value, about)


INSERT_ATTEMPT_EVENT = """
INSERT INTO payment_events (
    event, billing_account_id, payment_attempt_id, tx_hash, from_status, to_status, error_code,
    metadata
)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8::jsonb)
"""


class AttemptEvent(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened to an attempt."""

    event: str
    account_id: UUID
    attempt_id: UUID
    tx_hash: str | None = None
    before: Status | None = None
    after: Status | None = None
    code: Code | None = None


async def note_attempt(conn: Connection, event: AttemptEvent, **metadata: Any) -> None:
    """Append what happened to an attempt."""
    await conn.execute(
        INSERT_ATTEMPT_EVENT,
        event.event,
        event.account_id,
        event.attempt_id,
        event.tx_hash,
        event.before,
        event.after,
        event.code,
        msgspec.json.encode(metadata).decode(),
    )


SELECT_SUSPENSE_OF_SENDER = """
SELECT
    chain_id, tx_hash, ordinal, sender, units, nanos, block_number, block_hash, block_time, state,
    suspense_reason, billing_account_id, payment_attempt_id, generation, seen_at, changed_at
FROM chain_transfers
WHERE state = 'suspense' AND sender = $1 AND suspense_reason IN ('unknown_sender', 'too_large')
ORDER BY block_number, tx_hash, ordinal
LIMIT $2
"""


async def suspense_of(conn: Connection, sender: str, limit: int) -> list[Transfer]:
    """Transfers of a wallet that whoever proves it can have."""
    rows = await conn.fetch(SELECT_SUSPENSE_OF_SENDER, sender, limit)
    return [transfer_of(row) for row in rows]


SELECT_TRANSFERS = """
SELECT
    chain_id, tx_hash, ordinal, sender, units, nanos, block_number, block_hash, block_time, state,
    suspense_reason, billing_account_id, payment_attempt_id, generation, seen_at, changed_at
FROM chain_transfers
WHERE $1::text IS NULL OR state = $1
ORDER BY seen_at DESC, chain_id, tx_hash, ordinal
LIMIT $2
"""


async def list_transfers(
    conn: Connection, state: TransferState | None, limit: int
) -> list[dict[str, Any]]:
    """The last transfers that came, in a state or in any."""
    async with translated():
        rows = await conn.fetch(SELECT_TRANSFERS, state, limit)
    return [dict(row) for row in rows]


SELECT_TRANSFERS_OF_HASH = """
SELECT
    chain_id, tx_hash, ordinal, sender, units, nanos, block_number, block_hash, block_time, state,
    suspense_reason, billing_account_id, payment_attempt_id, generation, seen_at, changed_at
FROM chain_transfers
WHERE tx_hash = $1
ORDER BY chain_id, ordinal
LIMIT 1000
"""


async def transfers_of_hash(conn: Connection, tx_hash: str) -> list[dict[str, Any]]:
    """What a transaction brought."""
    async with translated():
        rows = await conn.fetch(SELECT_TRANSFERS_OF_HASH, tx_hash)
    return [dict(row) for row in rows]
