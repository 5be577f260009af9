"""`farebox till`: is the till well, and a new one out of what it holds."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gateway.cli import show
from gateway.cli.context import book_connection, common, end, run, stores, verb_config

if TYPE_CHECKING:
    from billing.till_rebuild import Rebuilt

WORKER_COLUMNS = ["name", "is_alive", "seen_ms_ago", "started_at"]


@click.group()
def till() -> None:
    """What may be spent right now, in Valkey or Redis."""


@till.command("status")
@common
def status(config: Path | None, data_dir: Path | None, as_json: bool) -> None:
    """Is it open, who lives, and what is in it."""

    async def work() -> dict[str, Any]:
        import msgspec

        from billing.till_scan import open_till
        from billing.till_status import read_status

        async with (
            stores(config, data_dir) as urls,
            book_connection(urls.book_url) as conn,
            open_till(urls.till_url) as scan,
        ):
            return msgspec.structs.asdict(await read_status(conn, scan))

    found = run(work())
    if as_json:
        show.as_json(found)
        return
    workers = found.pop("workers")
    show.pairs(found)
    if workers:
        click.echo()
        show.table(WORKER_COLUMNS, workers)


@till.command("rebuild")
@click.option("--yes", is_flag=True, help="Really do it.")
@common
def rebuild(config: Path | None, data_dir: Path | None, as_json: bool, yes: bool) -> None:
    """Make the till anew from its holds, its outbox and the book.

    For a till that cannot be trusted: its sums are wrong, or the book was restored from a backup.
    New requests get 503 for some seconds; those under way go on. Nothing is lost: what cannot be
    read is kept under other names.
    """
    if not yes:
        end(2, "new requests will be refused for some seconds: say --yes")
    wait_ms = verb_config(config, data_dir).settings.till.rebuild_wait_ms

    async def work() -> "Rebuilt":
        from billing.till_rebuild import rebuild

        async with stores(config, data_dir) as urls, book_connection(urls.book_url) as conn:
            return await rebuild(conn, urls.till_url, wait_ms=wait_ms, say=_on_stderr)

    done = run(work())
    if as_json:
        import msgspec

        show.as_json(msgspec.to_builtins(done))
        return
    click.echo(
        f"epoch {done.epoch} is open: {done.holds} holds and {done.outbox} outbox entries in"
        f" {done.shards} shards; {done.wrong_scopes} scopes were wrong"
    )
    for name in done.set_aside:
        click.echo(f"set aside: {name}")


@till.command("aside")
@click.option("--drop", default="", help="Forget this one, for good.")
@common
def aside(config: Path | None, data_dir: Path | None, as_json: bool, drop: str) -> None:
    """What rebuilds could not read and set aside."""

    async def work() -> list[dict[str, str]]:
        from billing.till_scan import open_till
        from billing.till_status import drop_aside, list_aside

        async with stores(config, data_dir) as urls, open_till(urls.till_url) as scan:
            if drop and not await drop_aside(scan, drop):
                end(1, f"{drop}: no such thing is set aside")
            return await list_aside(scan)

    rows = run(work())
    show.as_json(rows) if as_json else show.table(["key", "content"], rows)


def _on_stderr(line: str) -> None:
    click.echo(line, err=True)
