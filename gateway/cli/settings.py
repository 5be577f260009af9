"""`farebox check` and `farebox config show`."""

from pathlib import Path

import click

from config.load import describe
from config.settings import Settings
from gateway.cli import show
from gateway.cli.context import common, load_config, options, require_secrets


def serve_needs(settings: Settings) -> list[str]:
    """The secrets without which `serve` cannot start.

    A provider in one's own network may do without a key; one that is reached by TLS does not.
    """
    remote = (n for n, p in settings.providers.items() if p.base_url.startswith("https:"))
    return ["keys.pepper", *(f"providers.{name}.key" for name in remote)]


@click.command()
@common
def check(config: Path | None, data_dir: Path | None, as_json: bool) -> None:
    """Check the config without starting anything; exit 78 when `serve` could not start with it."""
    loaded = load_config(options(config, data_dir).config)
    require_secrets(loaded, serve_needs(loaded.settings))
    facts = {
        "ok": True,
        "providers": len(loaded.settings.providers),
        "models": len(loaded.settings.models),
    }
    show.as_json(facts) if as_json else show.pairs(facts)


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
