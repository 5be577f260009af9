"""`farebox keys`: what people do over HTTP with their own keys, operators do here with any."""

from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from gateway.cli import show
from gateway.cli.accounts import LIST_MAX, read_uid
from gateway.cli.context import (
    book_connection,
    common,
    end,
    pepper_of,
    peppers_of,
    run,
    stores,
    verb_config,
)

WINDOWS = ("day", "week", "month", "total")
SCOPES = ("infer", "account", "payments")
REMOVABLE = (
    *("expires-at", "budget", "rpm", "tpm", "open-requests-max"),
    *("model", "ip"),
)
NAME_MAX = 200
ONCE_KEY_MAX = 255
COLUMNS = ["app_key_id", "name", "key", "status", "created_at", "expires_at"]

Command = Callable[..., Any]


@click.group()
def keys() -> None:
    """API keys."""


def terms(command: Command) -> Command:
    """The options for what a key may do."""
    for option in reversed(
        (
            click.option("--expires-at", default=None, help="RFC 3339: 2027-01-31T00:00:00Z."),
            click.option("--budget", default=None, help="Credits that it may spend in a window."),
            click.option("--window", type=click.Choice(WINDOWS), default=None, help="Of UTC."),
            click.option("--rpm", type=click.IntRange(1), default=None, help="Requests a minute."),
            click.option("--tpm", type=click.IntRange(1), default=None, help="Tokens a minute."),
            click.option("--open-requests-max", type=click.IntRange(1), default=None),
            click.option("--model", "models", multiple=True, help="Only this one; repeatable."),
            click.option("--ip", "networks", multiple=True, help="Only from here; repeatable."),
            click.option("--scope", "scopes", type=click.Choice(SCOPES), multiple=True),
        )
    ):
        command = option(command)
    return command


@keys.command("create")
@click.option("--account", required=True)
@click.option("--name", required=True)
@terms
@common
def create_key(
    config: Path | None, data_dir: Path | None, as_json: bool, account: str, **rest: Any
) -> None:
    """Make a key. Its secret is shown now and never again."""
    from keys.store import KeyTerms

    uid = read_uid(account)
    settings = verb_config(config, data_dir).settings
    pepper = pepper_of(config, data_dir)
    wanted = _read_terms(settings.models, rest)
    limits = _limits_of(wanted)
    key_terms = KeyTerms(kind=settings.keys.mode, limits=limits, **wanted)

    async def work() -> Any:
        from keys import store
        from keys.errors import KeyNotFound

        async with stores(config, data_dir) as urls, book_connection(urls.book_url) as conn:
            try:
                return await store.create_key(conn, uid, key_terms, pepper=pepper)
            except KeyNotFound:
                end(1, f"{account}: no such account")

    key_id, new = run(work())
    row = {"app_key_id": key_id, "name": key_terms.name, "api_key": new.secret}
    show.as_json(row) if as_json else show.pairs(row)


@keys.command("list")
@click.option("--account", default="", help="Only this account's.")
@common
def list_keys(config: Path | None, data_dir: Path | None, as_json: bool, account: str) -> None:
    """Keys without their secrets, newest first."""
    account_id = read_uid(account) if account else None

    async def work() -> Any:
        from keys import keys_store

        async with stores(config, data_dir) as urls, book_connection(urls.book_url) as conn:
            if account_id is None:
                return await keys_store.list_all_keys(conn, LIST_MAX)
            return await keys_store.list_keys(conn, account_id, LIST_MAX)

    rows = [_key_row(record) for record in run(work())]
    show.as_json(rows) if as_json else show.table(COLUMNS, rows)


@keys.command("show")
@click.argument("key")
@common
def show_key(key: str, config: Path | None, data_dir: Path | None, as_json: bool) -> None:
    """One key: its limits, and what it has spent."""
    uid = read_uid(key)

    async def work() -> dict[str, Any]:
        from billing.spend import usage_of
        from keys import keys_store

        async with stores(config, data_dir) as urls, book_connection(urls.book_url) as conn:
            account_id = await keys_store.owner_of_key(conn, uid)
            record = await keys_store.find_key(conn, account_id, uid)
            usage = await usage_of(conn, account_id, record.virtual_key_id, datetime.now(UTC))
        return {
            **_key_row(record),
            "spent_today_nanos": usage.day,
            "spent_this_week_nanos": usage.week,
            "spent_this_month_nanos": usage.month,
            "spent_nanos": usage.total,
        }

    row = run(work())
    show.as_json(row) if as_json else show.pairs(row)


@keys.command("update")
@click.argument("key")
@click.option("--name", default=None)
@terms
@click.option("--remove", type=click.Choice(REMOVABLE), multiple=True, help="No such limit.")
@common
def update_key(
    key: str,
    config: Path | None,
    data_dir: Path | None,
    as_json: bool,
    remove: tuple[str, ...],
    **rest: Any,
) -> None:
    """Change a key; what is not named stays as it is. It works within 5 seconds."""
    from keys.keys_store import KeyChanges

    fields = {
        "expires-at": "expires_at",
        "rpm": "requests_per_minute",
        "tpm": "tokens_per_minute",
        "open-requests-max": "open_requests",
        "model": "models",
        "ip": "ip_allow",
    }
    uid = read_uid(key)
    wanted = _read_terms(verb_config(config, data_dir).settings.models, rest)
    wanted |= {fields.get(name, name): None for name in remove}
    changes = KeyChanges(**wanted)

    async def work(conn: Any) -> Any:
        from keys import keys_store

        account_id = await keys_store.owner_of_key(conn, uid)
        return await keys_store.update_key(conn, account_id, uid, changes)

    row = _key_row(run(_in_book(config, data_dir, work)))
    show.as_json(row) if as_json else show.pairs(row)


