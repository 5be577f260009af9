"""`farebox payments`: attempts, and the transfers that the chain has."""

from pathlib import Path
from typing import Any

import click

from gateway.cli import show
from gateway.cli.accounts import LIST_MAX, read_uid
from gateway.cli.context import book_connection, common, end, run, stores

ATTEMPTS = [
    *("payment_attempt_id", "billing_account_id", "status", "error_code", "amount_usd_cents"),
    *("credited_nanos", "tx_hash", "created_at"),
]
TRANSFERS = [
    *("tx_hash", "ordinal", "chain_id", "sender", "amount_nanos", "state", "suspense_reason"),
    *("billing_account_id", "seen_at"),
]


@click.group()
def payments() -> None:
    """USDC that was asked for, and that came."""


@payments.command("list")
@click.option("--account", default=None, help="Of this account only.")
@click.option("--suspense", is_flag=True, help="Transfers that were credited to nobody.")
@common
def list_payments(
    account: str | None,
    suspense: bool,
    config: Path | None,
    data_dir: Path | None,
    as_json: bool,
) -> None:
    """Payment attempts, newest first; or what waits in suspense."""
    uid = None if account is None else read_uid(account)

    async def work() -> Any:
        from billing.payment_attempts import list_attempts
        from billing.payment_states import TransferState
        from billing.payments_store import list_transfers

        async with stores(config, data_dir) as urls, book_connection(urls.book_url) as conn:
            if suspense:
                return await list_transfers(conn, TransferState.SUSPENSE, LIST_MAX)
            return await list_attempts(conn, uid, LIST_MAX)

    make_row = _transfer if suspense else _attempt
    rows = [make_row(each) for each in run(work())]
    columns = TRANSFERS if suspense else ATTEMPTS
    show.as_json(rows) if as_json else show.table(columns, rows)


@payments.command("show")
@click.argument("payment")
@common
def show_payment(payment: str, config: Path | None, data_dir: Path | None, as_json: bool) -> None:
    """An attempt (pay_...) with its transfers and events; or a transaction (0x...)."""
    is_hash = payment.lower().startswith("0x")
    uid = None if is_hash else read_uid(payment)

    async def work() -> dict[str, Any]:
        from billing import payment_attempts
        from billing.errors import PaymentNotFound
        from billing.payments_store import transfers_of_hash

        async with stores(config, data_dir) as urls, book_connection(urls.book_url) as conn:
            if uid is None:
                found = await transfers_of_hash(conn, payment.lower())
                return {"transfers": [_transfer(row) for row in found]}
            try:
                record = await payment_attempts.find_attempt(conn, None, uid)
            except PaymentNotFound:
                end(1, f"{payment}: no such payment attempt")
            transfers = await payment_attempts.transfers_of(conn, uid)
            events = await payment_attempts.events_of(conn, uid)
        shown = [{**row, "amount_nanos": row.pop("nanos")} for row in transfers]
        return {**_attempt(record), "transfers": shown, "events": events}

    found = run(work())
    if is_hash and not found["transfers"]:
        end(1, f"{payment}: no such transfer")
    show.as_json(found)


def _attempt(record: Any) -> dict[str, Any]:
    from billing.chain.transfer import NANOS_PER_UNIT

    return {
        "payment_attempt_id": record.id,
        "billing_account_id": record.billing_account_id,
        "status": record.status,
        "error_code": record.error_code,
        "checked_code": record.checked_code,
        "chain_id": record.chain_id,
        "amount_usd_cents": record.amount_usd_cents,
        "credited_nanos": record.credited_units * NANOS_PER_UNIT,
        "tx_hash": record.tx_hash,
        "created_at": record.created_at,
        "expires_at": record.expires_at,
        "submitted_at": record.submitted_at,
        "ended_at": record.ended_at,
    }


def _transfer(row: dict[str, Any]) -> dict[str, Any]:
    shown = dict(row)
    shown["amount_nanos"] = shown.pop("nanos")
    return shown
