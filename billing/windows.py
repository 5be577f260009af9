"""The windows of budgets, all of UTC: day, week (from Monday), month, or everything. Pure."""

from datetime import UTC, datetime, timedelta
from typing import Literal

Window = Literal["day", "week", "month", "total"]

BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)


def window_start(window: Window, moment: datetime) -> datetime:
    """When the window began that this moment is in."""
    day = moment.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    if window == "day":
        return day
    if window == "week":
        return day - timedelta(days=day.weekday())
    return day.replace(day=1) if window == "month" else BEGINNING


def window_end(window: Window, start: datetime) -> datetime | None:
    """When a window ends that began then; None: never."""
    if window == "day":
        return start + timedelta(days=1)
    if window == "week":
        return start + timedelta(days=7)
    # Any month is over 31 days after its beginning, and the next one is not.
    return (start + timedelta(days=31)).replace(day=1) if window == "month" else None
