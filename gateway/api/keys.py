"""`/api/v1/keys`: people who signed in make, change, rotate and revoke their API keys.

Keys cannot manage keys. A change works within the time to live of the workers' caches (below 5 s),
a revocation at once: the till is told, and `admit` asks it. Streams under way end as they are.
Failure: KeysUnavailable and BookUnavailable become 503. A till that does not answer is only told in
the log: the caches' end does the rest.
"""

import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from litestar import Request, delete, get, patch, post
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath, JSONBody

from billing.book import Connection
from billing.errors import TillRefused, TillUnavailable
from billing.spend import spent_since
from billing.till_tell import tell_key_revoked
from config.ids import id_text
from gateway.api.body import Body
from gateway.api.key_shapes import (
    KeyPatch,
    KeyShown,
    KeyWish,
    KeyWithSecret,
    RotationWish,
    show_key,
    spending_since,
    with_secret,
)
from gateway.api.policy import Policy, caller_of, peppers_of
from gateway.api.shapes import (
    PAGE_SIZE,
    Cursor,
    Page,
    PageSize,
    page_of,
    read_cursor,
    read_ref,
)
from gateway.api.tenant import tenant
from gateway.relay.once import check_key
from gateway.services import Services
from keys import keys_store
from keys.errors import KeyNotFound
from keys.keys_store import KeyRecord, Rotation

log = logging.getLogger("gateway.keys")

AnyRequest = Request[Any, Any, Any]
PREFIX = "key_"


def handlers(services: Services) -> list[HTTPRouteHandler]:
    return [*_reading(services), *_changing(services), *_secrets(services)]


def _reading(services: Services) -> list[HTTPRouteHandler]:
    @get("/api/v1/keys", policy=Policy.SESSION)
    async def list_keys(
        request: AnyRequest, limit: PageSize = PAGE_SIZE, cursor: Cursor = ""
    ) -> Page[KeyShown]:
        """The account's API keys, newest first, revoked ones too."""
        account_id = caller_of(request).principal.account_id
        return await page_of_keys(services, account_id, limit, cursor)

    @get("/api/v1/keys/{key_id:str}", policy=Policy.SESSION)
    async def read(request: AnyRequest, key_id: FromPath[str]) -> KeyShown:
        """One API key."""
        account_id = caller_of(request).principal.account_id
        async with tenant(services, account_id) as conn:
            record = await _own_key(conn, account_id, key_id)
            return await _shown(conn, record)

    return [list_keys, read]


def _changing(services: Services) -> list[HTTPRouteHandler]:
    @patch("/api/v1/keys/{key_id:str}", policy=Policy.SESSION, dto=Body[KeyPatch], return_dto=None)
    async def update(
        request: AnyRequest, key_id: FromPath[str], data: JSONBody[KeyPatch]
    ) -> KeyShown:
        """Change an API key: absent fields stay, null removes a limit."""
        account_id = caller_of(request).principal.account_id
        return await _update(services, account_id, _read_id(key_id), data)

    @delete("/api/v1/keys/{key_id:str}", policy=Policy.SESSION, status_code=200, when_frozen=True)
    async def revoke(request: AnyRequest, key_id: FromPath[str]) -> KeyShown:
        """Revoke an API key for good; again changes nothing."""
        account_id = caller_of(request).principal.account_id
        async with tenant(services, account_id) as conn:
            uid = (await _own_key(conn, account_id, key_id)).id
        return await revoke_of(services, account_id, uid)

    return [update, revoke]


def _secrets(services: Services) -> list[HTTPRouteHandler]:
    @post("/api/v1/keys", policy=Policy.SESSION, dto=Body[KeyWish], return_dto=None)
    async def create(request: AnyRequest, data: JSONBody[KeyWish]) -> KeyWithSecret:
        """Make an API key. Its secret stands in this answer and never again."""
        return await _create(services, caller_of(request).principal.account_id, data)

    @post(
        "/api/v1/keys/{key_id:str}/rotate",
        policy=Policy.SESSION,
        status_code=200,
        dto=Body[RotationWish],
        return_dto=None,
    )
    async def rotate(
        request: AnyRequest, key_id: FromPath[str], data: JSONBody[RotationWish]
    ) -> KeyWithSecret:
        """Give a key a new secret; with the same Idempotency-Key it is the same one again."""
        account_id = caller_of(request).principal.account_id
        rotation = _rotation(services, request, data)
        return await _rotate(services, account_id, _read_id(key_id), rotation)

    return [create, rotate]


