"""`farebox work`: the work besides serving, in a process of its own."""

from pathlib import Path

import click

from gateway.cli import show
from gateway.cli.context import common, options, refuse_pending, run, verb_config, with_stores
from gateway.cli.serve import StopSignals, with_spool
from gateway.cli.walls import refuse_roles


@click.command()
@common
def work(config: Path | None, data_dir: Path | None, as_json: bool) -> None:
    """Sweep the holds of dead workers and post what nobody posted, until SIGTERM.

    Any number of these may run: one of them works at a time. `farebox serve` does the same work by
    itself unless `work.in_serve` is false.
    """
    from gateway.log import set_up_logging

    opts = options(config, data_dir)
    loaded = verb_config(config, data_dir)
    set_up_logging(loaded.settings.log)

    async def stand_by() -> None:
        from gateway.embedded.stores import open_stores
        from gateway.work import working

        settings, signals = loaded.settings, StopSignals()
        book_url, till_url = settings.book.url.reveal(), settings.till.url.reveal()
        async with open_stores(opts.data_dir, book_url, till_url, may_launch=False) as urls:
            await refuse_pending(urls.book_url)
            if book_url:
                await refuse_roles(settings.book, serves=False)
            settings = with_spool(with_stores(settings, urls), opts.data_dir)
            async with working(settings):
                show.as_json({"working": True}) if as_json else click.echo("working")
                await signals.stop.wait()

    run(stand_by())
