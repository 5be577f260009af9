"""`farebox audit`: exit 0 clean, 1 violated, 2 could not check."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gateway.cli import show
from gateway.cli.context import book_connection, common, end, stores

if TYPE_CHECKING:
    from billing.audit import Report

EXIT_VIOLATED, EXIT_NOT_CHECKED = 1, 2


@click.command("audit")
@click.option("--at-rest", is_flag=True, help="Nothing runs: holds and outbox must be empty.")
@common
def audit(config: Path | None, data_dir: Path | None, as_json: bool, at_rest: bool) -> None:
    """Check every nano: ledger, charges, prices, till, keys. Safe while traffic runs."""
    from billing.errors import BillingError
    from gateway.embedded.errors import StoreError
    from migrations.runner import MigrationError

    async def work() -> "Report":
        async with stores(config, data_dir) as urls:
            return await run_audit(urls.book_url, urls.till_url, at_rest)

    try:
        report = asyncio.run(work())
    except (BillingError, StoreError, MigrationError, OSError) as exc:
        reason = getattr(exc, "reason", "") or getattr(exc, "reply", "")
        cause = exc.__cause__ or ""
        end(EXIT_NOT_CHECKED, f"could not check: {exc} {reason or cause}".rstrip())
    if as_json:
        show.as_json(_plain(report))
    else:
        _print(report)
    raise SystemExit(0 if report.is_clean else EXIT_VIOLATED)


async def run_audit(book_url: str, till_url: str, at_rest: bool) -> "Report":
    """One audit of these two stores. Raises a BillingError when it could not check."""
    from billing.audit import audit
    from billing.till_scan import open_till

    async with book_connection(book_url) as conn, open_till(till_url) as till:
        return await audit(conn, till, at_rest=at_rest)


def _plain(report: "Report") -> dict[str, object]:
    import msgspec

    return {
        "clean": report.is_clean,
        "violations": report.violations,
        **msgspec.to_builtins(report),
    }


def _print(report: "Report") -> None:
    rows = [
        {
            "invariant": check.invariant.value,
            "checked": str(check.checked) if not check.not_checked else "-",
            "violations": str(check.violations) if not check.not_checked else "not checked",
            "why": check.not_checked,
        }
        for check in report.checks
    ]
    show.table(["invariant", "checked", "violations", "why"], rows)
    for check in report.checks:
        for finding in check.findings:
            ids = " ".join(f"{name}={value}" for name, value in finding.ids.items())
            said = f"{finding.what}: expected {finding.expected}, found {finding.found}"
            click.echo(f"{check.invariant.value}: {said}  {ids}")
        if check.violations > len(check.findings):
            click.echo(f"{check.invariant.value}: {check.violations - len(check.findings)} more")
    for note in report.notes:
        if note.count:
            amount = "" if note.nanos is None else f" ({show.text('sum_nanos', note.nanos)})"
            click.echo(f"note: {note.what}: {note.count}{amount}")
    click.echo("clean" if report.is_clean else f"{report.violations} violations")
