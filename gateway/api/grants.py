"""`/api/v1/grants`: people who signed in mint credentials for one execution, and take them back.

A grant spends from the account that minted it, within a budget and a time of its own, and its run
and graph stand on its receipts. Keys and grants cannot mint grants.
Failure: KeysUnavailable and BookUnavailable become 503. A till that does not answer is only told in
the log: the caches' end does the rest.
"""

import logging
from datetime import UTC, datetime
from typing import Any, Literal
from uuid import UUID

import msgspec
from litestar import Request, delete, get, post
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath, JSONBody

from billing.errors import TillRefused, TillUnavailable
from billing.till_tell import tell_key_revoked
from config.ids import id_text
from gateway.api.body import Body, refuse
from gateway.api.key_shapes import Models, Moment
from gateway.api.policy import Policy, caller_of, peppers_of
from gateway.api.shapes import (
    PAGE_SIZE,
    Amount,
    Cursor,
    Line,
    Money,
    Page,
    PageSize,
    page_of,
    read_amount,
    read_cursor,
    read_ref,
)
from gateway.api.tenant import tenant
from gateway.catalog import Catalog
from gateway.services import Services
from keys import grants_store
from keys.api_key import Kind
from keys.errors import KeyNotFound
from keys.grants_store import GrantRecord, GrantTerms, check_expiry

log = logging.getLogger("gateway.grants")

AnyRequest = Request[Any, Any, Any]
PREFIX = "grant_"


class GrantBudget(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the grant may spend in all of its life."""

    credits: Amount


class GrantWish(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A grant to mint: for 30 days at most."""

    name: Line = "grant"
    budget: GrantBudget
    expires_at: Moment
    models: Models | None = None
    run_id: Line | None = None
    graph_id: Line | None = None

    def read(self, catalog: Catalog, kind: Kind) -> GrantTerms:
        """Raises ApiError 400."""
        try:
            check_expiry(self.expires_at, datetime.now(UTC))
        except ValueError as exc:
            raise refuse(str(exc), "expires_at") from None
        for number, name in enumerate(self.models or ()):
            if catalog.find(name) is None:
                raise refuse("There is no such model. See GET /v1/models.", f"models[{number}]")
        return GrantTerms(
            name=self.name,
            kind=kind,
            expires_at=self.expires_at,
            budget_nanos=read_amount(self.budget.credits, "budget.credits"),
            models=None if self.models is None else tuple(dict.fromkeys(self.models)),
            run_id=self.run_id,
            graph_id=self.graph_id,
        )


class GrantBudgetShown(msgspec.Struct, frozen=True, kw_only=True):
    """A grant's budget and what is left of it, as far as it is in the book."""

    credits: str
    usd: str
    window: Literal["total"] = "total"
    spent: Money
    remaining: Money


class GrantShown(msgspec.Struct, frozen=True, kw_only=True):
    """A grant without its secret."""

    id: str
    object: Literal["grant"] = "grant"
    name: str
    hint: str
    """The secret's beginning and end."""
    status: Literal["active", "expired", "revoked"]
    budget: GrantBudgetShown
    models: list[str] | None
    run_id: str | None
    graph_id: str | None
    created_at: datetime
    expires_at: datetime
    revoked_at: datetime | None


class GrantWithSecret(GrantShown, frozen=True, kw_only=True):
    """A grant whose secret is shown now and never again."""

    key: str


def handlers(services: Services) -> list[HTTPRouteHandler]:
    @post("/api/v1/grants", policy=Policy.SESSION, dto=Body[GrantWish], return_dto=None)
    async def mint(request: AnyRequest, data: JSONBody[GrantWish]) -> GrantWithSecret:
        """Mint a grant. Its secret stands in this answer and never again."""
        return await _mint(services, caller_of(request).principal.account_id, data)

    @get("/api/v1/grants", policy=Policy.SESSION)
    async def list_grants(
        request: AnyRequest, limit: PageSize = PAGE_SIZE, cursor: Cursor = ""
    ) -> Page[GrantShown]:
        """The account's grants, newest first, ended ones too."""
        account_id, before = caller_of(request).principal.account_id, read_cursor(cursor, PREFIX)
        async with tenant(services, account_id) as conn:
            records = await grants_store.list_grants(conn, account_id, limit + 1, before=before)
        return page_of(records, limit, PREFIX, lambda record: record.id, _shown)

    @get("/api/v1/grants/{grant_id:str}", policy=Policy.SESSION)
    async def read(request: AnyRequest, grant_id: FromPath[str]) -> GrantShown:
        """One grant."""
        account_id, uid = caller_of(request).principal.account_id, _read_id(grant_id)
        async with tenant(services, account_id) as conn:
            return _shown(await grants_store.find_grant(conn, account_id, uid))

    @delete(
        "/api/v1/grants/{grant_id:str}", policy=Policy.SESSION, status_code=200, when_frozen=True
    )
    async def revoke(request: AnyRequest, grant_id: FromPath[str]) -> GrantShown:
        """Revoke a grant for good; again changes nothing. Streams under way end as they are."""
        account_id, uid = caller_of(request).principal.account_id, _read_id(grant_id)
        return await _revoke(services, account_id, uid)

    return [mint, list_grants, read, revoke]


async def _mint(services: Services, account_id: UUID, wish: GrantWish) -> GrantWithSecret:
    settings = services.settings
    terms = wish.read(services.catalog, settings.keys.mode)
    async with tenant(services, account_id) as conn:
        record, new = await grants_store.create_grant(
            conn,
            account_id,
            terms,
            pepper=peppers_of(services)[0],
            open_max=settings.limits.open_grants_per_account,
        )
    log.info("grant.minted", extra=_facts(record))
    return GrantWithSecret(**msgspec.structs.asdict(_shown(record)), key=new.secret)


async def _revoke(services: Services, account_id: UUID, grant_id: UUID) -> GrantShown:
    """In the book first, so that no seed of the till brings it back, then in the till."""
    async with tenant(services, account_id) as conn:
        record = await grants_store.revoke_grant(conn, account_id, grant_id)
    log.info("grant.revoked", extra=_facts(record))
    try:
        await tell_key_revoked(services.link, account_id, grant_id)
    except (TillUnavailable, TillRefused) as exc:
        log.warning("grant.till_untold", extra={**_facts(record), "error": repr(exc)})
    return _shown(record)


def _shown(record: GrantRecord) -> GrantShown:
    whole, spent = Money.of(record.budget_nanos), record.spent_nanos
    return GrantShown(
        id=PREFIX + id_text(record.id),
        name=record.name,
        hint=record.hint,
        status=record.state(datetime.now(UTC)),
        budget=GrantBudgetShown(
            credits=whole.credits,
            usd=whole.usd,
            spent=Money.of(spent),
            remaining=Money.of(max(record.budget_nanos - spent, 0)),
        ),
        models=None if record.models is None else list(record.models),
        run_id=record.run_id,
        graph_id=record.graph_id,
        created_at=record.created_at,
        expires_at=record.expires_at,
        revoked_at=record.revoked_at,
    )


def _read_id(text: str) -> UUID:
    return read_ref(text, PREFIX, KeyNotFound())


def _facts(record: GrantRecord) -> dict[str, str]:
    return {
        "billing_account_id": f"acct_{id_text(record.billing_account_id)}",
        "app_key_id": f"key_{id_text(record.id)}",
    }
