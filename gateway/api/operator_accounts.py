"""`/api/v1/operator/accounts`: accounts for operators, their credit, and the kill switch.

Freezing is told to the book first and then to the till, where it holds at once; what the till was
not told holds when the workers' caches end (below 5 s). Every action is in the log with its
operator. Failure: BookUnavailable becomes 503; a till that does not answer is only logged.
"""

import logging
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

import msgspec
from litestar import Request, get, post
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath, JSONBody

from billing import accounts, book
from billing.errors import AccountUnknown, TillRefused, TillUnavailable
from billing.till_tell import tell_account_status
from config.ids import id_text
from gateway.api.account import Credits, credits_of
from gateway.api.body import Body
from gateway.api.policy import Policy, operator_of
from gateway.api.shapes import (
    PAGE_SIZE,
    Amount,
    Cursor,
    Line,
    Money,
    Note,
    Page,
    PageSize,
    page_of,
    read_amount,
    read_cursor,
    read_ref,
)
from gateway.services import Services

log = logging.getLogger("gateway.operators")

AnyRequest = Request[Any, Any, Any]
PREFIX = "acct_"
ROOT = "/api/v1/operator/accounts"


class AccountWish(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """label: what people call it."""

    label: Line


class StatusWish(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why an account is frozen or thawed."""

    reason: Note


class GrantWish(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The same reference again grants nothing."""

    credits: Amount
    reference: Line
    note: Note


class AccountShown(msgspec.Struct, frozen=True, kw_only=True):
    """A billing account."""

    id: str
    object: Literal["account"] = "account"
    label: str
    status: Literal["active", "frozen"]
    status_reason: str
    status_changed_at: datetime | None
    is_system_tenant: bool
    balance: Money
    created_at: datetime


class AccountInFull(AccountShown, frozen=True, kw_only=True):
    """A billing account with what it got, spent and has left."""

    credits: Credits


class Granted(msgspec.Struct, frozen=True, kw_only=True):
    """A grant of credit, and the balance after it."""

    object: Literal["grant"] = "grant"
    account_id: str
    reference: str
    granted: Money
    balance: Money


def handlers(services: Services) -> list[HTTPRouteHandler]:
    return [*_accounts(services), *_kill_switch(services), *_credit(services)]


def _accounts(services: Services) -> list[HTTPRouteHandler]:
    @post(ROOT, policy=Policy.OPERATOR, dto=Body[AccountWish], return_dto=None)
    async def create(request: AnyRequest, data: JSONBody[AccountWish]) -> AccountShown:
        """Make a user with a billing account."""
        return await _create(services, operator_of(request), data)

    @get(ROOT, policy=Policy.OPERATOR)
    async def list_accounts(limit: PageSize = PAGE_SIZE, cursor: Cursor = "") -> Page[AccountShown]:
        """All accounts, newest first."""
        before = read_cursor(cursor, PREFIX)
        async with book.acquire(services.pool) as conn:
            rows = await accounts.list_accounts(conn, limit + 1, before=before)
        return page_of(rows, limit, PREFIX, lambda row: row["id"], show_account)

    @get(ROOT + "/{account_id:str}", policy=Policy.OPERATOR)
    async def read(account_id: FromPath[str]) -> AccountInFull:
        """One account."""
        uid = read_account_id(account_id)
        async with book.acquire(services.pool) as conn:
            row = await accounts.find_account(conn, uid)
        fields = msgspec.structs.asdict(show_account(row))
        return AccountInFull(**fields, credits=await credits_of(services, uid))

    return [create, list_accounts, read]


def _kill_switch(services: Services) -> list[HTTPRouteHandler]:
    @post(
        ROOT + "/{account_id:str}/freeze",
        policy=Policy.OPERATOR,
        status_code=200,
        dto=Body[StatusWish],
        return_dto=None,
    )
    async def freeze(
        request: AnyRequest, account_id: FromPath[str], data: JSONBody[StatusWish]
    ) -> AccountShown:
        """The kill switch: no request of this account is served. Streams under way finish."""
        uid = read_account_id(account_id)
        return await _set_status(services, operator_of(request), uid, "frozen", data.reason)

    @post(
        ROOT + "/{account_id:str}/thaw",
        policy=Policy.OPERATOR,
        status_code=200,
        dto=Body[StatusWish],
        return_dto=None,
    )
    async def thaw(
        request: AnyRequest, account_id: FromPath[str], data: JSONBody[StatusWish]
    ) -> AccountShown:
        """Serve an account again."""
        uid = read_account_id(account_id)
        return await _set_status(services, operator_of(request), uid, "active", data.reason)

    return [freeze, thaw]


def _credit(services: Services) -> list[HTTPRouteHandler]:
    @post(
        ROOT + "/{account_id:str}/grants",
        policy=Policy.OPERATOR,
        dto=Body[GrantWish],
        return_dto=None,
    )
    async def grant(
        request: AnyRequest, account_id: FromPath[str], data: JSONBody[GrantWish]
    ) -> Granted:
        """Give credits."""
        uid = read_account_id(account_id)
        return await _grant(services, operator_of(request), uid, data)

    return [grant]


async def _create(services: Services, operator_id: UUID, data: AccountWish) -> AccountShown:
    async with book.acquire(services.pool) as conn:
        account_id = await book.create_account(conn, data.label)
        log.info("account.created", extra=facts(operator_id, account_id))
        return show_account(await accounts.find_account(conn, account_id))


async def _set_status(
    services: Services,
    operator_id: UUID,
    account_id: UUID,
    status: Literal["active", "frozen"],
    reason: str,
) -> AccountShown:
    told = {**facts(operator_id, account_id), "status": status, "reason": reason}
    async with book.acquire(services.pool) as conn:
        row = await accounts.set_status(conn, account_id, status, reason)
    log.warning("account.status_set", extra=told)
    try:
        await tell_account_status(services.link, account_id, status)
    except (TillUnavailable, TillRefused) as exc:
        log.warning("account.till_untold", extra={**told, "error": repr(exc)})
    return show_account(row)


async def _grant(
    services: Services, operator_id: UUID, account_id: UUID, data: GrantWish
) -> Granted:
    nanos = read_amount(data.credits, "credits")
    told = facts(operator_id, account_id)
    async with book.acquire(services.pool) as conn:
        state = await book.grant(conn, account_id, nanos, data.reference, data.note)
    log.info("credit.granted", extra={**told, "nanos": nanos, "reference": data.reference})
    try:
        await services.till.seed_from_book(account_id)
    except (TillUnavailable, TillRefused) as exc:
        # It asks the book before it refuses anybody for want of credit.
        log.warning("account.till_untold", extra={**told, "error": repr(exc)})
    return Granted(
        account_id=PREFIX + id_text(account_id),
        reference=data.reference,
        granted=Money.of(nanos),
        balance=Money.of(state.balance_nanos),
    )


def show_account(row: dict[str, Any]) -> AccountShown:
    fields = dict(row)
    return AccountShown(
        id=PREFIX + id_text(fields.pop("id")),
        balance=Money.of(fields.pop("balance_nanos")),
        **fields,
    )


def read_account_id(text: str) -> UUID:
    return read_ref(text, PREFIX, AccountUnknown())


def facts(operator_id: UUID, account_id: UUID) -> dict[str, str]:
    return {
        "operator_key_id": f"opkey_{id_text(operator_id)}",
        "billing_account_id": PREFIX + id_text(account_id),
    }
