"""Who may call a route of the control plane: every handler says so, and one guard holds it to that.

A handler without a policy keeps the application from being built. Errors are raised as everywhere
and become the envelope at the edge.
"""

from collections.abc import Iterable
from enum import StrEnum
from typing import Any

from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler, HTTPRouteHandler
from litestar.types import Guard

from gateway.errors import ApiError
from gateway.relay.authenticate import credential_of
from gateway.relay.call import Caller
from gateway.services import Services
from keys.api_key import digest, is_well_formed
from keys.errors import KeyInvalid
from keys.principal import Permission
from keys.store import is_operator

POLICY, CALLER = "policy", "caller"
Connection = ASGIConnection[Any, Any, Any, Any]


class Policy(StrEnum):
    """Who may call a route."""

    PUBLIC = "public"
    """Everybody: the handler looks at credentials itself, if at all."""
    SESSION = "session"
    """People who signed in; keys never."""
    ACCOUNT = "account"
    """A session, or a key with the permission `account`."""
    PAYMENTS = "payments"
    """A session, or a key with the permission `payments`."""
    CREDENTIAL = "credential"
    """A session or any valid key, whatever it is permitted."""
    OPERATOR = "operator"
    """Operators; no key and no session of a tenant."""


_PERMISSIONS: dict[Policy, Permission] = {Policy.ACCOUNT: "account", Policy.PAYMENTS: "payments"}


def guard(services: Services) -> Guard:
    """The guard of all routes. It leaves the Caller where `caller_of` finds it."""

    async def enforce(connection: Connection, handler: BaseRouteHandler) -> None:
        policy = Policy(handler.opt[POLICY])
        if policy is Policy.PUBLIC:
            return
        headers = dict(connection.scope["headers"])
        if policy is Policy.OPERATOR:
            await require_operator(services, headers)
            return
        caller = await services.authenticator.authenticate(headers)
        _permit(policy, caller)
        connection.scope["state"][CALLER] = caller

    return enforce


def _permit(policy: Policy, caller: Caller) -> None:
    principal = caller.principal
    if policy is Policy.SESSION and principal.app_key_id is not None:
        raise forbidden("session_required", "Sign in for this: an API key may not do it.")
    wanted = _PERMISSIONS.get(policy)
    if wanted is not None and wanted not in principal.permissions:
        raise forbidden("permission_missing", f"This API key lacks the permission '{wanted}'.")


def forbidden(code: str, message: str) -> ApiError:
    return ApiError(403, code, message, kind="permission_error")


def caller_of(connection: Connection) -> Caller:
    """Who calls a route that needs a session or a key."""
    caller: Caller = connection.scope["state"][CALLER]
    return caller


async def require_operator(services: Services, headers: dict[bytes, bytes]) -> bytes:
    """The digest of the operator's credential. Raises a KeysError for anything else."""
    key = credential_of(headers)
    if not (key.startswith(b"fb_op_") and is_well_formed(key)):
        raise KeyInvalid
    keys = services.settings.keys
    peppers = [pepper for pepper in (keys.pepper, keys.pepper_previous) if pepper]
    digests = [digest(key, pepper.reveal().encode()) for pepper in peppers]
    if not await is_operator(services.pool, digests):
        raise KeyInvalid
    return digests[0]


def require_policies(handlers: Iterable[HTTPRouteHandler]) -> None:
    """Raises RuntimeError when a handler does not say who may call it."""
    for handler in handlers:
        if handler.opt.get(POLICY) not in set(Policy):
            raise RuntimeError(f"{handler} does not say who may call it")
