"""What a worker tells the till, or asks it, besides requests: by its one connection.

The command line says the same by a connection of its own (till_scan.py). The book is told first.
Failure: TillUnavailable; then caches end by themselves within 5 seconds, and the till asks the
book about an account before it refuses for good.
"""

from typing import Literal
from uuid import UUID

import msgspec

from billing.errors import TillRefused
from billing.till_link import TillLink
from billing.till_scopes import account_scope_key, key_scope_key


class AccountInTill(msgspec.Struct, frozen=True, kw_only=True):
    """What is spoken for of an account, in nanos."""

    held: int = 0
    """By requests under way."""
    uncommitted: int = 0
    """By requests that ended and are on their way into the book."""
    posted: int | None = None
    """The book's balance as the till knows it; None when the till is cold."""


async def tell_key_revoked(link: TillLink, account_id: UUID, key_id: UUID) -> None:
    """Let `admit` refuse a key at once. Idempotent."""
    await link.command(("HSET", key_scope_key(account_id, key_id), "status", "revoked"))


async def tell_account_status(
    link: TillLink, account_id: UUID, status: Literal["active", "frozen"]
) -> None:
    """Let `admit` refuse an account at once, or no longer. Idempotent."""
    await link.command(("HSET", account_scope_key(account_id), "status", status))


async def read_account(link: TillLink, account_id: UUID) -> AccountInTill:
    """What the till holds back of an account, of one moment. TillRefused: it holds nonsense."""
    key = account_scope_key(account_id)
    found = await link.command(("HMGET", key, "held", "uncommitted", "posted"))
    try:
        held, uncommitted, posted = (None if word is None else int(word) for word in found)
    except ValueError as exc:
        raise TillRefused(f"{key} holds no numbers") from exc
    return AccountInTill(held=held or 0, uncommitted=uncommitted or 0, posted=posted)
