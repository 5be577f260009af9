"""`farebox check` and `farebox config show`."""

from pathlib import Path

import click

from config.load import describe
from config.settings import Book, Settings
from gateway.cli import show
from gateway.cli.context import (
    common,
    load_config,
    options,
    refuse_pending,
    require_secrets,
    run,
)
from gateway.cli.walls import check_roles


def serve_needs(settings: Settings) -> list[str]:
    """The secrets without which `serve` cannot start.

    A provider in one's own network may do without a key; one that is reached by TLS does not.
    """
    remote = (n for n, p in settings.providers.items() if p.base_url.startswith("https:"))
    needs = ["keys.pepper", *(f"providers.{name}.key" for name in remote)]
    if settings.book.url and settings.book.roles == "separate":
        needs.append("book.request_url")
    return needs


@click.command()
@common
def check(config: Path | None, data_dir: Path | None, as_json: bool) -> None:
    """Check config and logins without starting anything; 78 when `serve` could not start.

    A book of your own is looked at, so it has to be reachable and migrated.
    """
    loaded = load_config(options(config, data_dir).config)
    require_secrets(loaded, serve_needs(loaded.settings))
    if loaded.settings.book.url:
        run(_look_at(loaded.settings.book))
    facts = {
        "ok": True,
        "providers": len(loaded.settings.providers),
        "models": len(loaded.settings.models),
    }
    show.as_json(facts) if as_json else show.pairs(facts)


async def _look_at(book: Book) -> None:
    await refuse_pending(book.url.reveal())
    await check_roles(book)


@click.group()
def config() -> None:
    """Look at the config."""


@config.command("show")
@click.option("--origin", is_flag=True, help="Tell where each value comes from.")
@common
def config_show(config: Path | None, data_dir: Path | None, as_json: bool, origin: bool) -> None:
    """Every setting in force; secrets are masked."""
    rows = describe(load_config(options(config, data_dir).config))
    if as_json:
        show.as_json([{"key": k, "value": v, "origin": o} for k, v, o in rows])
        return
    for key, value, where in rows:
        click.echo(f"{key} = {value}" + (f"    # {where}" if origin else ""))
