"""What virtual keys spent in the windows of their budgets, by the book.

`scope_spend` has one row for each virtual key and day; posting.py writes it in the commit that
posts the receipts. A window is the sum of its days, its version the sum of their versions: these
only grow, so equal versions mean equal sums.
Failure: BookUnavailable.
"""

from collections.abc import Iterable, Mapping, Sequence

from billing.book import Connection, translated
from billing.till_epoch import SpendState
from billing.till_scopes import BudgetScope, SpendScopes

# More than the till can count was spent all the same: it leaves nothing of any budget.
SELECT_WINDOWS = """
SELECT
    least(coalesce(sum(s.spent_nanos), 0), 9007199254740991)::bigint AS spent_nanos,
    coalesce(sum(s.version), 0)::bigint AS version
FROM unnest($1::uuid[], $2::timestamptz[], $3::timestamptz[])
    WITH ORDINALITY AS w (virtual_key_id, starts_at, ends_at, place)
LEFT JOIN scope_spend AS s ON s.virtual_key_id = w.virtual_key_id
    AND s.window_start >= w.starts_at AND (w.ends_at IS NULL OR s.window_start < w.ends_at)
GROUP BY w.place
ORDER BY w.place
"""


async def read_windows(conn: Connection, budgets: Sequence[BudgetScope]) -> list[SpendState]:
    """The state of each of these windows, all of one moment."""
    keys = [budget.virtual_key_id for budget in budgets]
    starts = [budget.starts_at for budget in budgets]
    ends = [budget.ends_at for budget in budgets]
    async with translated():
        rows = await conn.fetch(SELECT_WINDOWS, keys, starts, ends)
    return [SpendState(spent_nanos=spent, version=version) for spent, version in rows]


async def read_budgets(conn: Connection, scopes: Iterable[SpendScopes]) -> Mapping[str, SpendState]:
    """The state of every budget among these scopes, by its key in the till."""
    wanted = {one.scope_keys[-1]: one.budget for one in scopes if one.budget is not None}
    if not wanted:
        return {}
    return dict(zip(wanted, await read_windows(conn, list(wanted.values())), strict=True))
