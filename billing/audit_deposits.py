"""L5 of the audit: deposits and reversals of the ledger are exactly what the transfers say.

Failure: what asyncpg raises; the caller translates it.
"""

from typing import Any

from billing.audit_report import Check, Draft, Invariant
from billing.book import Connection
from config.clock import seconds

STATEMENT_TIMEOUT_S = seconds(600_000)

COUNT_TRANSFERS = "SELECT count(*) FROM chain_transfers"
# One deposit for each time a transfer was credited, one reversal for each time it was taken back.
SELECT_WRONG_DEPOSITS = """
WITH wanted AS (
    SELECT
        t.chain_id || ':' || t.tx_hash || ':' || t.ordinal
            || CASE WHEN g > 0 THEN ':' || g ELSE '' END AS reference,
        t.state = 'credited' AND g = t.generation - 1 AS is_standing,
        t.nanos, t.billing_account_id
    FROM chain_transfers AS t
    CROSS JOIN LATERAL generate_series(0, t.generation - 1) AS g
),
moved AS (
    SELECT
        reference,
        count(*) FILTER (WHERE reason = 'deposit') AS deposits,
        count(*) FILTER (WHERE reason = 'reversal') AS reversals,
        coalesce(sum(amount_nanos) FILTER (WHERE reason = 'deposit'), 0)::numeric AS deposited,
        coalesce(sum(amount_nanos) FILTER (WHERE reason = 'reversal'), 0)::numeric AS reversed,
        (array_agg(billing_account_id))[1] AS account_id,
        count(DISTINCT billing_account_id) AS accounts
    FROM credit_ledger
    WHERE reason IN ('deposit', 'reversal')
    GROUP BY reference
)
SELECT
    coalesce(w.reference, m.reference) AS reference, w.reference IS NOT NULL AS has_transfer,
    coalesce(w.is_standing, false) AS is_standing, w.nanos, w.billing_account_id,
    coalesce(m.deposits, 0) AS deposits, coalesce(m.reversals, 0) AS reversals,
    coalesce(m.deposited, 0) AS deposited, coalesce(m.reversed, 0) AS reversed, m.account_id,
    coalesce(m.accounts, 0) AS accounts
FROM wanted AS w
FULL JOIN moved AS m ON m.reference = w.reference
WHERE w.reference IS NULL
   OR m.reference IS NULL
   OR m.deposits <> 1
   OR m.reversals <> CASE WHEN w.is_standing THEN 0 ELSE 1 END
   OR (m.reversals > 0 AND m.reversed <> -m.deposited)
   OR (w.is_standing AND (m.deposited <> w.nanos OR m.account_id <> w.billing_account_id))
   OR m.accounts > 1
"""
SELECT_WRONG_TRANSFERS = """
SELECT 'transfers of one key' AS what, chain_id || ':' || tx_hash || ':' || ordinal AS reference,
    1::numeric AS expected, count(*)::numeric AS found
FROM chain_transfers
GROUP BY chain_id, tx_hash, ordinal
HAVING count(*) > 1
UNION ALL
SELECT 'nanos of a transfer', chain_id || ':' || tx_hash || ':' || ordinal,
    units::numeric * 1000, nanos::numeric
FROM chain_transfers
WHERE nanos <> units::numeric * 1000
UNION ALL
SELECT 'transfers of a credited attempt', a.id::text, 1, 0
FROM payment_attempts AS a
WHERE a.status = 'CREDITED' AND NOT EXISTS (
    SELECT FROM chain_transfers AS t
    WHERE t.payment_attempt_id = a.id AND t.billing_account_id = a.billing_account_id
        AND t.generation > 0)
"""
SELECT_SUMS = """
SELECT state, count(*) AS transfers, sum(nanos)::numeric AS nanos
FROM chain_transfers
GROUP BY state
ORDER BY state
"""


async def check_deposits(conn: Connection, draft: Draft) -> None:
    """In the transaction that conn is in."""
    check = draft[Invariant.DEPOSITS]
    check.checked += await conn.fetchval(COUNT_TRANSFERS, timeout=STATEMENT_TIMEOUT_S)
    for row in await conn.fetch(SELECT_WRONG_DEPOSITS, timeout=STATEMENT_TIMEOUT_S):
        _look_at(check, row)
    for row in await conn.fetch(SELECT_WRONG_TRANSFERS, timeout=STATEMENT_TIMEOUT_S):
        check.add(row["what"], row["expected"], row["found"], reference=row["reference"])
    for row in await conn.fetch(SELECT_SUMS, timeout=STATEMENT_TIMEOUT_S):
        what = f"transfers that are {row['state']}"
        draft.note(Invariant.DEPOSITS, what, row["transfers"], int(row["nanos"]))


def _look_at(check: Check, row: Any) -> None:
    ids = {"billing_account_id": row["account_id"], "reference": row["reference"]}
    deposited, taken = int(row["deposited"]), int(row["reversed"])
    wanted_reversals = 0 if row["is_standing"] else 1
    if not row["has_transfer"]:
        kind = "deposit" if row["deposits"] else "reversal"
        drift = abs(deposited + taken)
        check.add_drift(drift, f"{kind} without a transfer", "a transfer", deposited + taken, **ids)
    elif row["deposits"] != 1:
        ids["billing_account_id"] = row["billing_account_id"]
        drift = abs(deposited - row["nanos"])
        check.add_drift(drift, "deposits of a transfer", 1, row["deposits"], **ids)
    elif row["reversals"] != wanted_reversals:
        said = ("reversals of a deposit", wanted_reversals, row["reversals"])
        check.add_drift(deposited, *said, **ids)
    elif row["is_standing"] and deposited != row["nanos"]:
        drift = abs(deposited - row["nanos"])
        check.add_drift(drift, "amount of a deposit", row["nanos"], deposited, **ids)
    elif row["reversals"] and taken != -deposited:
        drift = abs(deposited + taken)
        check.add_drift(drift, "amount of a reversal", -deposited, taken, **ids)
    else:
        check.add("who was credited", row["billing_account_id"], row["account_id"], **ids)
