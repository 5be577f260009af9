"""What every command shares: config, data folder, stores, output."""

import os
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
import msgspec

from config.errors import ConfigError
from config.load import Loaded, load, missing_secrets, weak_secrets
from config.secret import Secret

if TYPE_CHECKING:
    from billing.book import Connection
    from gateway.embedded.stores import StoreUrls

EXIT_CONFIG = 78
DEFAULT_DATA_DIR = ".farebox"

Command = Callable[..., Any]


class Options(msgspec.Struct):
    """The options that every verb takes."""

    config: Path | None
    data_dir: Path


def common(command: Command) -> Command:
    """Add --config, --data-dir and --json to a command."""
    command = click.option(
        "--config",
        type=click.Path(path_type=Path),
        default=None,
        help="Config file (default: $FAREBOX_CONFIG, else defaults).",
    )(command)
    command = click.option(
        "--data-dir",
        type=click.Path(path_type=Path),
        default=None,
        help="Folder of the embedded stores (default: $FAREBOX_DATA_DIR, else .farebox).",
    )(command)
    return click.option("--json", "as_json", is_flag=True, help="JSON on stdout.")(command)


def options(config: Path | None, data_dir: Path | None) -> Options:
    """Flags win over the environment."""
    env_config, env_data = os.environ.get("FAREBOX_CONFIG"), os.environ.get("FAREBOX_DATA_DIR")
    return Options(
        config=config or (Path(env_config) if env_config else None),
        data_dir=data_dir or Path(env_data or DEFAULT_DATA_DIR),
    )


def load_config(config: Path | None, overrides: Mapping[str, object] | None = None) -> Loaded:
    """The config; on errors they are printed and the process ends with 78."""
    try:
        return load(config, os.environ, overrides or {})
    except ConfigError as exc:
        end(EXIT_CONFIG, *exc.problems)


def require_secrets(loaded: Loaded, needs: Sequence[str]) -> None:
    """End with 78, naming every secret that is missing or weak, all at once."""
    missing = missing_secrets(loaded.settings, needs)
    problems = [f"{name}: not set" for name in missing]
    problems += weak_secrets(loaded.settings, needs)
    if problems:
        end(EXIT_CONFIG, *problems)


def end(status: int, *problems: str) -> NoReturn:
    """Say why on stderr and leave."""
    for problem in problems:
        click.echo(f"farebox: {problem}", err=True)
    sys.exit(status)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """Run a command's coroutine; the failures that an operator can act on become one line."""
    import asyncio

    from billing.errors import BillingError
    from gateway.embedded.errors import StoreError
    from keys.errors import KeysError
    from migrations.runner import MigrationError

    try:
        return asyncio.run(work)
    except (BillingError, KeysError, StoreError, MigrationError, OSError) as exc:
        reason = getattr(exc, "reason", "") or str(exc)
        cause = f" ({exc.__cause__})" if exc.__cause__ is not None else ""
        end(1, f"{reason}{cause}")


@asynccontextmanager
async def stores(config: Path | None, data_dir: Path | None) -> AsyncIterator["StoreUrls"]:
    """Both stores, migrated when they are ours: attached to a running demo, or launched."""
    from gateway.embedded.stores import open_stores
    from migrations.runner import migrate

    opts = options(config, data_dir)
    settings = load_config(opts.config).settings
    async with open_stores(
        opts.data_dir, settings.book.url.reveal(), settings.till.url.reveal()
    ) as urls:
        if not settings.book.url:
            await migrate(urls.book_url)
        yield urls


@asynccontextmanager
async def book_connection(url: str) -> AsyncIterator["Connection"]:
    """One connection to the book for a short command."""
    from billing.book import connect

    conn = await connect(url)
    try:
        yield conn
    finally:
        await conn.close(timeout=5)


def pepper_of(config: Path | None, data_dir: Path | None) -> bytes:
    """The pepper of API keys: from config, else the one a demo made for this data folder."""
    opts = options(config, data_dir)
    loaded = load_config(opts.config)
    if loaded.settings.keys.pepper:
        return loaded.settings.keys.pepper.reveal().encode()
    kept = pepper_file(opts.data_dir)
    if kept.exists():
        return kept.read_text().strip().encode()
    require_secrets(loaded, ["keys.pepper"])
    raise AssertionError


def pepper_file(data_dir: Path) -> Path:
    return data_dir / "pepper"


def demo_pepper(data_dir: Path) -> Secret:
    """The demo's own pepper, made once and kept beside its data."""
    import secrets

    from gateway.embedded.server import write_secret

    path = pepper_file(data_dir)
    if not path.exists():
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_secret(path, secrets.token_hex(32))
    return Secret(path.read_text().strip())
