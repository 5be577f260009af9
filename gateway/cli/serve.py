"""`farebox serve` and `farebox migrate`."""

import asyncio
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from config.secret import Secret
from config.settings import Settings
from gateway.cli import show
from gateway.cli.context import (
    book_connection,
    common,
    end,
    load_config,
    options,
    require_secrets,
    run,
    stores,
)
from gateway.cli.settings import SERVE_NEEDS

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


class Serving(msgspec.Struct, frozen=True):
    """A gateway that answers."""

    base_url: str
    workers: "Workers"


@asynccontextmanager
async def serving(
    settings: Settings, urls: "StoreUrls", signals: StopSignals
) -> AsyncIterator[Serving]:
    """Workers on the configured address, with these stores, as long as the context is open."""
    from billing.prices_store import sync_config_prices
    from gateway.catalog import config_rates
    from gateway.supervisor import listen, running_workers

    settings = with_stores(settings, urls)
    async with book_connection(urls.book_url) as conn:
        await sync_config_prices(conn, config_rates(settings))
    sock = listen(settings.server.host, settings.server.port)
    try:
        host, port = sock.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        async with running_workers(settings, sock, signals.hurry) as workers:
            yield Serving(f"http://{shown}:{port}", workers)
    finally:
        sock.close()


def with_stores(settings: Settings, urls: "StoreUrls") -> Settings:
    book = msgspec.structs.replace(settings.book, url=Secret(urls.book_url))
    till = msgspec.structs.replace(settings.till, url=Secret(urls.till_url))
    return msgspec.structs.replace(settings, book=book, till=till)


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
    require_secrets(loaded, SERVE_NEEDS)
    settings = loaded.settings
    set_up_logging(settings.log)

    async def work() -> None:
        from gateway.embedded.stores import open_stores
        from migrations.runner import migrate

        signals = StopSignals()
        book_url, till_url = settings.book.url.reveal(), settings.till.url.reveal()
        async with open_stores(opts.data_dir, book_url, till_url, own=True) as urls:
            if book_url:
                await _refuse_pending(urls.book_url)
            else:
                await migrate(urls.book_url)
            async with serving(settings, urls, signals) as gateway:
                facts = {"base_url": f"{gateway.base_url}/v1", "workers": gateway.workers.pids}
                show.as_json(facts) if as_json else click.echo(f"serving on {facts['base_url']}")
                await signals.stop.wait()

    run(work())


def server_overrides(flags: Mapping[str, object]) -> dict[str, object]:
    """Flags of the server section that were given."""
    return {f"server.{name}": value for name, value in flags.items() if value is not None}


async def _refuse_pending(url: str) -> None:
    from migrations.runner import pending

    async with book_connection(url) as conn:
        names = await pending(conn)
    if names:
        end(1, f"the database is behind this release ({', '.join(names)}): run farebox migrate")


@click.command()
@common
def migrate(config: Path | None, data_dir: Path | None, as_json: bool) -> None:
    """Bring the database's schema up to this release."""

    async def work() -> list[str]:
        from migrations import runner

        settings = load_config(options(config, data_dir).config).settings
        if settings.book.url:
            return await runner.migrate(settings.book.url.reveal())
        async with stores(config, data_dir) as urls:
            return await runner.migrate(urls.book_url)

    applied = run(work())
    if as_json:
        show.as_json({"applied": applied})
    else:
        click.echo("\n".join(applied) or "nothing to do")
