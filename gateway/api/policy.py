"""Who may call a route of the control plane: every handler says so, and one guard holds it to that.

A handler without a policy keeps the application from being built. Errors are raised as everywhere
and become the envelope at the edge.
"""

from collections.abc import Iterable
from enum import StrEnum
from typing import Any
from uuid import UUID

from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler, HTTPRouteHandler
from litestar.types import Guard

from gateway.errors import ApiError
from gateway.relay.authenticate import credential_of
from gateway.relay.bars import caller_address, check_address
from gateway.relay.call import Caller
from gateway.services import Services
from gateway.single_headers import by_name
from keys.errors import KeyInvalid
from keys.principal import Permission

POLICY, CALLER, OPERATOR = "policy", "caller", "operator"
# Of a handler that ends sessions or keys: freezing an account must not keep its owner from throwing
# out whoever it was frozen for, or all of them are back when it is thawed.
WHEN_FROZEN = "when_frozen"
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
        if connection.scope.get("method") == "OPTIONS" and POLICY not in handler.opt:
            return  # the framework's own answer, which names the methods and does nothing
        policy = Policy(handler.opt[POLICY])
        if policy is Policy.PUBLIC:
            return
        headers = by_name(list(connection.scope["headers"]))
        if policy is Policy.OPERATOR:
            connection.scope["state"][OPERATOR] = await require_operator(services, headers)
            return
        method = str(connection.scope.get("method", "")).encode()
        caller = await services.authenticator.authenticate(
            headers, method, may_be_frozen=bool(handler.opt.get(WHEN_FROZEN))
        )
        if caller.bars is not None:
            peer = connection.scope.get("client")
            check_address(
                caller.bars, caller_address(peer, connection.scope["headers"], services.settings)
            )
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


def operator_of(connection: Connection) -> UUID:
    """Which operator key calls a route of operators."""
    operator_id: UUID = connection.scope["state"][OPERATOR]
    return operator_id


async def require_operator(services: Services, headers: dict[bytes, bytes]) -> UUID:
    """The operator key of a request. Raises a KeysError for anything else."""
    operator_id = await services.operators.find(credential_of(headers))
    if operator_id is None:
        raise KeyInvalid
    return operator_id


def peppers_of(services: Services) -> list[bytes]:
    """The pepper in use, then the one before it while keys still have that."""
    return services.operators.peppers


def require_policies(handlers: Iterable[HTTPRouteHandler]) -> None:
    """Raises RuntimeError when a handler does not say who may call it."""
    for handler in handlers:
        if handler.opt.get(POLICY) not in set(Policy):
            raise RuntimeError(f"{handler} does not say who may call it")
