"""`farebox accounts` and `farebox credits`."""

from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import click

from gateway.cli import show
from gateway.cli.context import book_connection, common, end, run, stores

LIST_MAX = 1000
REASON_MAX = 500


def read_uid(text: str) -> UUID:
    """An id given on the command line."""
    from config.ids import read_id

    try:
        return read_id(text)
    except ValueError as exc:
        end(2, str(exc))


@click.group()
def accounts() -> None:
    """Billing accounts."""


@accounts.command("create")
@click.option("--label", default="", help="What people call it.")
@common
def create_account(config: Path | None, data_dir: Path | None, as_json: bool, label: str) -> None:
    """Make a user with a billing account and its default virtual key."""

    async def work() -> UUID:
        from billing import book

        async with stores(config, data_dir) as urls, book_connection(urls.book_url) as conn:
            return await book.create_account(conn, label)

    row = {"billing_account_id": run(work()), "label": label}
    show.as_json(row) if as_json else show.pairs(row)


@accounts.command("list")
@common
def list_accounts(config: Path | None, data_dir: Path | None, as_json: bool) -> None:
    """Accounts, newest first."""

    async def work() -> list[dict[str, Any]]:
        from billing.accounts import list_accounts

        async with stores(config, data_dir) as urls, book_connection(urls.book_url) as conn:
            return await list_accounts(conn, LIST_MAX)

    rows = [{"billing_account_id": row.pop("id"), **row} for row in run(work())]
    columns = ["billing_account_id", "label", "status", "balance_nanos", "created_at"]
    show.as_json(rows) if as_json else show.table(columns, rows)


@accounts.command("show")
@click.argument("account")
@common
def show_account(account: str, config: Path | None, data_dir: Path | None, as_json: bool) -> None:
    """One account: what the book says, and what the till holds back."""

    uid = read_uid(account)

    async def work() -> dict[str, Any] | None:
        from billing import history

        async with stores(config, data_dir) as urls, book_connection(urls.book_url) as conn:
            row = await history.find_account(conn, uid)
            if row is not None:
                row.update(await _held(urls.till_url, uid, row["balance_nanos"]))
            return row

    row = run(work())
    if row is None:
        end(1, f"{account}: no such account")
    row = {"billing_account_id": row.pop("id"), **row}
    show.as_json(row) if as_json else show.pairs(row)


async def _held(till_url: str, account_id: UUID, balance_nanos: int) -> dict[str, int | None]:
    """What the till holds back of a balance; None when it does not answer."""
    from billing import till_scan
    from billing.errors import TillUnavailable

    try:
        scope = await till_scan.read_account_scope(till_url, account_id)
    except TillUnavailable:
        click.echo("farebox: the till did not answer", err=True)
        return dict.fromkeys(("held_nanos", "uncommitted_nanos", "available_nanos"))
    held = scope.held if scope is not None else 0
    uncommitted = scope.uncommitted if scope is not None else 0
    return {
        "held_nanos": held,
        "uncommitted_nanos": uncommitted,
        "available_nanos": balance_nanos - held - uncommitted,
    }


@accounts.command("freeze")
@click.argument("account")
@click.option("--reason", required=True)
@common
def freeze_account(
    account: str, reason: str, config: Path | None, data_dir: Path | None, as_json: bool
) -> None:
    """The kill switch: no request of ACCOUNT is served any more. Streams under way finish."""
    row = run(_set_status(config, data_dir, account, "frozen", reason))
    show.as_json(row) if as_json else show.pairs(row)


@accounts.command("thaw")
@click.argument("account")
@click.option("--reason", required=True)
@common
def thaw_account(
    account: str, reason: str, config: Path | None, data_dir: Path | None, as_json: bool
) -> None:
    """Serve ACCOUNT again."""
    row = run(_set_status(config, data_dir, account, "active", reason))
    show.as_json(row) if as_json else show.pairs(row)


async def _set_status(
    config: Path | None,
    data_dir: Path | None,
    account: str,
    status: Literal["active", "frozen"],
    reason: str,
) -> dict[str, Any]:
    from billing import till_scan
    from billing.accounts import set_status
    from billing.errors import TillUnavailable

    uid = read_uid(account)
    if not (1 <= len(reason) <= REASON_MAX and reason.isprintable()):
        end(2, f"--reason must have 1 to {REASON_MAX} printable characters")
    async with stores(config, data_dir) as urls, book_connection(urls.book_url) as conn:
        row = await set_status(conn, uid, status, reason)
        try:
            await till_scan.set_account_status(urls.till_url, uid, status)
        except TillUnavailable:
            click.echo("farebox: the till did not answer; it holds within 5 s", err=True)
    return {"billing_account_id": row.pop("id"), **row}


@click.group()
def credits() -> None:
    """Credits: 1 credit is $0.001."""


@credits.command("grant")
@click.argument("account")
@click.argument("amount")
@click.option("--reference", default="", help="The same reference again grants nothing.")
@click.option("--note", default="", help="Why; it stands in the ledger.")
@common
def grant_credits(
    account: str, amount: str, config: Path | None, data_dir: Path | None, **rest: Any
) -> None:
    """Give AMOUNT credits to ACCOUNT."""
    from billing.money import read_credits
    from config.ids import id_text, new_id

    try:
        nanos = read_credits(amount)
    except ValueError as exc:
        end(2, str(exc))
    if nanos <= 0:
        end(2, "a grant must be more than nothing")
    uid = read_uid(account)
    reference = rest["reference"] or f"grant_{id_text(new_id())}"

    async def work() -> Any:
        from billing import book, till_scan
        from billing.errors import TillUnavailable
        from billing.fleet import read_epoch

        async with stores(config, data_dir) as urls, book_connection(urls.book_url) as conn:
            epoch = (await read_epoch(conn)).number  # before what is told in it was read
            state = await book.grant(conn, uid, nanos, reference, rest["note"])
            try:
                await till_scan.tell_account(urls.till_url, state, epoch)
            except TillUnavailable:
                click.echo("farebox: the till did not answer; it will ask the book", err=True)
            return state

    state = run(work())
    row = {
        "billing_account_id": state.account_id,
        "granted_nanos": nanos,
        "balance_nanos": state.balance_nanos,
        "reference": reference,
    }
    show.as_json(row) if rest["as_json"] else show.pairs(row)
