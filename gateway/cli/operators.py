"""`farebox operators`: credentials that can operate and never infer."""

from pathlib import Path
from typing import Any

import click

from gateway.cli import show
from gateway.cli.accounts import LIST_MAX, read_uid
from gateway.cli.context import book_connection, common, end, pepper_of, run, stores
from gateway.cli.keys import NAME_MAX, read_expiry

COLUMNS = ["operator_key_id", "name", "key", "created_at", "expires_at", "revoked_at"]


@click.group()
def operators() -> None:
    """Operator keys: for /api/v1/operator and /metrics."""


@operators.command("create")
@click.option("--name", required=True)
@click.option("--expires-at", default=None, help="RFC 3339: 2027-01-31T00:00:00Z.")
@common
def create_operator(
    name: str, config: Path | None, data_dir: Path | None, as_json: bool, expires_at: str | None
) -> None:
    """Make an operator key. Its secret is shown now and never again."""
    if not (1 <= len(name) <= NAME_MAX and name.isprintable()):
        end(2, f"--name must have 1 to {NAME_MAX} printable characters")
    try:
        ends_at = read_expiry(expires_at)
    except ValueError as exc:
        end(2, str(exc))
    pepper = pepper_of(config, data_dir)

    async def work() -> Any:
        from keys import store

        async with stores(config, data_dir) as urls, book_connection(urls.book_url) as conn:
            return await store.create_operator(conn, name, pepper=pepper, expires_at=ends_at)

    key_id, new = run(work())
    row = {"operator_key_id": key_id, "name": name, "operator_key": new.secret}
    show.as_json(row) if as_json else show.pairs(row)


@operators.command("list")
@common
def list_operators(config: Path | None, data_dir: Path | None, as_json: bool) -> None:
    """Operator keys without their secrets, newest first."""

    async def work() -> Any:
        from keys import operators_store

        async with stores(config, data_dir) as urls, book_connection(urls.book_url) as conn:
            return await operators_store.list_operators(conn, LIST_MAX)

    rows = [_row(record) for record in run(work())]
    show.as_json(rows) if as_json else show.table(COLUMNS, rows)


@operators.command("revoke")
@click.argument("key")
@common
def revoke_operator(key: str, config: Path | None, data_dir: Path | None, as_json: bool) -> None:
    """Revoke an operator key for good, at once."""
    uid = read_uid(key)

    async def work() -> Any:
        from keys import operators_store

        async with stores(config, data_dir) as urls, book_connection(urls.book_url) as conn:
            return await operators_store.revoke_operator(conn, uid)

    row = _row(run(work()))
    show.as_json(row) if as_json else show.pairs(row)


def _row(record: Any) -> dict[str, Any]:
    return {
        "operator_key_id": record.id,
        "name": record.name,
        "key": f"fb_op_...{record.last4}",
        "created_at": record.created_at,
        "expires_at": record.expires_at,
        "revoked_at": record.revoked_at,
    }
