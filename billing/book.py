"""The book: receipts, ledger and balances in Postgres; append-only, the truth.

Receipts are posted by posting.py; here are accounts, grants of credit and the way in.
Failure: BookUnavailable for anything that may work later with the same ids; BookRefused when a
row breaks a constraint or holds what no column takes, and never will.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

import asyncpg
import msgspec

from billing.errors import (
    AccountUnknown,
    BillingError,
    BookUnavailable,
    CreditTooLarge,
    ReferenceConflict,
)
from billing.money import NANOS_MAX
from billing.till_epoch import AccountState
from config.clock import seconds
from config.ids import new_id

# asyncpg's pool hands out proxies that behave like connections.
Connection = asyncpg.Connection | asyncpg.pool.PoolConnectionProxy
Pool = asyncpg.Pool

ACQUIRE_TIMEOUT_S = 5


class BookRefused(BillingError):
    """A row breaks a constraint of the book and can never be posted."""

    def __init__(self, *, reason: str) -> None:
        super().__init__()
        self.reason = reason


@asynccontextmanager
async def translated() -> AsyncIterator[None]:
    """Turn what asyncpg raises into our two kinds: never will work, or may work later.

    Only what is wrong with the values themselves is refused for good. All else is retried: a
    server that became read-only, a missing privilege or column must not cost anybody a receipt.
    """
    try:
        yield
    except (
        asyncpg.DataError,
        asyncpg.IntegrityConstraintViolationError,
        asyncpg.ProgramLimitExceededError,
    ) as exc:
        raise BookRefused(reason=f"{exc.sqlstate}: {exc}") from exc
    except (
        OSError,
        asyncpg.InterfaceError,
        asyncpg.InternalClientError,  # a connection whose end was not noticed in time
        asyncpg.PostgresError,
    ) as exc:
        raise BookUnavailable from exc


async def open_pool(url: str, size_max: int, connect_timeout_s: int, statement_ms: int) -> Pool:
    """A pool whose every statement has a deadline. Raises BookUnavailable."""
    async with translated():
        return await asyncpg.create_pool(
            url,
            min_size=1,
            max_size=size_max,
            timeout=connect_timeout_s,
            command_timeout=seconds(statement_ms),
            reset=_keep,
            server_settings={"application_name": "farebox", "statement_timeout": str(statement_ms)},
        )


async def _keep(conn: Connection) -> None:
    """Give a connection back as it is. asyncpg's own reset is a round trip after each use.

    It rolls an open transaction back all the same, and nothing here changes a session: no SET, no
    LISTEN, no lock that outlives its transaction, no cursor.
    """


async def connect(url: str) -> asyncpg.Connection:
    """One connection for a short task of an operator. Raises BookUnavailable."""
    async with translated():
        return await asyncpg.connect(url, timeout=ACQUIRE_TIMEOUT_S, command_timeout=60)


@asynccontextmanager
async def acquire(pool: Pool) -> AsyncIterator[Connection]:
    """A connection of the pool, given back whatever happens. Raises BookUnavailable."""
    async with translated():
        conn = await pool.acquire(timeout=ACQUIRE_TIMEOUT_S)
    try:
        yield conn
    finally:
        async with translated():
            await pool.release(conn, timeout=ACQUIRE_TIMEOUT_S)


# For the transaction only: the connection is the next tenant's.
ACT_FOR = "SELECT set_config('farebox.account_id', $1, true)"


@asynccontextmanager
async def as_tenant(pool: Pool, account_id: UUID) -> AsyncIterator[Connection]:
    """A transaction that sees and changes the rows of one account, whatever its statements ask for.

    pool enters as farebox_request (billing.roles): for any other role this is no wall. Committed
    at the end, taken back when the body raises. Raises BookUnavailable.
    """
    async with acquire(pool) as conn, translated(), conn.transaction():
        await conn.execute(ACT_FOR, str(account_id))
        yield conn


SELECT_ACCOUNT = """
SELECT id, balance_nanos, version, status
FROM billing_accounts
WHERE id = $1
"""


async def read_account(conn: Connection, account_id: UUID) -> AccountState:
    """The account's posted balance. Raises AccountUnknown."""
    async with translated():
        row = await conn.fetchrow(SELECT_ACCOUNT, account_id)
    if row is None:
        raise AccountUnknown
    return account_state(row, row["status"])


INSERT_USER = "INSERT INTO users (id, label) VALUES ($1, $2)"
INSERT_ACCOUNT = """
INSERT INTO billing_accounts (id, owner_user_id, open_requests_max)
VALUES ($1, $2, $3)
"""
INSERT_DEFAULT_KEY = """
INSERT INTO virtual_keys (id, billing_account_id, is_default)
VALUES ($1, $2, true)
"""


async def create_account(
    conn: Connection, label: str, open_requests_max: int | None = None
) -> UUID:
    """A user, its billing account and its default virtual key, in one transaction."""
    user_id, account_id = new_id(), new_id()
    async with translated(), conn.transaction():
        await conn.execute(INSERT_USER, user_id, label)
        await conn.execute(INSERT_ACCOUNT, account_id, user_id, open_requests_max)
        await conn.execute(INSERT_DEFAULT_KEY, new_id(), account_id)
    return account_id


LOCK_ACCOUNT = """
SELECT id, balance_nanos, version, status
FROM billing_accounts
WHERE id = $1
FOR UPDATE
"""
SELECT_LEDGER_ROW = """
SELECT billing_account_id, amount_nanos
FROM credit_ledger
WHERE reason = $1 AND reference = $2
"""
INSERT_LEDGER_ROW = """
INSERT INTO credit_ledger (
    billing_account_id, seq, balance_before_nanos, amount_nanos, balance_after_nanos,
    reason, reference, metadata
)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8::jsonb)
"""
UPDATE_BALANCE = """
UPDATE billing_accounts
SET balance_nanos = $2, version = $3
WHERE id = $1
"""


async def grant(
    conn: Connection, account_id: UUID, nanos: int, reference: str, note: str
) -> AccountState:
    """Append one grant of credit; the same reference again changes nothing.

    Raises AccountUnknown, CreditTooLarge (also when the sum would be), ReferenceConflict when the
    reference was used for another account or amount.
    """
    assert nanos > 0
    async with translated(), conn.transaction():
        account = await conn.fetchrow(LOCK_ACCOUNT, account_id)
        if account is None:
            raise AccountUnknown
        known = await conn.fetchrow(SELECT_LEDGER_ROW, "grant", reference)
        if known is not None:
            if (known["billing_account_id"], known["amount_nanos"]) != (account_id, nanos):
                raise ReferenceConflict
            return account_state(account, account["status"])
        before, seq = account["balance_nanos"], account["version"] + 1
        after = before + nanos
        if after > NANOS_MAX:
            raise CreditTooLarge
        metadata = msgspec.json.encode({"note": note}).decode()
        row = (account_id, seq, before, nanos, after, "grant", reference, metadata)
        try:
            await conn.execute(INSERT_LEDGER_ROW, *row)
        except asyncpg.UniqueViolationError as exc:
            # Another account took the reference meanwhile: only our own account was locked.
            raise ReferenceConflict from exc
        await conn.execute(UPDATE_BALANCE, account_id, after, seq)
    return AccountState(
        account_id=account_id, balance_nanos=after, version=seq, status=account["status"]
    )


def account_state(row: asyncpg.Record, status: str) -> AccountState:
    return AccountState(
        account_id=row["id"],
        balance_nanos=row["balance_nanos"],
        version=row["version"],
        status=status,
    )
