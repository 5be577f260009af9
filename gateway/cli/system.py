"""`farebox accounts system`: the account that Farebox's own jobs spend from."""

from pathlib import Path
from typing import Any

import click

from gateway.cli import show
from gateway.cli.context import book_connection, common, end, pepper_of, run, stores, verb_config

NAME_MAX = 200


@click.command("system")
@click.option("--credits", default=None, help="What a new one begins with.  [default: 100000]")
@click.option("--budget", default=None, help="Credits a day, for each key.  [default: 10000]")
@click.option("--open-requests-max", type=click.IntRange(1), help="  [default: 20]")
@click.option("--rpm", type=click.IntRange(1), help="Requests a minute.  [default: 600]")
@click.option("--tpm", type=click.IntRange(1), help="Tokens a minute.  [default: 1000000]")
@click.option("--key", "key_name", default="", help="Also make an API key of this name.")
@common
def system(config: Path | None, data_dir: Path | None, as_json: bool, **rest: Any) -> None:
    """Make the system tenant, once; what is named changes the one that is there."""
    from billing.system_tenant import FIRST_CREDITS_NANOS, Caps

    credits, name = _read_nanos(rest["credits"]), rest["key_name"]
    if name and not (len(name) <= NAME_MAX and name.isprintable()):
        end(2, f"--key must have 1 to {NAME_MAX} printable characters")
    caps = Caps(
        budget_nanos=_read_nanos(rest["budget"]),
        open_requests=rest["open_requests_max"],
        requests_per_minute=rest["rpm"],
        tokens_per_minute=rest["tpm"],
    )
    pepper = pepper_of(config, data_dir) if name else b""
    mode = verb_config(config, data_dir).settings.keys.mode

    async def work() -> dict[str, Any]:
        from billing.system_tenant import ensure_system_tenant

        async with stores(config, data_dir) as urls, book_connection(urls.book_url) as conn:
            tenant = await ensure_system_tenant(conn, caps, credits or FIRST_CREDITS_NANOS)
            await _tell_till(conn, urls.till_url, tenant.state)
            row = _row(tenant)
            if name:
                row |= await _new_key(conn, tenant, name, mode, pepper)
            return row

    row = run(work())
    show.as_json(row) if as_json else show.pairs(row)


async def _new_key(conn: Any, tenant: Any, name: str, mode: Any, pepper: bytes) -> dict[str, Any]:
    """With the daily budget of its own: each key has a virtual key, and so a budget."""
    from keys.principal import Budget
    from keys.store import KeyTerms, create_key

    budget = Budget(nanos=tenant.caps.budget_nanos, window="day")
    terms = KeyTerms(name=name, kind=mode, budget=budget)
    key_id, new = await create_key(conn, tenant.state.account_id, terms, pepper=pepper)
    return {"app_key_id": key_id, "name": name, "api_key": new.secret}


async def _tell_till(conn: Any, till_url: str, state: Any) -> None:
    from billing import till_scan
    from billing.errors import TillUnavailable
    from billing.fleet import read_epoch

    try:
        await till_scan.tell_account(till_url, state, (await read_epoch(conn)).number)
    except TillUnavailable:
        click.echo("farebox: the till did not answer; it will ask the book", err=True)


def _row(tenant: Any) -> dict[str, Any]:
    caps, state = tenant.caps, tenant.state
    return {
        "billing_account_id": state.account_id,
        "is_new": tenant.is_new,
        "status": state.status,
        "balance_nanos": state.balance_nanos,
        "budget_a_day_nanos": caps.budget_nanos,
        "open_requests_max": caps.open_requests,
        "rpm": caps.requests_per_minute,
        "tpm": caps.tokens_per_minute,
    }


def _read_nanos(credits: str | None) -> int | None:
    from billing.money import read_credits

    if credits is None:
        return None
    try:
        nanos = read_credits(credits)
    except ValueError as exc:
        end(2, str(exc))
    if nanos <= 0:
        end(2, "credits must be more than nothing")
    return nanos
