"""The audit of budgets: what keys spent, in the book by the day and in the till by the window.

Failure: what asyncpg raises, inside of the book's snapshot; else BookUnavailable.
"""

from collections.abc import Sequence

from billing.audit_report import Check
from billing.book import Connection
from billing.budgets import read_windows
from billing.till_entries import Scope
from config.clock import seconds

STATEMENT_TIMEOUT_S = seconds(600_000)
ROWS_AT_ONCE = 1000
# What is wrong, what was expected, what was found.
Wrong = tuple[str, object, object]
# Of which scope, and by how many nanos.
Disagreement = tuple[Scope, Wrong, int]

# As posting writes it: what was charged or adjusted counts on the day on which its request began.
SELECT_WRONG_SPENDS = """
SELECT
    coalesce(r.virtual_key_id, s.virtual_key_id) AS virtual_key_id,
    coalesce(r.day, s.window_start) AS day,
    coalesce(r.spent_nanos, 0)::text AS spent_nanos, coalesce(r.version, 0) AS version,
    coalesce(s.spent_nanos, 0)::text AS spent_there, coalesce(s.version, 0) AS version_there
FROM (
    SELECT
        r.virtual_key_id, date_trunc('day', r.started_at, 'UTC') AS day,
        sum(r.price_nanos) - coalesce(sum(l.amount_nanos), 0) AS spent_nanos,
        count(*) FILTER (WHERE r.price_nanos > 0) + coalesce(sum(l.rows), 0) AS version
    FROM charge_receipts AS r
    LEFT JOIN (
        SELECT reference, sum(amount_nanos) AS amount_nanos, count(*) AS rows
        FROM credit_ledger
        WHERE reason = 'adjust'
        GROUP BY reference
    ) AS l ON l.reference = r.request_id::text
    GROUP BY 1, 2
) AS r
FULL JOIN scope_spend AS s ON s.virtual_key_id = r.virtual_key_id AND s.window_start = r.day
WHERE coalesce(r.spent_nanos, 0) <> coalesce(s.spent_nanos, 0)
   OR coalesce(r.version, 0) <> coalesce(s.version, 0)
"""


async def check_spends(conn: Connection, check: Check) -> None:
    """Every row of scope_spend is the sum of one key's receipts of a day, and none is missing."""
    cursor = conn.cursor(SELECT_WRONG_SPENDS, prefetch=ROWS_AT_ONCE, timeout=STATEMENT_TIMEOUT_S)
    async for row in cursor:
        ids = {"virtual_key_id": row["virtual_key_id"], "day": f"{row['day']:%Y-%m-%d}"}
        if row["spent_nanos"] != row["spent_there"]:
            check.add("spent on a day", row["spent_nanos"], row["spent_there"], **ids)
        else:
            check.add("version of a day", row["version"], row["version_there"], **ids)


async def budgets_against_book(
    conn: Connection, told: Sequence[Scope]
) -> tuple[list[Disagreement], int]:
    """What is wrong of which budget and by how many nanos; how many are behind the book.

    To be behind is allowed; what the book said then is not known any more.
    """
    wrong: list[Disagreement] = []
    behind = 0
    known = [(scope, scope.budget) for scope in told if scope.budget is not None]
    states = await read_windows(conn, [budget for _, budget in known]) if known else []
    for (scope, _), state in zip(known, states, strict=True):
        version, drift = scope.version or 0, max(apart(state.spent_nanos, scope.posted), 1)
        if not 0 <= version <= state.version:
            said: Wrong = ("version ahead of the book", f"<= {state.version}", version)
            wrong.append((scope, said, drift))
        elif version < state.version:
            behind += 1
        elif scope.posted != state.spent_nanos:
            said = (f"spent at version {version}", state.spent_nanos, scope.posted)
            wrong.append((scope, said, drift))
    return wrong, behind


def apart(expected: object, found: object) -> int:
    """By how many nanos two amounts differ; what is not there counts as nothing."""
    first, second = (n if isinstance(n, int) else 0 for n in (expected, found))
    return abs(first - second)
