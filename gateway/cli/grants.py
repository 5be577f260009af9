"""`farebox grants`: credentials for one execution. People mint their own over HTTP."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from gateway.cli import show
from gateway.cli.accounts import LIST_MAX, read_uid
from gateway.cli.context import book_connection, common, end, pepper_of, run, stores, verb_config

COLUMNS = ["grant_id", "name", "key", "status", "spent_nanos", "budget_nanos", "expires_at"]


@click.group()
def grants() -> None:
    """Execution grants: keys that end, with a budget and a run of their own."""


@grants.command("create")
@click.option("--account", required=True)
@click.option("--budget", required=True, help="Credits, for all of its life.")
@click.option("--expires-at", required=True, help="RFC 3339; in 30 days at most.")
@click.option("--name", default="grant", show_default=True)
@click.option("--model", "models", multiple=True, help="Only this one; repeatable.")
@click.option("--run-id", default=None, help="Stands on its receipts.")
@click.option("--graph-id", default=None, help="Stands on its receipts.")
@common
def create_grant(
    config: Path | None, data_dir: Path | None, as_json: bool, account: str, **rest: Any
) -> None:
    """Mint a grant. Its secret is shown now and never again."""
    uid = read_uid(account)
    settings = verb_config(config, data_dir).settings
    pepper = pepper_of(config, data_dir)
    try:
        terms = _read_terms(settings, rest)
    except ValueError as exc:
        end(2, str(exc))

    async def work() -> Any:
        from keys import grants_store
        from keys.errors import KeyNotFound

        open_max = settings.limits.open_grants_per_account
        async with stores(config, data_dir) as urls, book_connection(urls.book_url) as conn:
            try:
                return await grants_store.create_grant(
                    conn, uid, terms, pepper=pepper, open_max=open_max
                )
            except KeyNotFound:
                end(1, f"{account}: no such account")

    record, new = run(work())
    row = {**_row(record), "api_key": new.secret}
    show.as_json(row) if as_json else show.pairs(row)


@grants.command("list")
@click.option("--account", required=True)
@common
def list_grants(config: Path | None, data_dir: Path | None, as_json: bool, account: str) -> None:
    """An account's grants without their secrets, newest first, ended ones too."""
    uid = read_uid(account)

    async def work() -> Any:
        from keys import grants_store

        async with stores(config, data_dir) as urls, book_connection(urls.book_url) as conn:
            return await grants_store.list_grants(conn, uid, LIST_MAX)

    rows = [_row(record) for record in run(work())]
    show.as_json(rows) if as_json else show.table(COLUMNS, rows)


@grants.command("revoke")
@click.argument("grant")
@common
def revoke_grant(grant: str, config: Path | None, data_dir: Path | None, as_json: bool) -> None:
    """Revoke a grant for good; it is refused everywhere within 5 seconds."""
    uid = read_uid(grant)

    async def work() -> Any:
        from billing import till_scan
        from billing.errors import TillUnavailable
        from keys import grants_store
        from keys.errors import KeyNotFound

        async with stores(config, data_dir) as urls, book_connection(urls.book_url) as conn:
            try:
                account_id = await grants_store.owner_of_grant(conn, uid)
            except KeyNotFound:
                end(1, f"{grant}: no such grant")
            record = await grants_store.revoke_grant(conn, account_id, uid)
            try:
                await till_scan.set_key_status(urls.till_url, account_id, uid, "revoked")
            except TillUnavailable:
                click.echo("farebox: the till did not answer; the grant ends within 5 s", err=True)
            return record

    row = _row(run(work()))
    show.as_json(row) if as_json else show.pairs(row)


def _read_terms(settings: Any, rest: dict[str, Any]) -> Any:
    """Raises ValueError."""
    from billing.money import read_credits
    from gateway.cli.keys import read_expiry
    from keys.grants_store import GrantTerms, check_expiry

    expires_at = read_expiry(rest["expires_at"])
    if expires_at is None:
        raise ValueError("--expires-at is missing")
    check_expiry(expires_at, datetime.now(UTC))
    nanos = read_credits(rest["budget"])
    if nanos <= 0:
        raise ValueError("a budget must be more than nothing")
    for model in rest["models"]:
        if model not in settings.models:
            raise ValueError(f"{model}: no such model")
    return GrantTerms(
        name=_read_text("--name", rest["name"]) or "grant",
        kind=settings.keys.mode,
        expires_at=expires_at,
        budget_nanos=nanos,
        models=tuple(dict.fromkeys(rest["models"])) or None,
        run_id=_read_text("--run-id", rest["run_id"]),
        graph_id=_read_text("--graph-id", rest["graph_id"]),
    )


def _read_text(option: str, text: str | None) -> str | None:
    from keys.grants_store import TEXT_MAX

    if text is not None and not (1 <= len(text) <= TEXT_MAX and text.isprintable()):
        raise ValueError(f"{option} must have 1 to {TEXT_MAX} printable characters")
    return text


def _row(record: Any) -> dict[str, Any]:
    return {
        "grant_id": record.id,
        "billing_account_id": record.billing_account_id,
        "name": record.name,
        "key": record.hint,
        "status": record.state(datetime.now(UTC)),
        "budget_nanos": record.budget_nanos,
        "spent_nanos": record.spent_nanos,
        "models": record.models,
        "run_id": record.run_id,
        "graph_id": record.graph_id,
        "created_at": record.created_at,
        "expires_at": record.expires_at,
        "revoked_at": record.revoked_at,
    }
