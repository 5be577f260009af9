"""Durations. The event loop wants seconds; config and code that touches money speak integers."""

from datetime import UTC, datetime

Seconds = float


def seconds(milliseconds: int) -> Seconds:
    """Seconds for the event loop."""
    return milliseconds / 1000


def utc_now() -> datetime:
    """Now, with its time zone."""
    return datetime.now(UTC)
