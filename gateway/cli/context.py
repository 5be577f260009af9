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
from config.names import variable
from config.secret import Secret
from config.settings import Settings

if TYPE_CHECKING:
    from billing.book import Connection
    from gateway.embedded.stores import StoreUrls

EXIT_CONFIG = 78
DEFAULT_DATA_DIR = ".farebox"
STORE_SCHEMES = {
    "book.url": ("postgresql", "postgres"),
    "book.request_url": ("postgresql", "postgres"),
    "book.migrate_url": ("postgresql", "postgres"),
    "till.url": ("redis", "rediss", "valkey", "valkeys", "unix"),
}

DEMO_FILE = "demo.json"
DEMO_CONFIG = Path(__file__).parents[2] / "config" / "demo.toml"

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
        loaded = load(config, os.environ, overrides or {})
    except ConfigError as exc:
        end(EXIT_CONFIG, *exc.problems)
    problems = wrong_urls(loaded.settings)
    if problems:
        end(EXIT_CONFIG, *problems)
    return loaded


def wrong_urls(settings: Settings) -> list[str]:
    """What is wrong with the stores' URLs, without showing them: they carry passwords."""
    book = settings.book
    secrets = {
        "book.url": book.url,
        "book.request_url": book.request_url,
        "book.migrate_url": book.migrate_url,
        "till.url": settings.till.url,
    }
    urls = {name: secret.reveal() for name, secret in secrets.items()}
    return [
        f"{variable(name.split('.'))}: expected {STORE_SCHEMES[name][0]}://user:password@host:port/name"
        for name, url in urls.items()
        if url and not _is_url(url, STORE_SCHEMES[name])
    ]


def _is_url(url: str, schemes: Sequence[str]) -> bool:
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url)
        # Postgres allows several hosts, each with a port; then there is no one port to read.
        return parts.scheme in schemes and ("," in parts.netloc or parts.port != 0)
    except ValueError:
        return False


def verb_config(config: Path | None, data_dir: Path | None) -> Loaded:
    """The config of a command beside a gateway: by default the demo's, on a demo's data folder."""
    opts = options(config, data_dir)
    is_demo = opts.config is None and (opts.data_dir / DEMO_FILE).exists()
    return load_config(DEMO_CONFIG if is_demo else opts.config)


def require_secrets(loaded: Loaded, needs: Sequence[str]) -> None:
    """End with 78, naming every secret that is missing or weak, all at once."""
    missing = missing_secrets(loaded.settings, needs)
    problems = [f"{name}: not set" for name in missing]
    problems += weak_secrets(loaded.settings)
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
    from gateway.supervisor import WorkersFailed
    from keys.errors import KeysError
    from migrations.runner import MigrationError

    try:
        return asyncio.run(work)
    except ConfigError as exc:
        end(EXIT_CONFIG, *exc.problems)
    except StoreError as exc:
        end(1, str(exc))
    except (BillingError, KeysError, MigrationError, WorkersFailed, OSError) as exc:
        end(1, _why(exc))


def _why(exc: Exception) -> str:
    """One line: what went wrong, and what the store itself said of it."""
    said = str(exc).partition("\n")[0]
    detail = getattr(exc, "reason", "") or getattr(exc, "reply", "")
    if not detail and exc.__cause__ is not None:
        detail = str(exc.__cause__) or type(exc.__cause__).__name__
    return f"{said} ({detail})" if detail else said


@asynccontextmanager
async def stores(config: Path | None, data_dir: Path | None) -> AsyncIterator["StoreUrls"]:
    """Both stores, migrated when they are ours: attached to a running demo, or launched.

    The book is entered as farebox_worker. Raises MigrationError when a database of somebody
    else's is behind this release.
    """
    from dataclasses import replace

    from billing.roles import worker_url
    from gateway.embedded.stores import open_stores

    settings = verb_config(config, data_dir).settings
    book_url, till_url = settings.book.url.reveal(), settings.till.url.reveal()
    async with open_stores(options(config, data_dir).data_dir, book_url, till_url) as urls:
        if book_url:
            await refuse_pending(book_url)
        else:
            await migrate_book(urls.book_url)
        yield replace(urls, book_url=worker_url(with_stores(settings, urls).book))


def with_stores(settings: Settings, urls: "StoreUrls") -> Settings:
    """The settings with where the stores are. The embedded book has one login, for everything."""
    roles = settings.book.roles if settings.book.url else "shared"
    book = msgspec.structs.replace(settings.book, url=Secret(urls.book_url), roles=roles)
    till = msgspec.structs.replace(settings.till, url=Secret(urls.till_url))
    return msgspec.structs.replace(settings, book=book, till=till)


async def migrate_book(url: str) -> list[str]:
    """Bring the schema up to date; the names of what was applied. Raises as the book does."""
    from billing.book import translated
    from migrations.runner import migrate

    async with translated():
        return await migrate(url)


async def refuse_pending(url: str) -> None:
    """Raises MigrationError when the schema is not this release's."""
    from billing.book import translated
    from migrations.runner import MigrationError, pending

    async with book_connection(url) as conn, translated():
        names = await pending(conn)
    if names:
        listed = ", ".join(names)
        raise MigrationError(f"the database is behind this release ({listed}): run farebox migrate")


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
    loaded = verb_config(config, data_dir)
    if loaded.settings.keys.pepper:
        return loaded.settings.keys.pepper.reveal().encode()
    kept = pepper_file(options(config, data_dir).data_dir)
    if kept.exists():
        return kept.read_text().strip().encode()
    require_secrets(loaded, ["keys.pepper"])
    raise AssertionError


def peppers_of(config: Path | None, data_dir: Path | None) -> list[bytes]:
    """The pepper in use, then the one before it while keys still have that."""
    previous = verb_config(config, data_dir).settings.keys.pepper_previous
    peppers = [pepper_of(config, data_dir)]
    return [*peppers, previous.reveal().encode()] if previous else peppers


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
