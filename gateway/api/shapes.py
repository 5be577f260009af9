"""What many routes of the control plane have in common: ids, money, pages, texts."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Generic, TypeVar
from uuid import UUID

import msgspec
from litestar.params import QueryParameter
from msgspec import Meta

from billing.money import credits_text, read_credits, usd_text
from config.ids import id_text, read_id
from config.settings import INT_MAX
from gateway.api.body import refuse

T = TypeVar("T")
R = TypeVar("R")

# Postgres takes no NUL, and lists of people no line breaks. As JavaScript reads it too: `$` alone
# would let Python pass a line break at the end.
PRINTABLE = r"^[^\x00-\x1f\x7f]*$(?!\n)"
Line = Annotated[str, Meta(min_length=1, max_length=200, pattern=PRINTABLE)]
Note = Annotated[str, Meta(min_length=1, max_length=500, pattern=PRINTABLE)]
Amount = Annotated[str, Meta(min_length=1, max_length=40, pattern=r"^[0-9.]*$(?!\n)")]
Count = Annotated[int, Meta(ge=1, le=INT_MAX)]

PageSize = Annotated[int, QueryParameter(ge=1, le=100, description="How many at most.")]
Cursor = Annotated[
    str, QueryParameter(max_length=64, description="`next_cursor` of the page before this one.")
]
PAGE_SIZE = 20


class Money(msgspec.Struct, frozen=True, kw_only=True):
    """An amount as exact decimal strings; 1 credit is $0.001."""

    credits: str
    usd: str

    @classmethod
    def of(cls, nanos: int) -> "Money":
        return cls(credits=credits_text(nanos), usd=usd_text(nanos))


class Page(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """A part of a list, newest first."""

    object: str = "list"
    data: list[T]
    has_more: bool
    next_cursor: str | None


def page_of(
    rows: Sequence[R], limit: int, prefix: str, uid: Callable[[R], UUID], show: Callable[[R], T]
) -> Page[T]:
    """A page of limit rows; one row more than that says that there are more."""
    shown = rows[:limit]
    has_more = len(rows) > limit
    return Page(
        data=[show(row) for row in shown],
        has_more=has_more,
        next_cursor=prefix + id_text(uid(shown[-1])) if has_more else None,
    )


def read_ref(text: str, prefix: str, unknown: Exception) -> UUID:
    """The UUID of an id in a path. Raises unknown for garbage: it is no more than not there."""
    if not text.startswith(prefix):
        raise unknown
    try:
        return read_id(text[len(prefix) :])
    except ValueError:
        raise unknown from None


def read_cursor(text: str, prefix: str) -> UUID | None:
    """Where the page begins. Raises ApiError 400."""
    return read_ref(text, prefix, refuse("That is no cursor.", "cursor")) if text else None


def read_amount(text: str, param: str) -> int:
    """Nanos of an amount of credits above zero. Raises ApiError 400."""
    try:
        nanos = read_credits(text)
    except ValueError:
        message = "That is no amount of credits: a decimal number with 6 decimals at most."
        raise refuse(message, param) from None
    if nanos <= 0:
        raise refuse("The amount must be more than nothing.", param)
    return nanos


def usd_number(nanos: int | None) -> Any:
    """USD as a JSON number, exactly, for those who want a number. None stays None."""
    return None if nanos is None else msgspec.Raw(usd_text(nanos).encode())
