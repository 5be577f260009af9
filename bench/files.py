"""Reports in files."""

from pathlib import Path

import msgspec

from bench.report import VERSION, Report


class NoReport(Exception):
    """The file is no report of this version of the bench."""


def to_json(report: Report) -> bytes:
    return msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n"


def read_report(path: Path) -> Report:
    """Raises NoReport or OSError."""
    try:
        report = msgspec.json.decode(path.read_bytes(), type=Report)
    except msgspec.DecodeError as exc:
        raise NoReport(f"{path}: {exc}") from exc
    if report.version != VERSION:
        raise NoReport(f"{path}: version {report.version}, this bench reads {VERSION}")
    return report
