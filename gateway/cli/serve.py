"""`farebox serve` and `farebox migrate`."""

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from config.settings import Server, Settings
from gateway.cli import show
from gateway.cli.context import (
    book_connection,
    common,
    end,
    load_config,
    migrate_book,
    options,
    refuse_pending,
    require_secrets,
    run,
    verb_config,
    with_stores,
)
from gateway.cli.settings import serve_needs
from gateway.cli.walls import refuse_roles

if TYPE_CHECKING:
    from gateway.embedded.stores import StoreUrls
    from gateway.supervisor import Workers


class StopSignals:
    """SIGTERM or SIGINT: the first sets `stop`, the second `hurry`. Owned by one command."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()
        loop = asyncio.get_running_loop()
        for sig in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sig, self._on_signal)

    def _on_signal(self) -> None:
        (self.hurry if self.stop.is_set() else self.stop).set()


def take_port(server: Server) -> socket.socket:
    """The listening socket; ends the process with a clear word when it cannot be had."""
    from gateway.supervisor import listen

    try:
        return listen(server.host, server.port)
    except OSError as exc:
        reason = exc.strerror or str(exc)
        end(1, f"cannot listen on {server.host}:{server.port}: {reason} (choose another: --port)")


@asynccontextmanager
async def serving(
    settings: Settings, urls: "StoreUrls", workers: "Workers", hurry: asyncio.Event
) -> AsyncIterator[None]:
    """The workers serve, with these stores, as long as the context is open; drained at its end."""
    from billing.prices_store import sync_config_prices
    from billing.roles import worker_url
    from gateway.rates import config_rates

    settings = with_stores(settings, urls)
    async with book_connection(worker_url(settings.book)) as conn:
        await sync_config_prices(conn, config_rates(settings))
    async with _working(settings):
        try:
            await workers.start(settings)
            yield
        finally:
            await workers.stop(hurry)


@asynccontextmanager
async def _working(settings: Settings) -> AsyncIterator[None]:
    """Do the work of `farebox work` beside the workers, unless the config says otherwise."""
    if not settings.work.in_serve:
        yield
        return
    from gateway.work import working

    async with working(settings):
        yield


def base_url(sock: socket.socket) -> str:
    """Where this machine reaches the socket."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - every interface
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


def with_spool(settings: Settings, data_dir: Path) -> Settings:
    """The spool's folder, whole: workers do not run in the current one."""
    folder = Path(settings.book.spool_dir or data_dir / "spool").absolute()
    book = msgspec.structs.replace(settings.book, spool_dir=str(folder))
    return msgspec.structs.replace(settings, book=book)


@click.command()
@click.option("--workers", type=click.IntRange(1, 1024), default=None)
@click.option("--host", default=None)
@click.option("--port", type=click.IntRange(0, 65535), default=None, help="0: a free one.")
@common
def serve(config: Path | None, data_dir: Path | None, as_json: bool, **flags: object) -> None:
    """Serve the gateway until SIGTERM; running streams finish first."""
    from gateway.log import set_up_logging

    opts = options(config, data_dir)
    loaded = load_config(opts.config, server_overrides(flags))
    require_secrets(loaded, serve_needs(loaded.settings))
    settings = with_spool(loaded.settings, opts.data_dir)
    set_up_logging(settings.log)

    async def work(sock: socket.socket) -> None:
        from gateway.embedded.stores import open_stores
        from gateway.supervisor import launched_workers

        signals = StopSignals()
        book_url, till_url = settings.book.url.reveal(), settings.till.url.reveal()
        async with (
            launched_workers(settings, sock, signals.hurry) as workers,
            open_stores(opts.data_dir, book_url, till_url, own=True) as urls,
        ):
            if book_url:
                await refuse_pending(book_url)
                await refuse_roles(settings.book)
            else:
                await migrate_book(urls.book_url)
            facts = {"base_url": base_url(sock), "workers": workers.pids}
            async with serving(settings, urls, workers, signals.hurry):
                show.as_json(facts) if as_json else click.echo(f"serving on {facts['base_url']}")
                await signals.stop.wait()

    with take_port(settings.server) as sock:
        run(work(sock))


def server_overrides(flags: Mapping[str, object]) -> dict[str, object]:
    """Flags of the server section that were given."""
    return {f"server.{name}": value for name, value in flags.items() if value is not None}


@click.command()
@common
def migrate(config: Path | None, data_dir: Path | None, as_json: bool) -> None:
    """Bring the database's schema up to this release."""

    async def work() -> list[str]:
        from gateway.embedded.stores import open_stores

        url = settings.book.migrate_url.reveal() or settings.book.url.reveal()
        if url:
            return await migrate_book(url)
        async with open_stores(opts.data_dir, "", settings.till.url.reveal()) as urls:
            return await migrate_book(urls.book_url)

    opts = options(config, data_dir)
    settings = verb_config(config, data_dir).settings

    applied = run(work())
    if as_json:
        show.as_json({"applied": applied})
    else:
        click.echo("\n".join(applied) or "nothing to do")
