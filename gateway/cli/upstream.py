"""`farebox keys set-upstream`, `list-upstream`, `delete-upstream` and `reseal-upstream`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from config.secret import Secret
from config.settings import Keys
from gateway.cli import show
from gateway.cli.accounts import read_uid
from gateway.cli.context import book_connection, common, end, options, run, stores, verb_config

if TYPE_CHECKING:
    from keys.sealed import Sealer

VARIABLE = "FAREBOX_KEYS__ENCRYPTION_KEY"
SECRET_BYTES_MAX = 4096
COLUMNS = ["provider", "created_at"]


def encryption_key_file(data_dir: Path) -> Path:
    return data_dir / "encryption_key"


def demo_encryption_key(data_dir: Path) -> Secret:
    """The demo's own encryption key, made once and kept beside its data."""
    import secrets

    from gateway.embedded.server import write_secret

    path = encryption_key_file(data_dir)
    if not path.exists():
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_secret(path, secrets.token_hex(32))
    return Secret(path.read_text().strip())


def sealer_for(config: Path | None, data_dir: Path | None) -> "Sealer":
    """With the keys of the config, else with the one a demo made for this data folder."""
    from keys.sealed import sealer_of

    keys: Keys = verb_config(config, data_dir).settings.keys
    kept = encryption_key_file(options(config, data_dir).data_dir)
    if not keys.encryption_key and kept.exists():
        keys = msgspec.structs.replace(keys, encryption_key=Secret(kept.read_text().strip()))
    if not keys.encryption_key:
        end(78, f"{VARIABLE}: not set")
    try:
        return sealer_of(keys)
    except ValueError as exc:
        end(78, f"{VARIABLE}: {exc}")


@click.command("set-upstream")
@click.argument("key")
@click.argument("provider")
@click.option("--file", "path", type=click.Path(path_type=Path), help="Where the secret stands.")
@common
def set_upstream(
    key: str, provider: str, config: Path | None, data_dir: Path | None, as_json: bool, path: Any
) -> None:
    """Send a secret of KEY's own to PROVIDER, read from a file or from stdin. Works within 5 s."""
    uid, settings = read_uid(key), verb_config(config, data_dir).settings
    known = settings.providers.get(provider)
    if known is None or known.kind == "echo":
        end(2, f"{provider}: no such provider that takes a credential")
    sealer, secret = sealer_for(config, data_dir), _read_secret(path)

    async def work() -> Any:
        from keys import keys_store, upstream_store

        async with stores(config, data_dir) as urls, book_connection(urls.book_url) as conn:
            owner = await keys_store.owner_of_key(conn, uid)
            return await upstream_store.put_credential(
                conn, owner, uid, provider, secret, sealer=sealer
            )

    _show(uid, run(work()), as_json)


@click.command("list-upstream")
@click.argument("key")
@common
def list_upstream(key: str, config: Path | None, data_dir: Path | None, as_json: bool) -> None:
    """The providers for which KEY has a secret of its own; never the secrets."""
    uid = read_uid(key)

    async def work() -> Any:
        from keys import keys_store, upstream_store

        async with stores(config, data_dir) as urls, book_connection(urls.book_url) as conn:
            owner = await keys_store.owner_of_key(conn, uid)
            return await upstream_store.list_credentials(conn, owner, uid)

    rows = [msgspec.structs.asdict(credential) for credential in run(work())]
    show.as_json(rows) if as_json else show.table(COLUMNS, rows)


@click.command("delete-upstream")
@click.argument("key")
@click.argument("provider")
@common
def delete_upstream(
    key: str, provider: str, config: Path | None, data_dir: Path | None, as_json: bool
) -> None:
    """Send PROVIDER its own key again for the calls of KEY. Works within 5 s."""
    uid = read_uid(key)

    async def work() -> Any:
        from keys import keys_store, upstream_store

        async with stores(config, data_dir) as urls, book_connection(urls.book_url) as conn:
            owner = await keys_store.owner_of_key(conn, uid)
            return await upstream_store.delete_credential(conn, owner, uid, provider)

    _show(uid, run(work()), as_json)


@click.command("reseal-upstream")
@common
def reseal_upstream(config: Path | None, data_dir: Path | None, as_json: bool) -> None:
    """Seal all of them with the new encryption key, so that the previous one can go."""
    sealer = sealer_for(config, data_dir)

    async def work() -> int:
        from keys import upstream_store

        async with stores(config, data_dir) as urls, book_connection(urls.book_url) as conn:
            return await upstream_store.reseal_all(conn, sealer)

    row = {"resealed": run(work())}
    show.as_json(row) if as_json else show.pairs(row)


COMMANDS = (set_upstream, list_upstream, delete_upstream, reseal_upstream)


def _show(key_id: Any, credential: Any, as_json: bool) -> None:
    row = {"app_key_id": key_id, **msgspec.structs.asdict(credential)}
    show.as_json(row) if as_json else show.pairs(row)


def _read_secret(path: Path | None) -> Secret:
    """One line. Never from an argument: those of a process can be read by others."""
    from keys.sealed import SENDABLE

    try:
        if path is not None:
            with path.open() as file:
                text = file.read(SECRET_BYTES_MAX)
        elif sys.stdin.isatty():
            text = str(click.prompt("secret", hide_input=True, err=True))
        else:
            text = sys.stdin.read(SECRET_BYTES_MAX)
    except (OSError, UnicodeDecodeError) as exc:
        end(1, f"the secret cannot be read: {type(exc).__name__}")
    text = text.rstrip("\r\n")
    if not SENDABLE.fullmatch(text):
        end(2, "the secret must have 8 to 512 printable ASCII characters and no spaces")
    return Secret(text)
