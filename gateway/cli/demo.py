"""`farebox demo`: everything at once, on a bare machine, without a provider key."""

import json
import os
import shlex
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import msgspec

from config.settings import Settings
from gateway.cli import show
from gateway.cli.context import (
    DEMO_CONFIG,
    DEMO_FILE,
    book_connection,
    common,
    demo_pepper,
    load_config,
    migrate_book,
    options,
    run,
    with_stores,
)
from gateway.cli.serve import (
    StopSignals,
    base_url,
    server_overrides,
    serving,
    take_port,
    with_spool,
)
from gateway.cli.upstream import demo_encryption_key

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
    settings = load_config(opts.config or DEMO_CONFIG, server_overrides(flags)).settings
    if not settings.book.request_url:
        # One login is enough for a demo, also with a Postgres of your own.
        book = msgspec.structs.replace(settings.book, roles="shared")
        settings = msgspec.structs.replace(settings, book=book)
    with take_port(settings.server) as sock:
        settings = _with_own_secrets(settings, folder)
        settings = with_spool(_with_log_file(settings, folder), folder)
        run(_demo(settings, folder, sock, ready_file, as_json))


def _with_own_secrets(settings: Settings, folder: Path) -> Settings:
    keys = settings.keys
    if not keys.pepper:
        keys = msgspec.structs.replace(keys, pepper=demo_pepper(folder))
    if not keys.encryption_key:
        keys = msgspec.structs.replace(keys, encryption_key=demo_encryption_key(folder))
    return msgspec.structs.replace(settings, keys=keys)


def _with_log_file(settings: Settings, folder: Path) -> Settings:
    """The terminal is for people here; the JSON lines go beside the data."""
    path = settings.log.path or str(folder / "farebox.log")
    return msgspec.structs.replace(settings, log=msgspec.structs.replace(settings.log, path=path))


async def _demo(
    settings: Settings,
    folder: Path,
    sock: socket.socket,
    ready_file: Path | None,
    as_json: bool,
) -> None:
    from billing.roles import worker_url
    from gateway.embedded.stores import open_stores
    from gateway.log import set_up_logging
    from gateway.supervisor import launched_workers

    signals = StopSignals()
    set_up_logging(settings.log)
    book_url, till_url = settings.book.url.reveal(), settings.till.url.reveal()
    async with (
        launched_workers(settings, sock, signals.hurry) as workers,
        open_stores(folder, book_url, till_url, own=True) as urls,
    ):
        await migrate_book(settings.book.migrate_url.reveal() or urls.book_url)
        seeded = await _seed(settings, folder, worker_url(with_stores(settings, urls).book))
        with _ready_file(ready_file) as say_ready:
            async with serving(settings, urls, workers, signals.hurry):
                pids = {**urls.pids, "demo": os.getpid(), "workers": workers.pids}
                facts = {"base_url": base_url(sock), **seeded, "pids": pids}
                say_ready(facts)
                if as_json:
                    show.as_json(facts)
                else:
                    _say(facts, sorted(settings.models))
                await signals.stop.wait()
                click.echo("stopping: running requests finish first", err=True)


async def _seed(settings: Settings, folder: Path, book_url: str) -> dict[str, str]:
    """An account with credits and a key, made once; a second run gives the same again."""
    from gateway.embedded.server import write_secret

    kept = folder / DEMO_FILE
    if kept.exists():
        known: dict[str, str] = json.loads(kept.read_text())
        if await _is_valid(settings, book_url, known):
            return known
    async with book_connection(book_url) as conn:
        seeded = await _make(settings, conn)
    write_secret(kept, json.dumps(seeded))
    return seeded


async def _is_valid(settings: Settings, book_url: str, known: Mapping[str, str]) -> bool:
    """False when a key was revoked meanwhile, or this is another database or pepper."""
    from billing.book import open_pool
    from keys.api_key import digest
    from keys.store import find_principals, is_operator

    pepper, limits = settings.keys.pepper.reveal().encode(), settings.book
    pool = await open_pool(book_url, 1, limits.connect_timeout_s, limits.statement_timeout_ms)
    try:
        found = await find_principals(pool, [digest(known["api_key"].encode(), pepper)])
        return bool(found) and await is_operator(
            pool, [digest(known["operator_key"].encode(), pepper)]
        )
    finally:
        await pool.close()


async def _make(settings: Settings, conn: Any) -> dict[str, str]:
    from billing import book
    from billing.money import read_credits
    from config.ids import id_text
    from keys import store
    from keys.principal import Limits

    pepper = settings.keys.pepper.reveal().encode()
    account_id = await book.create_account(conn, "demo", DEMO_OPEN_MAX)
    await book.grant(conn, account_id, read_credits(DEMO_CREDITS), f"demo_{account_id}", "demo")
    terms = store.KeyTerms(
        name="demo", kind=settings.keys.mode, limits=Limits(open_requests=DEMO_OPEN_MAX)
    )
    _, key = await store.create_key(conn, account_id, terms, pepper=pepper)
    operator = await store.create_operator_key(conn, "demo operator", pepper=pepper)
    return {
        "api_key": key.secret,
        "operator_key": operator.secret,
        "account_id": f"acct_{id_text(account_id)}",
    }


@contextmanager
def _ready_file(path: Path | None) -> Iterator[Callable[[Mapping[str, object]], None]]:
    """Gives what writes the file. It is there only while the demo serves.

    Whole or not at all: whoever waits for it reads it at once. It holds a key: 0600.
    """
    from gateway.embedded.server import write_secret

    if path is None:
        yield lambda _: None
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        yield lambda facts: write_secret(path, json.dumps(facts))
    finally:
        path.unlink(missing_ok=True)


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
