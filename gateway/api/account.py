"""`/api/v1/key` and `/api/v1/credits`: what a caller may spend and has spent.

Field names are OpenRouter's, so that tools that read its answers read ours; its numbers are USD
(https://openrouter.ai/docs/api/api-reference/api-keys/get-current-key). Ours come besides.
"""

from datetime import UTC, datetime
from typing import Any, Literal
from uuid import UUID

import msgspec
from litestar import Request, get
from litestar.handlers import HTTPRouteHandler

from billing.errors import TillRefused, TillUnavailable
from billing.spend import Usage, totals_of, usage_of
from billing.till_tell import AccountInTill, read_account
from billing.windows import window_end, window_start
from gateway.api.policy import Policy, caller_of
from gateway.api.shapes import Money, usd_number
from gateway.api.tenant import tenant
from gateway.relay.call import Caller
from gateway.services import Services
from keys import keys_store
from keys.principal import Budget, Window

Reset = Literal["daily", "weekly", "monthly"]
RESETS: dict[Window, Reset] = {"day": "daily", "week": "weekly", "month": "monthly"}


class RateShown(msgspec.Struct, frozen=True, kw_only=True):
    """-1: as many as the gateway's own limits let through."""

    requests: int
    interval: str
    note: str = "Requests per minute of this key; -1 means that it has no limit of its own."


class CallingKey(msgspec.Struct, frozen=True, kw_only=True):
    """The credential of the request. Amounts are USD, as JSON numbers."""

    label: str
    name: str
    id: str | None
    account_id: str
    scopes: list[str]
    limit: Any
    limit_remaining: Any
    limit_reset: Reset | None
    limit_resets_at: datetime | None
    usage: Any
    usage_daily: Any
    usage_weekly: Any
    usage_monthly: Any
    byok_usage: int = 0
    byok_usage_daily: int = 0
    byok_usage_weekly: int = 0
    byok_usage_monthly: int = 0
    include_byok_in_limit: bool = False
    is_free_tier: bool = False
    is_management_key: bool = False
    is_provisioning_key: bool = False
    creator_user_id: str | None = None
    expires_at: datetime | None
    rate_limit: RateShown


class CallingKeyAnswer(msgspec.Struct, frozen=True, kw_only=True):
    data: CallingKey


class Credits(msgspec.Struct, frozen=True, kw_only=True):
    """Totals are USD, as JSON numbers; total_credits minus total_usage is the balance.

    held, pending and available are null while the till does not answer.
    """

    total_credits: Any
    total_usage: Any
    balance: Money
    available: Money | None
    held: Money | None
    pending: Money | None


class CreditsAnswer(msgspec.Struct, frozen=True, kw_only=True):
    data: Credits


def handlers(services: Services) -> list[HTTPRouteHandler]:
    @get("/api/v1/key", policy=Policy.CREDENTIAL)
    async def calling_key(request: Request[Any, Any, Any]) -> CallingKeyAnswer:
        """The key of this request: its limit and what it has spent."""
        return CallingKeyAnswer(data=await _calling_key(services, caller_of(request)))

    @get("/api/v1/credits", policy=Policy.ACCOUNT)
    async def credits(request: Request[Any, Any, Any]) -> CreditsAnswer:
        """What the account got, spent and has left."""
        account_id = caller_of(request).principal.account_id
        return CreditsAnswer(data=await credits_of(services, account_id))

    return [calling_key, credits]


async def _calling_key(services: Services, caller: Caller) -> CallingKey:
    principal, now = caller.principal, datetime.now(UTC)
    account_id, virtual_key_id = principal.account_id, principal.virtual_key_id
    label, name, budget, expires_at = "session", "session", None, principal.expires_at
    async with tenant(services, account_id) as conn:
        usage = await usage_of(conn, account_id, virtual_key_id, now)
        if principal.app_key_id is not None:
            # As the book has it now: the principal may be some seconds old.
            record = await keys_store.find_key(conn, account_id, principal.app_key_id)
            label, name, budget = record.hint, record.name, record.budget
            expires_at = record.expires_at
    limits = principal.key_limits
    start = None if budget is None else window_start(budget.window, now)
    return CallingKey(
        label=label,
        name=name,
        id=None if principal.app_key_id is None else caller.key_text,
        account_id=caller.account_text,
        scopes=sorted(principal.permissions),
        limit=usd_number(None if budget is None else budget.nanos),
        limit_remaining=usd_number(_remaining(budget, usage)),
        limit_reset=None if budget is None else RESETS.get(budget.window),
        limit_resets_at=None
        if budget is None or start is None
        else window_end(budget.window, start),
        usage=usd_number(usage.total),
        usage_daily=usd_number(usage.day),
        usage_weekly=usd_number(usage.week),
        usage_monthly=usd_number(usage.month),
        expires_at=expires_at,
        rate_limit=RateShown(requests=limits.requests_per_minute or -1, interval="1m"),
    )


def _remaining(budget: Budget | None, usage: Usage) -> int | None:
    if budget is None:
        return None
    spent: int = getattr(usage, budget.window)
    return max(budget.nanos - spent, 0)


async def credits_of(services: Services, account_id: UUID) -> Credits:
    """Totals of the book, and what the till holds back."""
    async with tenant(services, account_id) as conn:
        balance, spent = await totals_of(conn, account_id)
    try:
        till: AccountInTill | None = await read_account(services.link, account_id)
    except (TillUnavailable, TillRefused):
        till = None
    return Credits(
        # What changed the balance and was not spent came in as credit, and corrections with it.
        total_credits=usd_number(balance + spent),
        total_usage=usd_number(spent),
        balance=Money.of(balance),
        available=None if till is None else Money.of(_available(till, balance)),
        held=None if till is None else Money.of(till.held),
        pending=None if till is None else Money.of(till.uncommitted),
    )


def _available(till: AccountInTill, balance: int) -> int:
    """As the till sees it: of two moments, what the book has posted and the till has not heard of
    would count twice."""
    return (balance if till.posted is None else till.posted) - till.held - till.uncommitted
