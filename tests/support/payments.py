"""Payments without a chain: transfers as a verifier would hand them over, and who they are from."""

import secrets
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from billing import book
from billing.audit import audit
from billing.book import Pool
from billing.chain.transfer import Transfer
from billing.payment_attempts import Terms, create_intent, submit
from billing.payments import Settlement, credit_transfer, reverse_transfer
from tests.support.books import check_book

CHAIN = 8453
TOKEN = "0x833589fcd6edb6e08f4c7c32d4f71b54bda02913"
TREASURY = "0x" + "7e" * 20
INSERT_WALLET = """
INSERT INTO wallets (address, user_id)
SELECT $2, owner_user_id FROM billing_accounts WHERE id = $1
"""


def new_hash() -> str:
    return "0x" + secrets.token_hex(32)


def new_address() -> str:
    return "0x" + secrets.token_hex(20)


def transfer_from(sender: str, units: int = 5_000_000, **fields: Any) -> Transfer:
    """A transfer that just came."""
    values: dict[str, Any] = {
        "chain_id": CHAIN,
        "tx_hash": new_hash(),
        "ordinal": 0,
        "sender": sender,
        "units": units,
        "block_number": 100,
        "block_hash": new_hash(),
        "block_time": datetime.now(UTC),
    }
    return Transfer(**{**values, **fields})


def key_of(transfer: Transfer) -> tuple[int, str, int]:
    return transfer.chain_id, transfer.tx_hash, transfer.ordinal


async def payer(pool: Pool, wallet: str = "") -> tuple[UUID, str]:
    """An account without credit, and a wallet that it proved (as it was signed: mixed case)."""
    address = wallet or new_address()
    signed = address[:2] + address[2:].upper()
    async with book.acquire(pool) as conn:
        account_id = await book.create_account(conn, "payer")
        await conn.execute(INSERT_WALLET, account_id, signed)
    return account_id, address


async def intent(pool: Pool, account_id: UUID, cents: int = 500) -> UUID:
    terms = Terms(chain_id=CHAIN, token=TOKEN, treasury=TREASURY, amount_usd_cents=cents)
    async with book.acquire(pool) as conn:
        return await create_intent(conn, account_id, terms)


async def submitted(pool: Pool, account_id: UUID, tx_hash: str, cents: int = 500) -> UUID:
    """An attempt that waits for a transaction."""
    attempt_id = await intent(pool, account_id, cents)
    async with book.acquire(pool) as conn:
        assert await submit(conn, account_id, attempt_id, tx_hash) == "submitted"
    return attempt_id


LEDGER = """
SELECT reason, reference, amount_nanos
FROM credit_ledger
WHERE billing_account_id = $1
ORDER BY seq
"""


async def ledger(pool: Pool, account_id: UUID) -> list[tuple[str, str, int]]:
    return [tuple(row) for row in await pool.fetch(LEDGER, account_id)]


async def status(pool: Pool, attempt_id: UUID) -> str:
    found = await pool.fetchval("SELECT status FROM payment_attempts WHERE id = $1", attempt_id)
    assert isinstance(found, str)
    return found


async def posted(pool: Pool, account_id: UUID) -> int:
    async with book.acquire(pool) as conn:
        return (await book.read_account(conn, account_id)).balance_nanos


async def credit(pool: Pool, transfer: Transfer, **ruling: Any) -> Settlement:
    async with book.acquire(pool) as conn:
        return await credit_transfer(conn, transfer, **ruling)


async def reverse(pool: Pool, transfer: Transfer) -> Settlement:
    async with book.acquire(pool) as conn:
        return await reverse_transfer(conn, key_of(transfer), "gone")


async def state_of(pool: Pool, transfer: Transfer) -> str:
    query = "SELECT state FROM chain_transfers WHERE tx_hash = $1 AND ordinal = $2"
    return str(await pool.fetchval(query, transfer.tx_hash, transfer.ordinal))


async def check(pool: Pool) -> None:
    """The rules of the book hold, and the audit says so."""
    await check_book(pool)
    async with pool.acquire() as conn:
        report = await audit(conn, None, at_rest=None)
    assert report.is_clean, report
