"""The book's side of the audit: L1 to L5, L7 and L8 inside one snapshot of the database.

Only rows that are wrong leave Postgres, except receipts: these are streamed and priced again.
Failure: what asyncpg raises; the caller translates it.
"""

from collections.abc import AsyncIterator
from typing import Any

from billing.audit_budgets import check_spends
from billing.audit_deposits import check_deposits
from billing.audit_price import ReceiptAudit
from billing.audit_report import Check, Draft, Invariant
from billing.book import Connection
from config.clock import seconds

ROWS_AT_ONCE = 1000
STATEMENT_TIMEOUT_S = seconds(600_000)
REVOKED_GRACE_S = 5
REQUEST_ID = "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"
# Text as it is, and the same bytes as Postgres shows a bytea.
PLAINTEXT_KEY = (
    "fb_(live|test|op)_[0-9A-Za-z]{38}"
    "|66625f(6c697665|74657374|6f70)5f(3[0-9]|4[1-9a-f]|5[0-9a]|6[1-9a-f]|7[0-9a]){38}"
)


async def check_book(conn: Connection, draft: Draft) -> None:
    """All of it, in the transaction that conn is in."""
    await _check_ledger(conn, draft[Invariant.LEDGER])
    await _check_balances(conn, draft[Invariant.LEDGER])
    await _check_charges(conn, draft[Invariant.CHARGES])
    await _check_adjustments(conn, draft[Invariant.CHARGES])
    await check_spends(conn, draft[Invariant.CHARGES])
    await _check_references(conn, draft[Invariant.CHARGES])
    await check_deposits(conn, draft)
    await _check_receipts(conn, draft)
    await _check_revoked(conn, draft[Invariant.KEYS])
    await _check_plaintext(conn, draft[Invariant.KEYS])


async def _rows(conn: Connection, query: str, *args: object) -> AsyncIterator[Any]:
    cursor = conn.cursor(query, *args, prefetch=ROWS_AT_ONCE, timeout=STATEMENT_TIMEOUT_S)
    async for row in cursor:
        yield row


COUNT_LEDGER = "SELECT count(*) FROM credit_ledger"
# numeric: a corrupt balance may be anything that fits a bigint.
SELECT_LEDGER_BREAKS = """
SELECT
    billing_account_id, seq, reason, reference, balance_before_nanos, amount_nanos,
    balance_after_nanos, seq_before, after_before
FROM (
    SELECT
        billing_account_id, seq, reason, reference,
        balance_before_nanos, amount_nanos, balance_after_nanos,
        coalesce(lag(seq) OVER w, 0) AS seq_before,
        coalesce(lag(balance_after_nanos) OVER w, 0) AS after_before
    FROM credit_ledger
    WINDOW w AS (PARTITION BY billing_account_id ORDER BY seq)
) AS l
WHERE seq <> seq_before + 1
   OR balance_before_nanos <> after_before
   OR balance_after_nanos <> after_before::numeric + amount_nanos
   OR abs(balance_after_nanos::numeric) > 9007199254740991
   OR amount_nanos = 0
   OR (reason = 'charge' AND amount_nanos > 0)
   OR (reason IN ('grant', 'deposit') AND amount_nanos < 0)
"""


async def _check_ledger(conn: Connection, check: Check) -> None:
    check.checked += await conn.fetchval(COUNT_LEDGER, timeout=STATEMENT_TIMEOUT_S)
    async for row in _rows(conn, SELECT_LEDGER_BREAKS):
        before, amount = row["after_before"], row["amount_nanos"]
        if row["seq"] != row["seq_before"] + 1:
            said = ("seq", row["seq_before"] + 1, row["seq"])
        elif row["balance_before_nanos"] != before:
            said = ("balance before", before, row["balance_before_nanos"])
        elif row["balance_after_nanos"] != before + amount:
            said = ("balance after", before + amount, row["balance_after_nanos"])
        else:
            said = (f"amount or size of a {row['reason']}", "one that the book takes", amount)
        ids = {"billing_account_id": row["billing_account_id"], "reference": row["reference"]}
        check.add(*said, **ids, seq=row["seq"])


# A ledger without its account shows as well.
SELECT_WRONG_BALANCES = """
SELECT
    coalesce(a.id, l.billing_account_id) AS id, a.balance_nanos, a.version,
    coalesce(l.seq, 0) AS seq, coalesce(l.balance_after_nanos, 0) AS balance_after_nanos
FROM billing_accounts AS a
FULL JOIN (
    SELECT DISTINCT ON (billing_account_id) billing_account_id, seq, balance_after_nanos
    FROM credit_ledger
    ORDER BY billing_account_id, seq DESC
) AS l ON l.billing_account_id = a.id
WHERE a.balance_nanos IS DISTINCT FROM coalesce(l.balance_after_nanos, 0)
   OR a.version IS DISTINCT FROM coalesce(l.seq, 0)
"""


