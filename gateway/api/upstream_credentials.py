"""`/api/v1/keys/{id}/upstream-credentials`: what is sent to a provider for the calls of one key.

Write only: nothing here gives a credential back, and no log names one. A change works within the
time to live of the workers' caches (below 5 s).
Failure: KeysUnavailable and BookUnavailable become 503.
"""

import logging
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal
from uuid import UUID

import msgspec
from litestar import Request, delete, get, put
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath, JSONBody
from msgspec import Meta

from config.ids import id_text
from config.secret import Secret
from gateway.api.body import Body
from gateway.api.policy import Policy, caller_of
from gateway.api.shapes import read_ref
from gateway.api.tenant import tenant
from gateway.errors import ApiError, unavailable
from gateway.services import Services
from keys import upstream_store
from keys.errors import KeyNotFound
from keys.upstream_store import UpstreamCredential

if TYPE_CHECKING:
    from keys.sealed import Sealer

log = logging.getLogger("gateway.upstream_credentials")

AnyRequest = Request[Any, Any, Any]
PATH = "/api/v1/keys/{key_id:str}/upstream-credentials"
# As keys.sealed has it.
Sendable = Annotated[str, Meta(min_length=8, max_length=512, pattern=r"\A[\x21-\x7e]*\Z")]


class CredentialWish(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A credential as it stands behind `Bearer `."""

    key: Sendable

    def __repr__(self) -> str:
        return "CredentialWish(***)"


class CredentialShown(msgspec.Struct, frozen=True, kw_only=True):
    """That there is one, and since when."""

    object: Literal["upstream_credential"] = "upstream_credential"
    provider: str
    created_at: datetime


class CredentialsShown(msgspec.Struct, frozen=True, kw_only=True):
    """All that a key has."""

    object: Literal["list"] = "list"
    data: list[CredentialShown]


def handlers(services: Services) -> list[HTTPRouteHandler]:
    @put(PATH + "/{provider:str}", policy=Policy.SESSION, dto=Body[CredentialWish], return_dto=None)
    async def set_one(
        request: AnyRequest,
        key_id: FromPath[str],
        provider: FromPath[str],
        data: JSONBody[CredentialWish],
    ) -> CredentialShown:
        """Set or replace a key's own credential for a provider."""
        _check_provider(services, provider)
        sealer, (account_id, uid) = _sealer(services), _owned(request, key_id)
        async with tenant(services, account_id) as conn:
            credential = await upstream_store.put_credential(
                conn, account_id, uid, provider, Secret(data.key), sealer=sealer
            )
        log.info("key.credential_set", extra=_facts(account_id, uid, provider))
        return _shown(credential)

    @get(PATH, policy=Policy.SESSION)
    async def list_all(request: AnyRequest, key_id: FromPath[str]) -> CredentialsShown:
        """The providers for which a key has a credential of its own."""
        account_id, uid = _owned(request, key_id)
        async with tenant(services, account_id) as conn:
            found = await upstream_store.list_credentials(conn, account_id, uid)
        return CredentialsShown(data=[_shown(credential) for credential in found])

    @get(PATH + "/{provider:str}", policy=Policy.SESSION)
    async def read(
        request: AnyRequest, key_id: FromPath[str], provider: FromPath[str]
    ) -> CredentialShown:
        """Whether a key has a credential of its own for a provider, and since when."""
        account_id, uid = _owned(request, key_id)
        async with tenant(services, account_id) as conn:
            found = await upstream_store.find_credential(conn, account_id, uid, provider)
        return _shown(found)

    @delete(PATH + "/{provider:str}", policy=Policy.SESSION, status_code=200)
    async def remove(
        request: AnyRequest, key_id: FromPath[str], provider: FromPath[str]
    ) -> CredentialShown:
        """Go back to the provider's own key."""
        account_id, uid = _owned(request, key_id)
        async with tenant(services, account_id) as conn:
            credential = await upstream_store.delete_credential(conn, account_id, uid, provider)
        log.info("key.credential_deleted", extra=_facts(account_id, uid, provider))
        return _shown(credential)

    return [set_one, list_all, read, remove]


def _owned(request: AnyRequest, key_id: str) -> tuple[UUID, UUID]:
    """Who asks, and for which key or grant."""
    prefix = "grant_" if key_id.startswith("grant_") else "key_"
    return caller_of(request).principal.account_id, read_ref(key_id, prefix, KeyNotFound())


def _check_provider(services: Services, name: str) -> None:
    """Raises ApiError 404: nobody but the operator's config names a host that is asked."""
    provider = services.settings.providers.get(name)
    if provider is None or provider.kind == "echo":
        raise ApiError(404, "not_found", "There is no such provider that takes a credential.")


def _sealer(services: Services) -> "Sealer":
    # Costs memory that most workers never need.
    from keys.sealed import sealer_of

    try:
        return sealer_of(services.settings.keys)
    except ValueError as exc:
        raise unavailable("Upstream credentials cannot be kept: the key for it is wrong.") from exc


def _shown(credential: UpstreamCredential) -> CredentialShown:
    return CredentialShown(provider=credential.provider, created_at=credential.created_at)


def _facts(account_id: UUID, key_id: UUID, provider: str) -> dict[str, str]:
    return {
        "billing_account_id": f"acct_{id_text(account_id)}",
        "app_key_id": f"key_{id_text(key_id)}",
        "provider": provider,
    }