async def _create(services: Services, account_id: UUID, wish: KeyWish) -> KeyWithSecret:
    settings = services.settings.keys
    terms = wish.read(services.catalog, settings.mode)
    pepper, most = peppers_of(services)[0], settings.per_account_max
    async with tenant(services, account_id) as conn:
        key_id, new = await keys_store.create_another_key(
            conn, account_id, terms, pepper=pepper, most=most
        )
        record = await keys_store.find_key(conn, account_id, key_id)
        answer = with_secret(await _shown(conn, record), new.secret)
    log.info("key.created", extra=_facts(record))
    return answer


async def page_of_keys(
    services: Services, account_id: UUID, limit: int, cursor: str
) -> Page[KeyShown]:
    """A page of the keys of an account."""
    before = read_cursor(cursor, PREFIX)
    async with tenant(services, account_id) as conn:
        records = await keys_store.list_keys(conn, account_id, limit + 1, before=before)
        by_id = {each.id: each for each in await _all_shown(conn, account_id, records)}
    return page_of(
        records, limit, PREFIX, lambda record: record.id, lambda r: by_id[PREFIX + id_text(r.id)]
    )


async def _update(services: Services, account_id: UUID, key_id: UUID, data: KeyPatch) -> KeyShown:
    changes = data.read(services.catalog)
    async with tenant(services, account_id) as conn:
        record = await keys_store.update_key(conn, account_id, key_id, changes)
        answer = await _shown(conn, record)
    log.info("key.updated", extra=_facts(record))
    return answer


def _rotation(services: Services, request: AnyRequest, data: JSONBody[RotationWish]) -> Rotation:
    once_key = request.headers.get("idempotency-key")
    if once_key is not None:
        check_key(once_key.encode())
    return Rotation(
        peppers=peppers_of(services),
        overlap_s=data.overlap_s,
        once_key=(once_key or "").encode(),
    )


async def _rotate(
    services: Services, account_id: UUID, key_id: UUID, rotation: Rotation
) -> KeyWithSecret:
    async with tenant(services, account_id) as conn:
        record, new = await keys_store.rotate_key(conn, account_id, key_id, rotation)
        answer = with_secret(await _shown(conn, record), new.secret)
    log.info("key.rotated", extra=_facts(record))
    return answer


async def revoke_of(services: Services, account_id: UUID, key_id: UUID) -> KeyShown:
    """The key after it was revoked: in the book first, so that nothing brings it back, then in the
    till, so that it ends at once."""
    async with tenant(services, account_id) as conn:
        record = await keys_store.revoke_key(conn, account_id, key_id)
        answer = await _shown(conn, record)
    log.info("key.revoked", extra=_facts(record))
    try:
        await tell_key_revoked(services.link, account_id, key_id)
    except (TillUnavailable, TillRefused) as exc:
        log.warning("key.till_untold", extra={**_facts(record), "error": repr(exc)})
    return answer


async def _shown(conn: Connection, record: KeyRecord) -> KeyShown:
    """A key with what its budget has left."""
    (one,) = await _all_shown(conn, record.billing_account_id, [record])
    return one


async def _all_shown(
    conn: Connection, account_id: UUID, records: Sequence[KeyRecord]
) -> list[KeyShown]:
    now = datetime.now(UTC)
    since = spending_since(records, now)
    spent = await spent_since(conn, account_id, since) if since else {}
    return [show_key(record, spent.get(record.virtual_key_id, 0), now) for record in records]


async def _own_key(conn: Connection, account_id: UUID, text: str) -> KeyRecord:
    """A key of this account that is no grant. Raises KeyNotFound."""
    record = await keys_store.find_key(conn, account_id, _read_id(text))
    if record.kind != "key":
        raise KeyNotFound
    return record


def _read_id(text: str) -> UUID:
    return read_ref(text, PREFIX, KeyNotFound())


def _facts(record: KeyRecord) -> dict[str, str]:
    return {
        "billing_account_id": f"acct_{id_text(record.billing_account_id)}",
        "app_key_id": PREFIX + id_text(record.id),
    }