async def _check_balances(conn: Connection, check: Check) -> None:
    async for row in _rows(conn, SELECT_WRONG_BALANCES):
        account_id = row["id"]
        if row["version"] is None:
            check.add("ledger without an account", "an account", "none", account=account_id)
            continue
        balance_there, balance = row["balance_after_nanos"], row["balance_nanos"]
        drift = balance_drift(row)
        if row["version"] != row["seq"]:
            said = ("version of the account", row["seq"], row["version"])
        else:
            said = ("balance of the account", balance_there, balance)
        check.add_drift(drift, *said, billing_account_id=account_id)


def balance_drift(row: Any) -> int:
    """How far a balance is from its ledger; one nano when only the version is wrong."""
    apart: int = abs(row["balance_nanos"] - row["balance_after_nanos"])
    return max(apart, int(row["version"] != row["seq"]))


SELECT_WRONG_CHARGES = """
SELECT
    r.request_id, c.reference, coalesce(r.billing_account_id, c.account_id) AS account_id,
    r.price_nanos, c.amount_nanos, coalesce(c.rows_there, 0) AS rows_there
FROM charge_receipts AS r
FULL JOIN (
    SELECT
        reference, count(*) AS rows_there,
        min(amount_nanos) AS amount_nanos,
        (array_agg(billing_account_id))[1] AS account_id,
        (array_agg(virtual_key_id))[1] AS virtual_key_id,
        (array_agg(app_key_id))[1] AS app_key_id
    FROM credit_ledger
    WHERE reason = 'charge'
    GROUP BY reference
) AS c ON c.reference = r.request_id::text
WHERE r.request_id IS NULL
   OR coalesce(c.rows_there, 0) <> CASE WHEN r.price_nanos > 0 THEN 1 ELSE 0 END
   OR (c.reference IS NOT NULL AND (
          c.amount_nanos <> -r.price_nanos::numeric
       OR c.account_id <> r.billing_account_id
       OR c.virtual_key_id IS DISTINCT FROM r.virtual_key_id
       OR c.app_key_id IS DISTINCT FROM r.app_key_id))
"""


async def _check_charges(conn: Connection, check: Check) -> None:
    async for row in _rows(conn, SELECT_WRONG_CHARGES):
        ids = {"request_id": row["request_id"], "billing_account_id": row["account_id"]}
        price, amount = row["price_nanos"], row["amount_nanos"]
        if row["request_id"] is None:
            check.add("charge without a receipt", "a receipt", "none", reference=row["reference"])
        elif row["rows_there"] != (price > 0):
            check.add("ledger rows of a receipt", int(price > 0), row["rows_there"], **ids)
        elif amount != -price:
            check.add("amount of the charge", -price, amount, **ids)
        else:
            check.add("who was charged", "account and keys of the receipt", "others", **ids)


# A reference that is a request id was written for a worker that a sweeper had taken for dead;
# corrections by hand are called something else.
SELECT_WRONG_ADJUSTMENTS = """
SELECT
    a.reference, a.account_id, a.rows_there, a.amount_nanos,
    r.request_id, r.usage_source, r.price_nanos, r.hold_nanos
FROM (
    SELECT
        reference::uuid AS reference, count(*) AS rows_there,
        sum(amount_nanos)::numeric AS amount_nanos,
        (array_agg(billing_account_id))[1] AS account_id,
        (array_agg(virtual_key_id))[1] AS virtual_key_id,
        (array_agg(app_key_id))[1] AS app_key_id
    FROM credit_ledger
    WHERE reason = 'adjust' AND reference ~ $1
    GROUP BY credit_ledger.reference
) AS a
LEFT JOIN charge_receipts AS r ON r.request_id = a.reference
WHERE r.request_id IS NULL
   OR r.usage_source <> 'checkpoint'
   OR a.rows_there > 1
   OR r.price_nanos - a.amount_nanos NOT BETWEEN 0 AND r.hold_nanos
   OR a.account_id <> r.billing_account_id
   OR a.virtual_key_id IS DISTINCT FROM r.virtual_key_id
   OR a.app_key_id IS DISTINCT FROM r.app_key_id
"""


async def _check_adjustments(conn: Connection, check: Check) -> None:
    async for row in _rows(conn, SELECT_WRONG_ADJUSTMENTS, REQUEST_ID):
        ids = {"request_id": row["reference"], "billing_account_id": row["account_id"]}
        if row["request_id"] is None:
            check.add("adjustment without a receipt", "a receipt", "none", **ids)
            continue
        paid, hold = row["price_nanos"] - int(row["amount_nanos"]), row["hold_nanos"]
        if row["usage_source"] != "checkpoint":
            found = row["usage_source"]
            check.add("adjustment of what nobody guessed", "checkpoint", found, **ids)
        elif row["rows_there"] > 1:
            check.add("adjustments of a receipt", "at most 1", row["rows_there"], **ids)
        elif not 0 <= paid <= hold:
            check.add("paid after the adjustment", f"0 to {hold}", paid, **ids)
        else:
            check.add("who was adjusted", "account and keys of the receipt", "others", **ids)


