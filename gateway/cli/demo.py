"""`farebox demo`: everything at once, on a bare machine, without a provider key."""

import json
import os
import shlex
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import click
import msgspec

from config.settings import Settings
from gateway.cli import show
from gateway.cli.context import (
    book_connection,
    common,
    demo_pepper,
    end,
    load_config,
    options,
    run,
)
from gateway.cli.serve import StopSignals, server_overrides, serving

DEMO_CREDITS = "10000"
DEMO_OPEN_MAX = 1000


@click.command()
@click.option("--port", type=click.IntRange(0, 65535), default=None, help="0: a free one.")
@click.option("--host", default=None)
@click.option("--workers", type=click.IntRange(1, 1024), default=None)
@click.option(
    "--ready-file",
    type=click.Path(path_type=Path),
    default=None,
    help="Write base URL, keys and pids here, as JSON, when it serves.",
)
@common
def demo(
    config: Path | None,
    data_dir: Path | None,
    as_json: bool,
    ready_file: Path | None,
    **flags: object,
) -> None:
    """Real Postgres and Valkey, an account with credits, a key and local models; then serve."""
    opts = options(config, data_dir)
    folder = opts.data_dir.absolute()
    overrides = server_overrides(flags)
    with resources.as_file(resources.files("config") / "demo.toml") as demo_config:
        settings = load_config(opts.config or demo_config, overrides).settings
    settings = _with_pepper(settings, folder)
    settings = _with_log_file(settings, folder)
    run(_demo(settings, folder, ready_file, as_json))


def _with_pepper(settings: Settings, folder: Path) -> Settings:
    if settings.keys.pepper:
        return settings
    keys = msgspec.structs.replace(settings.keys, pepper=demo_pepper(folder))
    return msgspec.structs.replace(settings, keys=keys)


def _with_log_file(settings: Settings, folder: Path) -> Settings:
    """The terminal is for people here; the JSON lines go beside the data."""
    path = settings.log.path or str(folder / "farebox.log")
    return msgspec.structs.replace(settings, log=msgspec.structs.replace(settings.log, path=path))


async def _demo(settings: Settings, folder: Path, ready_file: Path | None, as_json: bool) -> None:
    from gateway.embedded.stores import open_stores
    from gateway.log import set_up_logging
    from migrations.runner import migrate

    signals = StopSignals()
    set_up_logging(settings.log)
    book_url, till_url = settings.book.url.reveal(), settings.till.url.reveal()
    async with open_stores(folder, book_url, till_url, own=True) as urls:
        await migrate(urls.book_url)
        seeded = await _seed(settings, folder, urls.book_url)
        async with serving(settings, urls, signals) as gateway:
            facts = {
                "base_url": f"{gateway.base_url}/v1",
                **seeded,
                "pids": {**urls.pids, "demo": os.getpid(), "workers": gateway.workers.pids},
            }
            if ready_file is not None:
                _write_ready(ready_file, facts)
            if as_json:
                show.as_json(facts)
            else:
                _say(facts, sorted(settings.models))
            await signals.stop.wait()
            click.echo("stopping: running requests finish first", err=True)


async def _seed(settings: Settings, folder: Path, book_url: str) -> dict[str, str]:
    """An account with credits and a key, made once; a second run gives the same again."""
    kept = folder / "demo.json"
    async with book_connection(book_url) as conn:
        from billing import history

        if kept.exists():
            known: dict[str, str] = json.loads(kept.read_text())
            from config.ids import read_id

            if await history.find_account(conn, read_id(known["account_id"])) is not None:
                return known
        seeded = await _make(settings, conn)
    from gateway.embedded.server import write_secret

    write_secret(kept, json.dumps(seeded))
    return seeded


async def _make(settings: Settings, conn: Any) -> dict[str, str]:
    from billing import book
    from billing.money import read_credits
    from config.ids import id_text
    from keys import store

    pepper = settings.keys.pepper.reveal().encode()
    account_id = await book.create_account(conn, "demo", DEMO_OPEN_MAX)
    await book.grant(conn, account_id, read_credits(DEMO_CREDITS), f"demo_{account_id}", "demo")
    terms = store.KeyTerms(name="demo", kind="test", open_requests_max=DEMO_OPEN_MAX)
    _, key = await store.create_key(conn, account_id, terms, pepper=pepper)
    operator = await store.create_operator_key(conn, "demo operator", pepper=pepper)
    return {
        "api_key": key.secret,
        "operator_key": operator.secret,
        "account_id": f"acct_{id_text(account_id)}",
    }


def _write_ready(path: Path, facts: Mapping[str, object]) -> None:
    """Whole or not at all: whoever waits for the file reads it at once. It holds a key: 0600."""
    from gateway.embedded.server import write_secret

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_secret(path, json.dumps(facts))
    except OSError as exc:
        end(1, f"--ready-file {path}: {exc.strerror}")


def _say(facts: Mapping[str, Any], models: list[str]) -> None:
    body = {"model": models[0], "messages": [{"role": "user", "content": "hello"}]}
    click.echo(f"base URL      {facts['base_url']}")
    click.echo(f"API key       {facts['api_key']}")
    click.echo(f"operator key  {facts['operator_key']}")
    click.echo(f"account       {facts['account_id']}")
    click.echo(f"models        {', '.join(models)}")
    click.echo("\nTry it:\n")
    click.echo(
        f"curl {facts['base_url']}/chat/completions -H 'Authorization: Bearer {facts['api_key']}'"
        f" -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"
    )
    click.echo("\nThen: farebox receipts list, farebox audit. Stop with Ctrl-C.")
