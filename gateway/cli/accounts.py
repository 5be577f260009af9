"""`farebox accounts`, `farebox credits` and `farebox keys`."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import click

from gateway.cli import show
from gateway.cli.context import (
    book_connection,
    common,
    end,
    pepper_of,
    run,
    stores,
    verb_config,
)

LIST_MAX = 1000
KEY_NAME_MAX = 200


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
    """All accounts."""

    async def work() -> list[dict[str, Any]]:
        from billing import history

        async with stores(config, data_dir) as urls, book_connection(urls.book_url) as conn:
            return await history.list_accounts(conn, LIST_MAX)

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


@click.group()
def keys() -> None:
    """API keys."""


@keys.command("create")
@click.option("--account", required=True)
@click.option("--name", required=True)
@click.option("--expires-at", default="", help="RFC 3339, for example 2027-01-31T00:00:00Z.")
@click.option("--open-requests-max", type=click.IntRange(1), default=None)
@common
def create_key(
    config: Path | None, data_dir: Path | None, as_json: bool, account: str, **rest: Any
) -> None:
    """Make a key. Its secret is shown now and never again."""
    from keys.principal import Limits
    from keys.store import KeyTerms

    uid = read_uid(account)
    mode = verb_config(config, data_dir).settings.keys.mode
    pepper = pepper_of(config, data_dir)
    if not 1 <= len(rest["name"]) <= KEY_NAME_MAX:
        end(2, f"--name must have 1 to {KEY_NAME_MAX} characters")
    terms = KeyTerms(
        name=rest["name"],
        kind=mode,
        expires_at=_read_time(rest["expires_at"]),
        limits=Limits(open_requests=rest["open_requests_max"]),
    )

    async def work() -> Any:
        from keys import store
        from keys.errors import KeyNotFound

        async with stores(config, data_dir) as urls, book_connection(urls.book_url) as conn:
            try:
                return await store.create_key(conn, uid, terms, pepper=pepper)
            except KeyNotFound:
                end(1, f"{account}: no such account")

    key_id, new = run(work())
    row = {"app_key_id": key_id, "name": terms.name, "api_key": new.secret}
    show.as_json(row) if as_json else show.pairs(row)


@keys.command("list")
@click.option("--account", default="", help="Only this account's.")
@common
def list_keys(config: Path | None, data_dir: Path | None, as_json: bool, account: str) -> None:
    """Keys, without their secrets."""

    account_id = read_uid(account) if account else None

    async def work() -> Any:
        from keys import store

        async with stores(config, data_dir) as urls, book_connection(urls.book_url) as conn:
            return await store.list_keys(conn, account_id, LIST_MAX)

    rows = [_key_row(record) for record in run(work())]
    columns = ["app_key_id", "name", "key", "status", "created_at", "expires_at"]
    show.as_json(rows) if as_json else show.table(columns, rows)


@keys.command("revoke")
@click.argument("key")
@common
def revoke_key(key: str, config: Path | None, data_dir: Path | None, as_json: bool) -> None:
    """Revoke a key for good; it is refused everywhere within 5 seconds."""
    uid = read_uid(key)

    async def work() -> Any:
        from billing import till_scan
        from billing.errors import TillUnavailable
        from keys import store

        async with stores(config, data_dir) as urls, book_connection(urls.book_url) as conn:
            record = await store.revoke_key(conn, uid)
            account_id, key_id = record.billing_account_id, record.id
            try:
                await till_scan.set_key_status(urls.till_url, account_id, key_id, "revoked")
            except TillUnavailable:
                click.echo("farebox: the till did not answer; the key ends within 5 s", err=True)
            return record

    row = _key_row(run(work()))
    show.as_json(row) if as_json else show.pairs(row)


def _key_row(record: Any) -> dict[str, Any]:
    return {
        "app_key_id": record.id,
        "billing_account_id": record.billing_account_id,
        "name": record.name,
        "key": f"{record.prefix}...{record.last4}",
        "status": record.status,
        "created_at": record.created_at,
        "expires_at": record.expires_at,
        "revoked_at": record.revoked_at,
    }


def _read_time(text: str) -> datetime | None:
    if not text:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        end(2, f"{text!r} is no RFC 3339 time")
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
