"""Reading back what was charged. Every query that acts for a tenant carries its account."""

from typing import Any
from uuid import UUID

import msgspec

from billing.book import Connection, translated
from billing.receipts import FailedAttempt

SELECT_RECEIPT = """
SELECT
    request_id, source_system, source_reference, billing_account_id, virtual_key_id, app_key_id,
    charge_reason, protocol, provider, requested_model, served_model, input_tokens, output_tokens,
    cached_tokens, cache_write_tokens, reasoning_tokens, audio_input_tokens, audio_output_tokens,
    reported_cost_usd, provider_cost_nanos, price_nanos, markup_bps, price_version, hold_nanos,
    overrun_nanos, cost_source, usage_source, outcome, provenance, upstream_id,
    upstream_request_id, run_id, attempt, failed_attempts, graph_id, client_retry_count,
    client_request_id, started_at, first_byte_at, finished_at, posted_at, budget_window
FROM charge_receipts
WHERE request_id = $1 AND ($2::uuid IS NULL OR billing_account_id = $2)
"""


async def find_receipt(
    conn: Connection, request_id: UUID, account_id: UUID | None = None
) -> dict[str, Any] | None:
    """One receipt, of one account or (operators only) of any."""
    async with translated():
        row = await conn.fetchrow(SELECT_RECEIPT, request_id, account_id)
    if row is None:
        return None
    attempts = msgspec.json.decode(row["failed_attempts"], type=tuple[FailedAttempt, ...])
    return {**row, "failed_attempts": attempts}


HAS_RECEIPT = "SELECT EXISTS (SELECT 1 FROM charge_receipts WHERE request_id = $1)"


async def has_receipt(conn: Connection, request_id: UUID) -> bool:
    """Whether a request has ended in the book."""
    async with translated():
        return bool(await conn.fetchval(HAS_RECEIPT, request_id))


SELECT_RECEIPTS = """
SELECT
    request_id, billing_account_id, app_key_id, requested_model, provider, outcome, usage_source,
    cost_source, input_tokens, output_tokens, provider_cost_nanos, price_nanos, hold_nanos,
    started_at, finished_at
FROM charge_receipts
WHERE ($1::uuid IS NULL OR billing_account_id = $1) AND ($2::uuid IS NULL OR request_id < $2)
ORDER BY request_id DESC
LIMIT $3
"""


async def list_receipts(
    conn: Connection, account_id: UUID | None, before: UUID | None, limit: int
) -> list[dict[str, Any]]:
    """Newest first; `before` is the last id of the previous page."""
    async with translated():
        rows = await conn.fetch(SELECT_RECEIPTS, account_id, before, limit)
    return [dict(row) for row in rows]


SELECT_LEDGER_OF_RECEIPT = """
SELECT seq, amount_nanos, balance_after_nanos, posted_at
FROM credit_ledger
WHERE reason = 'charge' AND reference = $1
"""


async def find_ledger_row(conn: Connection, request_id: UUID) -> dict[str, Any] | None:
    """The ledger row of a receipt; None for a receipt without a price."""
    async with translated():
        row = await conn.fetchrow(SELECT_LEDGER_OF_RECEIPT, str(request_id))
    return None if row is None else dict(row)


SELECT_ACCOUNT_OVERVIEW = """
SELECT
    a.id, a.status, a.balance_nanos, a.version, a.created_at, u.label,
    (SELECT count(*) FROM app_api_keys AS k
     WHERE k.billing_account_id = a.id AND k.status = 'active') AS active_keys,
    (SELECT count(*) FROM charge_receipts AS r WHERE r.billing_account_id = a.id) AS receipts,
    (SELECT coalesce(sum(r.price_nanos), 0)::bigint FROM charge_receipts AS r
     WHERE r.billing_account_id = a.id) AS charged_nanos
FROM billing_accounts AS a
JOIN users AS u ON u.id = a.owner_user_id
WHERE a.id = $1
"""


async def find_account(conn: Connection, account_id: UUID) -> dict[str, Any] | None:
    """An account with its sums."""
    async with translated():
        row = await conn.fetchrow(SELECT_ACCOUNT_OVERVIEW, account_id)
    return None if row is None else dict(row)
