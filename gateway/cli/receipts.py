"""`farebox receipts`: what was charged, and why."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gateway.cli import show
from gateway.cli.accounts import read_uid
from gateway.cli.context import book_connection, common, end, run, stores

if TYPE_CHECKING:
    from billing.receipts import FailedAttempt

COLUMNS = [
    "request_id",
    "started_at",
    "requested_model",
    "outcome",
    "usage_source",
    "input_tokens",
    "output_tokens",
    "provider_cost_nanos",
    "price_nanos",
]


@click.group()
def receipts() -> None:
    """Charge receipts: one for each admitted request."""


@receipts.command("list")
@click.option("--account", default="", help="Only this account's.")
@click.option("--before", default="", help="Older than this receipt (the last of a page).")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
@common
def list_receipts(
    config: Path | None, data_dir: Path | None, as_json: bool, account: str, **rest: Any
) -> None:
    """Newest first."""

    account_id = read_uid(account) if account else None
    before = read_uid(rest["before"]) if rest["before"] else None

    async def work() -> list[dict[str, Any]]:
        from billing import history

        async with stores(config, data_dir) as urls, book_connection(urls.book_url) as conn:
            return await history.list_receipts(conn, account_id, before, rest["limit"])

    rows = run(work())
    show.as_json(rows) if as_json else show.table(COLUMNS, rows)


@receipts.command("show")
@click.argument("receipt")
@common
def show_receipt(receipt: str, config: Path | None, data_dir: Path | None, as_json: bool) -> None:
    """Everything about one receipt, with its ledger row."""
    uid = read_uid(receipt)

    async def work() -> Any:
        from billing import history

        async with stores(config, data_dir) as urls, book_connection(urls.book_url) as conn:
            return await history.find_receipt(conn, uid), await history.find_ledger_row(conn, uid)

    row, ledger = run(work())
    if row is None:
        end(1, f"{receipt}: no such receipt")
    if as_json:
        show.as_json({**row, "ledger": ledger})
        return
    show.pairs(for_people(row, ledger))


def for_people(row: Mapping[str, Any], ledger: Mapping[str, Any] | None) -> dict[str, Any]:
    """A line for each failed attempt and for each field of the ledger row."""
    failed = row["failed_attempts"]
    shown = {name: value for name, value in row.items() if name != "failed_attempts"}
    shown |= {f"failed_attempt_{number}": _told(one) for number, one in enumerate(failed, 1)}
    return shown | {f"ledger_{name}": value for name, value in (ledger or {}).items()}


def _told(attempt: "FailedAttempt") -> str:
    answer = "no answer" if attempt.status is None else f"HTTP {attempt.status}"
    where = f"{attempt.provider} ({attempt.upstream_model})"
    return f"{where}: {attempt.reason}, {answer}, {attempt.ms} ms"
