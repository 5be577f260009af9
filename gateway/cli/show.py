"""Tables for people, JSON for programs."""

import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import click
import msgspec

from billing.money import credits_text, usd_text
from config.ids import id_text
from config.names import readable

PIPE_WIDTH = 400
PREFIXES = {
    "request_id": "rcpt_",
    "billing_account_id": "acct_",
    "app_key_id": "key_",
    "grant_id": "grant_",
    "virtual_key_id": "vkey_",
    "operator_key_id": "opkey_",
    "payment_attempt_id": "pay_",
}


def as_json(value: object) -> None:
    """Indented JSON on stdout; ids with their prefix, money as nanos."""
    click.echo(msgspec.json.format(msgspec.json.encode(_plain(value), enc_hook=str)).decode())


def table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """A table on a terminal; on a pipe the same with no width limit. Money is in credits."""
    from rich.console import Console
    from rich.table import Table

    out = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        # Ids are there to be copied: they are never folded, and nothing is ever cut.
        out.add_column(
            column.replace("_nanos", "_credits"),
            no_wrap=column.endswith("_id"),
            overflow="fold",
            justify="right" if is_number(column) else "left",
        )
    for row in rows:
        out.add_row(*(_cell(column, row[column]) for column in columns))
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    # Labels are other people's text: no markup, no emoji names, no colours by content.
    Console(width=width, markup=False, emoji=False, highlight=False).print(out)


def _cell(column: str, value: object) -> str:
    if column.endswith("_nanos") and isinstance(value, int):
        return credits_text(value)
    if isinstance(value, datetime):
        return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return text(column, value)


def pairs(row: Mapping[str, Any]) -> None:
    """One record, a line for each field."""
    width = max(len(name) for name in row)
    for name, value in row.items():
        click.echo(f"{name:<{width}}  {text(name, value)}")


def is_number(column: str) -> bool:
    return column.endswith(("_nanos", "_tokens", "_keys", "receipts", "version"))


def text(column: str, value: object) -> str:
    """A value as people read it: nanos with their credits and USD."""
    if value is None:
        return "-"
    if column.endswith("_nanos") and isinstance(value, int):
        return f"{value} ({credits_text(value)} credits, {_dollars(value)})"
    if isinstance(value, list | tuple):
        return ", ".join(readable(str(item)) for item in value)
    return readable(str(_scalar(column, value)))


def _dollars(nanos: int) -> str:
    return f"-${usd_text(-nanos)}" if nanos < 0 else f"${usd_text(nanos)}"


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {name: _named(name, item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _named(name: str, value: object) -> object:
    return _plain(value) if isinstance(value, Mapping | list) else _scalar(name, value)


def _scalar(name: str, value: object) -> object:
    if isinstance(value, UUID):
        return PREFIXES.get(name, "") + id_text(value)
    if isinstance(value, datetime):
        return value.isoformat(timespec="milliseconds")
    if isinstance(value, Decimal):
        return format(value, "f")
    return value