@keys.command("rotate")
@click.argument("key")
@click.option("--overlap-s", type=click.IntRange(0, 604_800), default=0, help="Old one works on.")
@click.option("--idempotency-key", default="", help="The same again gives the same secret.")
@common
def rotate_key(
    key: str, config: Path | None, data_dir: Path | None, as_json: bool, **rest: Any
) -> None:
    """Give a key a new secret. It is shown now; its budget and spend stay."""
    from keys.keys_store import Rotation

    uid, once_key = read_uid(key), rest["idempotency_key"]
    if len(once_key) > ONCE_KEY_MAX or not (once_key.isascii() and once_key.isprintable()):
        end(2, f"--idempotency-key must have 1 to {ONCE_KEY_MAX} printable ASCII characters")
    rotation = Rotation(
        peppers=peppers_of(config, data_dir),
        overlap_s=rest["overlap_s"],
        once_key=once_key.encode(),
    )

    async def work(conn: Any) -> Any:
        from keys import keys_store

        account_id = await keys_store.owner_of_key(conn, uid)
        return await keys_store.rotate_key(conn, account_id, uid, rotation)

    record, new = run(_in_book(config, data_dir, work))
    row = {**_key_row(record), "api_key": new.secret}
    show.as_json(row) if as_json else show.pairs(row)


@keys.command("revoke")
@click.argument("key")
@common
def revoke_key(key: str, config: Path | None, data_dir: Path | None, as_json: bool) -> None:
    """Revoke a key for good; it is refused everywhere within 5 seconds."""
    uid = read_uid(key)

    async def work() -> Any:
        from billing import till_scan
        from billing.errors import TillUnavailable
        from keys import keys_store

        async with stores(config, data_dir) as urls, book_connection(urls.book_url) as conn:
            record = await keys_store.revoke_any_key(conn, uid)
            account_id, key_id = record.billing_account_id, record.id
            try:
                await till_scan.set_key_status(urls.till_url, account_id, key_id, "revoked")
            except TillUnavailable:
                click.echo("farebox: the till did not answer; the key ends within 5 s", err=True)
            return record

    row = _key_row(run(work()))
    show.as_json(row) if as_json else show.pairs(row)


async def _in_book(
    config: Path | None, data_dir: Path | None, work: Callable[[Any], Coroutine[Any, Any, Any]]
) -> Any:
    async with stores(config, data_dir) as urls, book_connection(urls.book_url) as conn:
        return await work(conn)


def _key_row(record: Any) -> dict[str, Any]:
    budget, limits = record.budget, record.limits
    return {
        "app_key_id": record.id,
        "billing_account_id": record.billing_account_id,
        "kind": record.kind,
        "name": record.name,
        "key": record.hint,
        "status": record.status,
        "created_at": record.created_at,
        "expires_at": record.expires_at,
        "revoked_at": record.revoked_at,
        "rotated_at": record.rotated_at,
        "budget_nanos": None if budget is None else budget.nanos,
        "budget_window": None if budget is None else budget.window,
        "rpm": limits.requests_per_minute,
        "tpm": limits.tokens_per_minute,
        "open_requests_max": limits.open_requests,
        "models": record.models,
        "ip_allow": record.ip_allow,
        "scopes": record.permissions,
    }


def _limits_of(wanted: dict[str, Any]) -> Any:
    """The limits among what is wanted, taken out of it."""
    from keys.principal import Limits

    names = [name for name in Limits.__struct_fields__ if name in wanted]
    return Limits(**{name: wanted.pop(name) for name in names})


def _read_terms(known_models: Any, rest: dict[str, Any]) -> dict[str, Any]:
    """What was given, and nothing else, under the names that the store uses."""
    from keys.terms import read_networks

    models, networks = rest["models"], rest["networks"]
    for model in models:
        if model not in known_models:
            end(2, f"{model}: no such model")
    try:
        wanted = {
            "name": _read_name(rest["name"]),
            "expires_at": read_expiry(rest["expires_at"]),
            "budget": _read_budget(rest["budget"], rest["window"]),
            "requests_per_minute": rest["rpm"],
            "tokens_per_minute": rest["tpm"],
            "open_requests": rest["open_requests_max"],
            "models": tuple(dict.fromkeys(models)) or None,
            "ip_allow": read_networks(networks) or None,
            "permissions": tuple(dict.fromkeys(rest["scopes"])) or None,
        }
    except ValueError as exc:
        end(2, str(exc))
    return {name: value for name, value in wanted.items() if value is not None}


def _read_name(name: str | None) -> str | None:
    if name is not None and not (1 <= len(name) <= NAME_MAX and name.isprintable()):
        raise ValueError(f"--name must have 1 to {NAME_MAX} printable characters")
    return name


def _read_budget(credits: str | None, window: str | None) -> Any:
    from billing.money import read_credits
    from keys.principal import Budget

    if credits is None and window is None:
        return None
    if credits is None or window is None:
        raise ValueError("--budget and --window belong together")
    nanos = read_credits(credits)
    if nanos <= 0:
        raise ValueError("a budget must be more than nothing")
    return Budget(nanos=nanos, window=window)  # type: ignore[arg-type]


def read_expiry(text: str | None) -> datetime | None:
    from keys.terms import check_expiry

    if not text:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{text!r} is no RFC 3339 time") from None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    check_expiry(moment, datetime.now(UTC))
    return moment