COUNT_RECEIPTS = "SELECT count(*) FROM charge_receipts"
SELECT_REPEATED = """
SELECT 'ledger rows of one reference' AS what, reason || ' ' || reference AS reference, count(*)
FROM credit_ledger
WHERE reason <> 'charge'
GROUP BY reason, reference
HAVING count(*) > 1
UNION ALL
SELECT 'receipts of one request', source_system || ' ' || source_reference, count(*)
FROM charge_receipts
GROUP BY source_system, source_reference
HAVING count(*) > 1
UNION ALL
SELECT 'receipts of one id', request_id::text, count(*)
FROM charge_receipts
GROUP BY request_id
HAVING count(*) > 1
"""


async def _check_references(conn: Connection, check: Check) -> None:
    check.checked += await conn.fetchval(COUNT_RECEIPTS, timeout=STATEMENT_TIMEOUT_S)
    async for row in _rows(conn, SELECT_REPEATED):
        check.add(row["what"], 1, row["count"], reference=row["reference"])


SELECT_RECEIPTS_PRICED = """
SELECT
    r.request_id, r.billing_account_id, r.requested_model,
    r.input_tokens, r.output_tokens, r.cached_tokens, r.cache_write_tokens,
    r.reasoning_tokens, r.audio_input_tokens, r.audio_output_tokens,
    r.reported_cost_usd, r.provider_cost_nanos, r.price_nanos, r.markup_bps, r.price_version,
    r.hold_nanos, r.overrun_nanos, r.cost_source, r.usage_source, r.outcome, r.posted_at,
    r.posted_at > now() - interval '7 days' AS is_recent,
    p.model, p.effective_from, p.input_rate, p.output_rate, p.cached_input_rate,
    p.cache_write_rate, p.reasoning_rate, p.audio_input_rate, p.audio_output_rate
FROM charge_receipts AS r
LEFT JOIN model_prices AS p ON p.price_version = r.price_version
"""


async def _check_receipts(conn: Connection, draft: Draft) -> None:
    receipts = ReceiptAudit(draft)
    async for row in _rows(conn, SELECT_RECEIPTS_PRICED):
        receipts.look_at(row)
    receipts.finish()


COUNT_KEYS = "SELECT count(*) FROM app_api_keys"
SELECT_AFTER_REVOCATION = """
SELECT r.request_id, r.app_key_id, r.started_at, k.revoked_at
FROM charge_receipts AS r
JOIN app_api_keys AS k ON k.id = r.app_key_id
WHERE r.started_at > k.revoked_at + make_interval(secs => $1::integer)
"""


async def _check_revoked(conn: Connection, check: Check) -> None:
    check.checked += await conn.fetchval(COUNT_KEYS, timeout=STATEMENT_TIMEOUT_S)
    async for row in _rows(conn, SELECT_AFTER_REVOCATION, REVOKED_GRACE_S):
        ids = {"request_id": row["request_id"], "app_key_id": row["app_key_id"]}
        expected = f"started before {row['revoked_at']} + {REVOKED_GRACE_S} s"
        check.add("request of a revoked key", expected, row["started_at"], **ids)


# Names are quoted by Postgres itself: regclass and %I. One pass for each table finds whether,
# and only then each column is asked. LIKE goes first: the pattern alone takes thrice as long.
SELECT_TABLE_SEARCHES = r"""
SELECT
    c.oid AS table_id,
    format($search$
        SELECT count(*)
        FROM %s AS r
        WHERE (r.*)::text LIKE ANY (ARRAY['%%fb\_%%', '%%66625f%%']) AND (r.*)::text ~ $1
    $search$, c.oid::regclass) AS search
FROM pg_class AS c
JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'm')
  AND n.nspname <> 'information_schema'
  AND n.nspname !~ '^pg_'
  AND has_schema_privilege(n.oid, 'USAGE')
  AND has_table_privilege(c.oid, 'SELECT')
ORDER BY c.oid
"""
SELECT_COLUMN_SEARCHES = """
SELECT
    format('%s.%I', a.attrelid::regclass, a.attname) AS place,
    format('SELECT count(*) FROM %s AS r WHERE r.%I::text ~ $1', a.attrelid::regclass, a.attname)
        AS search
FROM pg_attribute AS a
WHERE a.attrelid = $1::oid AND a.attnum > 0 AND NOT a.attisdropped
ORDER BY a.attnum
"""


async def _check_plaintext(conn: Connection, check: Check) -> None:
    for table in await conn.fetch(SELECT_TABLE_SEARCHES):
        if not await _count(conn, table["search"]):
            continue
        for column in await conn.fetch(SELECT_COLUMN_SEARCHES, table["table_id"]):
            rows = await _count(conn, column["search"])
            if rows:
                place = column["place"]
                check.add("plaintext key", "no row", f"{rows} rows", column=place)


async def _count(conn: Connection, search: str) -> int:
    found = await conn.fetchval(search, PLAINTEXT_KEY, timeout=STATEMENT_TIMEOUT_S)
    assert isinstance(found, int)
    return found
