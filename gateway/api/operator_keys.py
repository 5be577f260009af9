"""Operators look at the keys of accounts and revoke any of them. They see no secret, ever."""

import logging
from typing import Any

from litestar import Request, delete, get
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath

from billing import accounts, book
from config.ids import id_text
from gateway.api.key_shapes import KeyShown
from gateway.api.keys import PREFIX, page_of_keys, revoke_of
from gateway.api.operator_accounts import ROOT, facts, read_account_id
from gateway.api.policy import Policy, operator_of
from gateway.api.shapes import PAGE_SIZE, Cursor, Page, PageSize, read_ref
from gateway.services import Services
from keys import keys_store
from keys.errors import KeyNotFound

log = logging.getLogger("gateway.operators")


def handlers(services: Services) -> list[HTTPRouteHandler]:
    @get(ROOT + "/{account_id:str}/keys", policy=Policy.OPERATOR)
    async def list_account_keys(
        account_id: FromPath[str], limit: PageSize = PAGE_SIZE, cursor: Cursor = ""
    ) -> Page[KeyShown]:
        """The API keys of an account, newest first."""
        uid = read_account_id(account_id)
        async with book.acquire(services.pool) as conn:
            await accounts.find_account(conn, uid)
        return await page_of_keys(services, uid, limit, cursor)

    @delete("/api/v1/operator/keys/{key_id:str}", policy=Policy.OPERATOR, status_code=200)
    async def revoke_account_key(
        request: Request[Any, Any, Any], key_id: FromPath[str]
    ) -> KeyShown:
        """Revoke any key, of whatever kind, for good."""
        uid = read_ref(key_id, PREFIX, KeyNotFound())
        async with book.acquire(services.pool) as conn:
            account_id = await keys_store.owner_of_key(conn, uid)
        told = {**facts(operator_of(request), account_id), "app_key_id": PREFIX + id_text(uid)}
        log.warning("operator.key_revoked", extra=told)
        return await revoke_of(services, account_id, uid)

    return [list_account_keys, revoke_account_key]
