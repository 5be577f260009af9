"""What all processes agree on through the book: the till's epoch, who lives, and who leads.

Both go by the book's clock, so that clocks of machines may differ.
Failure: BookUnavailable.
"""

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

from billing.book import Connection, Pool, acquire, read_account, translated
from billing.budgets import read_windows
from billing.till_epoch import AccountState, Epoch, SpendState
from billing.till_scopes import BudgetScope

# A worker says that it lives every few seconds (gateway.holds); one that was not heard of
# for this long is dead or cut off.
HEARD_OF_S = 15
# Kept for a day after the last word, for whoever looks into what happened.
REMEMBERED_S = 86_400


class PoolBook:
    """What a till asks of the book, for one worker and its pool."""

    def __init__(self, pool: Pool, worker: str) -> None:
        self._pool = pool
        self._worker = worker

    async def read_account(self, account_id: UUID) -> AccountState:
        async with acquire(self._pool) as conn:
            return await read_account(conn, account_id)

    async def read_budget(self, budget: BudgetScope) -> SpendState:
        async with acquire(self._pool) as conn:
            (state,) = await read_windows(conn, [budget])
        return state

    async def read_epoch(self) -> Epoch:
        async with acquire(self._pool) as conn:
            return await read_epoch(conn, self._worker)

    async def bump_epoch(self, known: Epoch, server_run_id: str) -> Epoch:
        async with acquire(self._pool) as conn:
            return await bump_epoch(conn, known, server_run_id, self._worker)


# Any constant will do; it must only differ from other advisory locks of this database.
WORK_LOCK = 0x776F726B
REBUILD_LOCK = 0x7265626C
TRY_LOCK = "SELECT pg_try_advisory_lock($1)"


async def is_leader(conn: Connection, lock: int = WORK_LOCK) -> bool:
    """Whether this connection may do what one process at a time does; it keeps that until it ends.

    conn is the caller's own, not one of a pool: the lock lives as long as the connection does.
    """
    async with translated():
        return bool(await conn.fetchval(TRY_LOCK, lock))


SELECT_EPOCH = """
SELECT
    epoch, server_run_id,
    (extract(epoch FROM clock_timestamp() - changed_at) * 1000)::bigint AS age_ms,
    (SELECT count(*) FROM workers
     WHERE name <> $1 AND seen_at > clock_timestamp() - make_interval(secs => $2)) AS others
FROM till_epoch
"""


async def read_epoch(conn: Connection, worker: str = "") -> Epoch:
    """The epoch as the book has it now."""
    async with translated():
        row = await conn.fetchrow(SELECT_EPOCH, worker, HEARD_OF_S)
    assert row is not None  # the table has one row, always
    return _epoch(dict(row))


# The row's lock lets one of several bumps of the same epoch win; the others find another one.
# The first till ever opened ends no epoch: it is only remembered.
BUMP_EPOCH = """
UPDATE till_epoch
SET epoch = epoch + (server_run_id <> '')::integer, server_run_id = $2,
    changed_at = clock_timestamp()
WHERE epoch = $1 AND server_run_id = $3
"""


async def bump_epoch(conn: Connection, known: Epoch, server_run_id: str, worker: str = "") -> Epoch:
    """End the epoch `known` unless somebody did; returns the one that is valid now."""
    async with translated(), conn.transaction():
        await conn.execute(BUMP_EPOCH, known.number, server_run_id, known.server_run_id)
    return await read_epoch(conn, worker)


# What a till of another book says of its epoch may be ahead of ours, and must not stay valid.
BEGIN_EPOCH = """
UPDATE till_epoch
SET epoch = greatest(epoch, $1) + 1,
    server_run_id = CASE WHEN $2 = '' THEN server_run_id ELSE $2 END,
    changed_at = clock_timestamp() + $3::bigint * interval '1 millisecond'
"""


async def begin_epoch(
    conn: Connection, newer_than: int, server_run_id: str, keep_closed_ms: int, worker: str
) -> Epoch:
    """End the epoch in any case. Workers that see others live open no shard for that long."""
    async with translated():
        await conn.execute(BEGIN_EPOCH, newer_than, server_run_id, keep_closed_ms)
    return await read_epoch(conn, worker)


MOVE_EPOCH = """
UPDATE till_epoch
SET changed_at = clock_timestamp() + $2::bigint * interval '1 millisecond'
WHERE epoch = $1
RETURNING epoch
"""


async def move_epoch(conn: Connection, epoch: int, from_now_ms: int) -> bool:
    """Say when it begins, or (negative) began. False: another epoch has begun."""
    async with translated():
        return await conn.fetchval(MOVE_EPOCH, epoch, from_now_ms) is not None


SAY_ALIVE = """
INSERT INTO workers (name)
VALUES ($1)
ON CONFLICT (name) DO UPDATE SET seen_at = clock_timestamp()
"""


async def say_alive(conn: Connection, worker: str) -> None:
    """A worker's heartbeat."""
    async with translated():
        await conn.execute(SAY_ALIVE, worker)


SAY_GONE = "DELETE FROM workers WHERE name = $1"


async def say_gone(conn: Connection, worker: str) -> None:
    """A worker ended everything that it had open."""
    async with translated():
        await conn.execute(SAY_GONE, worker)


SELECT_ALIVE = """
SELECT name
FROM workers
WHERE name = ANY($1::text[]) AND seen_at > clock_timestamp() - make_interval(secs => $2)
"""


async def living(conn: Connection, names: Sequence[str]) -> set[str]:
    """Which of these workers were heard of lately."""
    async with translated():
        rows = await conn.fetch(SELECT_ALIVE, list(names), HEARD_OF_S)
    return {row["name"] for row in rows}


SELECT_WORKERS = """
SELECT
    name, started_at,
    (extract(epoch FROM clock_timestamp() - seen_at) * 1000)::bigint AS seen_ms_ago,
    seen_at > clock_timestamp() - make_interval(secs => $1) AS is_alive
FROM workers
ORDER BY seen_at DESC
LIMIT 1000
"""


async def list_workers(conn: Connection) -> list[dict[str, Any]]:
    """Who was heard of within a day, the latest first."""
    async with translated():
        return [dict(row) for row in await conn.fetch(SELECT_WORKERS, HEARD_OF_S)]


FORGET_WORKERS = "DELETE FROM workers WHERE seen_at < clock_timestamp() - make_interval(secs => $1)"


async def forget_workers(conn: Connection) -> None:
    """Drop the rows of workers that died long ago."""
    async with translated():
        await conn.execute(FORGET_WORKERS, REMEMBERED_S)


def _epoch(row: Mapping[str, Any]) -> Epoch:
    return Epoch(
        number=row["epoch"],
        server_run_id=row["server_run_id"],
        age_ms=row["age_ms"],
        others=row["others"],
    )
