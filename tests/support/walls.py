"""Two tenants with a row in every table, and logins as operators make them."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID

import asyncpg
import msgspec

from billing import book
from billing.payment_attempts import Terms, create_intent, submit
from billing.payments import credit_transfer
from billing.posting import post_receipts
from billing.roles import REQUEST, WORKER
from config.ids import new_id
from tests.support.books import Account, make_account, open_pool
from tests.support.payments import (
    CHAIN,
    INSERT_WALLET,
    TOKEN,
    TREASURY,
    new_address,
    transfer_from,
)

PASSWORD = "of-the-tests"
# Each with what it is member of, and what else it may.
LOGINS: Mapping[str, tuple[Sequence[str], str]] = {
    "login_request": ((REQUEST,), ""),
    "login_worker": ((WORKER,), ""),
    "login_owner": ((), ""),
    "login_stranger": ((), ""),
    "login_both": ((REQUEST, WORKER), ""),
    "login_bypass": ((REQUEST, WORKER), "BYPASSRLS"),
    "login_roles": ((REQUEST,), "CREATEROLE"),
    "login_super": ((), "SUPERUSER"),
    "login_hidden": ((REQUEST, "login_super"), "NOINHERIT"),
    "login_copies": ((WORKER,), "REPLICATION"),
    "login_reads": ((REQUEST, "pg_read_all_data"), "NOINHERIT"),
    "login_mighty": ((WORKER, "pg_write_all_data"), ""),
}
# What is a row's own, and not just its key: whose rows they are.
TENANT_TABLES = (
    "users",
    "wallets",
    "billing_accounts",
    "virtual_keys",
    "app_api_keys",
    "charge_receipts",
    "credit_ledger",
    "scope_spend",
    "idempotent_requests",
    "upstream_credentials",
    "payment_intents",
    "payment_attempts",
    "payment_events",
    "chain_transfers",
)


class Pair(msgspec.Struct, frozen=True):
    """Two tenants of one book."""

    url: str
    one: Account
    other: Account


async def make_pair(url: str) -> Pair:
    """Two tenants with rows in every table of tenants; the second has more of them."""
    async with open_pool(url, 1) as pool:
        one, other = await make_account(pool), await make_account(pool)
        for account, count in ((one, 1), (other, 2)):
            for number in range(count):
                await _add_rows(pool, account, number)
    return Pair(url, one, other)


async def _add_rows(pool: asyncpg.Pool, account: Account, number: int) -> None:
    keys = (account.virtual_key_id, account.id)
    async with book.acquire(pool) as conn:
        await post_receipts(conn, [account.receipt(1000)])
        await conn.execute(
            "INSERT INTO wallets (address, user_id)"
            " SELECT $2, owner_user_id FROM billing_accounts WHERE id = $1",
            account.id,
            f"0x{new_id().hex}{number:08x}",
        )
        await conn.execute(
            "INSERT INTO scope_spend (virtual_key_id, window_start, spent_nanos, version)"
            " VALUES ($1, $2, 7, 1) ON CONFLICT DO NOTHING",
            account.virtual_key_id,
            datetime(2026, 1, number + 1, tzinfo=UTC),
        )
        await conn.execute(
            "INSERT INTO idempotent_requests (virtual_key_id, key_digest, body_digest, request_id)"
            " VALUES ($1, $2, $2, $3)",
            account.virtual_key_id,
            bytes([number]) * 32,
            new_id(),
        )
        await add_payment(conn, account.id)
        await conn.execute(
            "INSERT INTO upstream_credentials"
            " (virtual_key_id, billing_account_id, provider, sealed) VALUES ($1, $2, $3, $4)",
            *keys,
            f"provider {number}",
            b"s" * 40,
        )


async def add_payment(conn: book.Connection, account_id: UUID) -> None:
    """An attempt with a transfer that was credited for it, and what happened to both."""
    terms = Terms(chain_id=CHAIN, token=TOKEN, treasury=TREASURY, amount_usd_cents=500)
    attempt_id = await create_intent(conn, account_id, terms)
    sender = new_address()
    await conn.execute(INSERT_WALLET, account_id, sender)
    transfer = transfer_from(sender)
    await submit(conn, account_id, attempt_id, transfer.tx_hash)
    await credit_transfer(conn, transfer)


async def make_logins(admin_url: str) -> None:
    """The logins of LOGINS, once for each cluster; no database is their own."""
    conn = await asyncpg.connect(admin_url)
    try:
        known = {row["rolname"] for row in await conn.fetch("SELECT rolname FROM pg_roles")}
        for name, (_, more) in LOGINS.items():
            if name not in known:
                await conn.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{PASSWORD}' {more}")
        for name, (groups, _) in LOGINS.items():
            if name not in known and groups:
                await conn.execute(f"GRANT {', '.join(groups)} TO {name}")
    finally:
        await conn.close()


def login_url(url: str, login: str) -> str:
    """The same database by another login."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=f"{login}:{PASSWORD}@{parts.hostname}:{parts.port}"))


@asynccontextmanager
async def acting_for(conn: asyncpg.Connection, account_id: UUID | None) -> AsyncIterator[None]:
    """A transaction that is taken back at the end, for an account or for nobody."""
    transaction = conn.transaction()
    await transaction.start()
    try:
        if account_id is not None:
            await conn.execute(book.ACT_FOR, str(account_id))
        yield
    finally:
        await transaction.rollback()


async def refused(conn: asyncpg.Connection, statement: str, *args: Any) -> bool:
    """Whether Postgres refuses the statement for want of a privilege; it leaves nothing behind."""
    transaction = conn.transaction()
    await transaction.start()
    try:
        await conn.execute(statement, *args)
    except asyncpg.InsufficientPrivilegeError:
        return True
    finally:
        await transaction.rollback()
    return False
