"""Receipts into the book: a batch of them, their ledger rows and balances, in one commit.

Every row derives its key from the request id, so posting twice is a no-op, whoever does it: the
worker, a sweeper, the replay of a spool file.
Failure: BookUnavailable for anything that may work later with the same ids; BookRefused when a
row breaks a constraint or holds what no column takes, and never will.
"""

from collections.abc import Sequence
from uuid import UUID

import msgspec

from billing.book import BookRefused, Connection, account_state, translated
from billing.receipts import CHARGE_REASON, SOURCE_SYSTEM, ChargeReceipt, encode_batch
from billing.till_epoch import AccountState
from billing.usage import UsageSource

# The locks are taken in the order of the ids, all of them before the first insert (the count
# forces it): without that order batches of several workers deadlock within seconds. They guard the
# rows of scope_spend, too: a virtual key is of one account.
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
        attempt integer, failed_attempts jsonb, graph_id text, client_retry_count integer,
        client_request_id text, started_at timestamptz, first_byte_at timestamptz,
        finished_at timestamptz, budget_window text
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
        upstream_id, upstream_request_id, run_id, attempt, failed_attempts, graph_id,
        client_retry_count, client_request_id, started_at, first_byte_at, finished_at,
        budget_window
    )
    SELECT $2, $3, batch.*
    FROM batch
    WHERE (SELECT count(*) FROM locked) > 0
    ON CONFLICT DO NOTHING
    RETURNING
        request_id, billing_account_id, virtual_key_id, app_key_id, price_nanos, started_at
),
spends AS (
    INSERT INTO scope_spend AS s (virtual_key_id, window_start, spent_nanos, version)
    SELECT virtual_key_id, date_trunc('day', started_at, 'UTC'), sum(price_nanos), count(*)
    FROM new_receipts
    WHERE price_nanos > 0
    GROUP BY 1, 2
    ON CONFLICT (virtual_key_id, window_start) DO UPDATE
    SET spent_nanos = s.spent_nanos + excluded.spent_nanos,
        version = s.version + excluded.version
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
    coalesce(u.version, l.version) AS version,
    (SELECT count(*) FROM new_receipts) AS posted
FROM locked AS l
LEFT JOIN updated AS u ON u.id = l.id
"""


async def post_receipts(conn: Connection, receipts: Sequence[ChargeReceipt]) -> list[AccountState]:
    """Post a batch: receipts, ledger rows and balances in one commit of their own.

    Receipts that are in already change nothing; when a sweeper had put one in for a worker that
    lived after all, the difference to the worker's own is posted as `adjust`. Returns the state of
    every account of the batch, also of those touched by repeated receipts only. Raises
    BookUnavailable or BookRefused; to post the same again is right in any case.
    """
    # One JSON text: 38 arrays cost asyncpg three times as much, and Postgres hardly less. Numbers
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
    changed = {}
    if states[0]["posted"] < len(receipts):
        # crash-point: repeat.seen
        changed = await _adjust_late(conn, receipts)
    return [changed.get(row["id"]) or account_state(row, "") for row in states]


# What a sweeper had put in for a worker that lived after all; locked as everywhere, by account.
SELECT_GUESSED = """
SELECT
    r.request_id, r.virtual_key_id, r.price_nanos, r.hold_nanos, r.started_at,
    a.id, a.balance_nanos, a.version
FROM charge_receipts AS r
JOIN billing_accounts AS a ON a.id = r.billing_account_id
WHERE r.request_id = ANY($1::uuid[]) AND r.usage_source = 'checkpoint'
ORDER BY a.id, r.request_id
FOR UPDATE OF a
"""
INSERT_ADJUSTMENT = """
INSERT INTO credit_ledger (
    billing_account_id, seq, balance_before_nanos, amount_nanos, balance_after_nanos,
    reason, reference, virtual_key_id, app_key_id, metadata
)
SELECT id, version + 1, balance_nanos, $2::bigint, balance_nanos + $2::bigint, 'adjust', $3, $4, $5,
    $6::jsonb
FROM billing_accounts
WHERE id = $1
ON CONFLICT (reason, reference) DO NOTHING
RETURNING billing_account_id, balance_after_nanos, seq
"""
UPDATE_ADJUSTED = """
UPDATE billing_accounts
SET balance_nanos = $2, version = $3
WHERE id = $1
RETURNING id, balance_nanos, version
"""
# A row may be missing only when nothing was spent on that day yet.
ADJUST_SPEND = """
INSERT INTO scope_spend AS s (virtual_key_id, window_start, spent_nanos, version)
VALUES ($1, date_trunc('day', $2::timestamptz, 'UTC'), greatest($3::bigint, 0), 1)
ON CONFLICT (virtual_key_id, window_start) DO UPDATE
SET spent_nanos = s.spent_nanos + $3, version = s.version + 1
"""


async def _adjust_late(
    conn: Connection, receipts: Sequence[ChargeReceipt]
) -> dict[UUID, AccountState]:
    """Correct what a sweeper guessed by what the worker itself says, once for each request.

    The two together stay within the hold that the sweeper found. Returns the accounts that
    changed.
    """
    own = {r.request_id: r for r in receipts if r.usage_source is not UsageSource.CHECKPOINT}
    changed: dict[UUID, AccountState] = {}
    if not own:
        return changed
    async with translated(), conn.transaction():
        for guessed in await conn.fetch(SELECT_GUESSED, list(own)):
            receipt = own[guessed["request_id"]]
            # crash-point: adjust.begin
            # The till may have forgotten that the hold grew: the user saw no more than this held.
            price = min(receipt.price_nanos, guessed["hold_nanos"])
            amount = guessed["price_nanos"] - price
            if not amount:
                continue
            row = (receipt.billing_account_id, amount, str(receipt.request_id))
            keys = (receipt.virtual_key_id, receipt.app_key_id)
            new = await conn.fetchrow(INSERT_ADJUSTMENT, *row, *keys, _reason(receipt))
            if new is not None:
                state = await conn.fetchrow(UPDATE_ADJUSTED, *new.values())
                day = (guessed["virtual_key_id"], guessed["started_at"])
                await conn.execute(ADJUST_SPEND, *day, -amount)
                assert state is not None  # the ledger row just written refers to it
                changed[state["id"]] = account_state(state, "")
                # crash-point: adjust.written
    return changed


def _reason(receipt: ChargeReceipt) -> str:
    """What the worker would have written into the receipt, for whoever asks why."""
    facts = {
        "why": "the worker that was taken for dead ended the request itself",
        "price_nanos": receipt.price_nanos,
        "outcome": receipt.outcome,
        "usage_source": receipt.usage_source,
        "input_tokens": receipt.input_tokens,
        "output_tokens": receipt.output_tokens,
    }
    return msgspec.json.encode(facts).decode()
