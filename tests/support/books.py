"""A book without a gateway: accounts with keys and prices, and the rules that always hold."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import msgspec

from billing import book
from billing.book import Pool
from billing.prices import CostSource
from billing.receipts import ChargeReceipt, Outcome, Provenance
from billing.till_scopes import BudgetScope, SpendScopes, spend_scopes
from billing.windows import BEGINNING
from config.ids import id_text, new_id
from keys.store import KeyTerms, create_key

PEPPER = b"p" * 32


class Account(msgspec.Struct, frozen=True):
    """An account and one of its keys."""

    id: UUID
    virtual_key_id: UUID
    app_key_id: UUID
    secret: str
    limit: int | None = None
    """What its key may spend in all."""

    @property
    def scopes(self) -> SpendScopes:
        budget = None
        if self.limit is not None:
            budget = BudgetScope(
                virtual_key_id=self.virtual_key_id,
                window="total",
                starts_at=BEGINNING,
                limit_nanos=self.limit,
            )
        return spend_scopes(self.id, self.app_key_id, budget=budget)

    def receipt(self, price: int = 0, **fields: Any) -> ChargeReceipt:
        """A receipt that every constraint accepts."""
        uid = fields.pop("request_id", None) or new_id()
        now = datetime.now(UTC)
        values: dict[str, Any] = {
            "request_id": uid,
            "source_reference": id_text(uid),
            "billing_account_id": self.id,
            "virtual_key_id": self.virtual_key_id,
            "app_key_id": self.app_key_id,
            "protocol": "chat.completions",
            "provider": "test",
            "requested_model": "m",
            "reported_cost_usd": Decimal(price).scaleb(-9),
            "provider_cost_nanos": price,
            "price_nanos": price,
            "markup_bps": 10_000,
            "hold_nanos": price,
            "cost_source": CostSource.PROVIDER,
            "outcome": Outcome.COMPLETE,
            "provenance": Provenance.RESPONSE,
            "started_at": now,
            "finished_at": now,
            "budget_window": "" if self.limit is None else "total",
        }
        return ChargeReceipt(**{**values, **fields})


@asynccontextmanager
async def open_pool(url: str, size: int = 4) -> AsyncIterator[Pool]:
    pool = await book.open_pool(url, size, 5, 10_000)
    try:
        yield pool
    finally:
        await pool.close()


async def make_account(pool: Pool, nanos: int = 10**9, limit: int | None = None) -> Account:
    """An account with that much credit and one key, which may spend that much."""
    async with book.acquire(pool) as conn:
        account_id = await book.create_account(conn, "test")
        if nanos:
            await book.grant(conn, account_id, nanos, f"g_{new_id()}", "")
        key_id, key = await create_key(conn, account_id, KeyTerms(name="test"), pepper=PEPPER)
        virtual_key_id = await conn.fetchval(
            "SELECT virtual_key_id FROM app_api_keys WHERE id = $1", key_id
        )
    return Account(account_id, virtual_key_id, key_id, key.secret, limit)


BROKEN_ROWS = """
SELECT a.id
FROM billing_accounts AS a
LEFT JOIN LATERAL (
    SELECT count(*) AS rows, coalesce(max(seq), 0) AS last, coalesce(sum(amount_nanos), 0) AS total
    FROM credit_ledger AS l
    WHERE l.billing_account_id = a.id
) AS l ON true
WHERE a.version <> l.last OR l.rows <> l.last OR a.balance_nanos <> l.total
"""
UNPAIRED = """
SELECT count(*)
FROM (SELECT * FROM charge_receipts WHERE price_nanos > 0) AS r
FULL JOIN (SELECT * FROM credit_ledger WHERE reason = 'charge') AS l
    ON l.reference = r.request_id::text AND l.billing_account_id = r.billing_account_id
    AND l.amount_nanos = -r.price_nanos AND l.app_key_id = r.app_key_id
WHERE r.request_id IS NULL OR l.reference IS NULL
"""
# Every charge and adjustment, once, on the day on which its request began.
WRONG_SPENDS = """
SELECT l.virtual_key_id, l.day, l.spent, l.rows, s.spent_nanos, s.version
FROM (
    SELECT
        l.virtual_key_id, date_trunc('day', r.started_at, 'UTC') AS day,
        -sum(l.amount_nanos) AS spent, count(*) AS rows
    FROM credit_ledger AS l
    JOIN charge_receipts AS r ON r.request_id::text = l.reference
    WHERE l.reason IN ('charge', 'adjust')
    GROUP BY 1, 2
) AS l
FULL JOIN scope_spend AS s ON s.virtual_key_id = l.virtual_key_id AND s.window_start = l.day
WHERE (l.spent, l.rows) IS DISTINCT FROM (s.spent_nanos::numeric, s.version)
"""


async def check_book(pool: Pool) -> None:
    """Ledgers are gapless and sum up to balances and spends; charges and receipts pair up."""
    assert await pool.fetch(BROKEN_ROWS) == []
    assert await pool.fetchval(UNPAIRED) == 0
    assert await pool.fetch(WRONG_SPENDS) == []


async def balance(pool: Pool, account: Account) -> int:
    async with book.acquire(pool) as conn:
        return (await book.read_account(conn, account.id)).balance_nanos
