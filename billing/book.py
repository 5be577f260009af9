"""The book: receipts, ledger and balances in Postgres; append-only, the truth.

One commit posts a batch of receipts in one statement. Every row derives its key from the request
id, so posting twice is a no-op, whoever does it.
Failure: BookUnavailable for anything that may work later with the same ids; BookRefused when a
row breaks a constraint or holds what no column takes, and never will.
"""

from collections.abc import AsyncIterator, Sequence
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
from billing.receipts import CHARGE_REASON, SOURCE_SYSTEM, ChargeReceipt, encode_batch
from billing.till import AccountState
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


# The locks are taken in the order of the ids, all of them before the first insert (the count
# forces it): without that order batches of several workers deadlock within seconds.
POST_RECEIPTS = """
WITH batch AS MATERIALIZED (
    SELECT *
    FROM json_to_recordset($1::json) AS t (
        request_id uuid, source_reference text, billing_account_id uuid, virtual_key_id uuid,
        app_key_id uuid, protocol text, provider text, requested_model text, served_model text,
        input_tokens bigint, output_tokens bigint, cached_tokens bigint,
        cache_write_tokens bigint, reasoning_tokens bigint, audio_input_tokens bigint,
        audio_output_tokens bigint, reported_cost_usd numeric, provider_cost_nanos bigint,
        price_nanos bigint, markup_bps integer, price_version bigint, hold_nanos bigint,
        overrun_nanos bigint, cost_source text, usage_source text, outcome text,
        provenance text, upstream_id text, upstream_request_id text, run_id text,
        attempt integer, graph_id text, client_retry_count integer, client_request_id text,
        started_at timestamptz, first_byte_at timestamptz, finished_at timestamptz
    )
),
locked AS MATERIALIZED (
    SELECT id, balance_nanos, version
    FROM billing_accounts
    WHERE id IN (SELECT billing_account_id FROM batch)
    ORDER BY id
    FOR UPDATE
),
new_receipts AS (
    INSERT INTO charge_receipts (
        source_system, charge_reason,
        request_id, source_reference, billing_account_id, virtual_key_id, app_key_id,
        protocol, provider, requested_model, served_model,
        input_tokens, output_tokens, cached_tokens, cache_write_tokens,
        reasoning_tokens, audio_input_tokens, audio_output_tokens,
        reported_cost_usd, provider_cost_nanos, price_nanos, markup_bps, price_version,
        hold_nanos, overrun_nanos, cost_source, usage_source, outcome, provenance,
        upstream_id, upstream_request_id, run_id, attempt, graph_id, client_retry_count,
        client_request_id, started_at, first_byte_at, finished_at
    )
    SELECT $2, $3, batch.*
    FROM batch
    WHERE (SELECT count(*) FROM locked) > 0
    ON CONFLICT DO NOTHING
    RETURNING request_id, billing_account_id, virtual_key_id, app_key_id, price_nanos
),
charges AS MATERIALIZED (
    SELECT
        r.request_id, r.billing_account_id, r.virtual_key_id, r.app_key_id, r.price_nanos,
        l.version + row_number() OVER w AS seq,
        l.balance_nanos - sum(r.price_nanos) OVER w AS balance_after_nanos
    FROM new_receipts AS r
    JOIN locked AS l ON l.id = r.billing_account_id
    WHERE r.price_nanos > 0
    WINDOW w AS (PARTITION BY r.billing_account_id ORDER BY r.request_id)
),
new_rows AS (
    INSERT INTO credit_ledger (
        billing_account_id, seq, balance_before_nanos, amount_nanos, balance_after_nanos,
        reason, reference, virtual_key_id, app_key_id
    )
    SELECT
        billing_account_id, seq, balance_after_nanos + price_nanos, -price_nanos,
        balance_after_nanos, 'charge', request_id::text, virtual_key_id, app_key_id
    FROM charges
),
last_rows AS (
    SELECT DISTINCT ON (billing_account_id) billing_account_id, seq, balance_after_nanos
    FROM charges
    ORDER BY billing_account_id, seq DESC
),
updated AS (
    UPDATE billing_accounts AS a
    SET balance_nanos = last_rows.balance_after_nanos, version = last_rows.seq
    FROM last_rows
    WHERE a.id = last_rows.billing_account_id
    RETURNING a.id, a.balance_nanos, a.version
)
SELECT
    l.id,
    coalesce(u.balance_nanos, l.balance_nanos) AS balance_nanos,
    coalesce(u.version, l.version) AS version
FROM locked AS l
LEFT JOIN updated AS u ON u.id = l.id
"""


async def post_receipts(conn: Connection, receipts: Sequence[ChargeReceipt]) -> list[AccountState]:
    """Post a batch: receipts, ledger rows and balances in one commit of their own.

    Receipts that are in already change nothing. Returns the state of every account of the batch,
    also of those touched by repeated receipts only. Raises BookUnavailable or BookRefused, and
    then nothing of the batch is posted.
    """
    # One JSON text: 37 arrays cost asyncpg three times as much, and Postgres hardly less. Numbers
    # keep their digits on the way, and so does the reported cost, which is a string.
    try:
        batch = encode_batch(receipts)
    except (UnicodeEncodeError, OverflowError, msgspec.EncodeError) as exc:
        raise BookRefused(reason=f"a receipt cannot be written: {exc}") from exc
    async with translated():
        states = await conn.fetch(POST_RECEIPTS, batch, SOURCE_SYSTEM, CHARGE_REASON)
    if len(states) != len({receipt.billing_account_id for receipt in receipts}):
        # Only when no account of the batch is known: else a foreign key refused the statement.
        raise BookRefused(reason="a receipt names an account that is not in the book")
    return [_state(row, "") for row in states]


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
    return _state(row, row["status"])


SELECT_EPOCH = "SELECT epoch FROM till_epoch"


async def read_epoch(conn: Connection) -> int:
    """The generation of the till's content that is valid now."""
    async with translated():
        epoch = await conn.fetchval(SELECT_EPOCH)
    assert isinstance(epoch, int)
    return epoch


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
            return _state(account, account["status"])
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


def _state(row: asyncpg.Record, status: str) -> AccountState:
    return AccountState(
        account_id=row["id"],
        balance_nanos=row["balance_nanos"],
        version=row["version"],
        status=status,
    )
