"""Errors of the control plane as our envelope, and the headers that every answer has."""

import logging
from typing import Any

from litestar import MediaType, Request, Response
from litestar.datastructures import MutableScopeHeaders
from litestar.exceptions import (
    HTTPException,
    MethodNotAllowedException,
    NotFoundException,
    ValidationException,
)
from litestar.exceptions.http_exceptions import RequestEntityTooLarge
from litestar.types import ExceptionHandlersMap, Message, Scope

from billing.errors import BillingError
from config.ids import id_text, new_id
from gateway.api.body import BODY_BYTES_MAX, refuse
from gateway.errors import ApiError, internal_error, to_api_error
from keys.errors import KeysError

REQUEST_ID = "request_id"


def exception_handlers() -> ExceptionHandlersMap:
    return {
        ApiError: _on_error,
        KeysError: _on_error,
        BillingError: _on_error,
        HTTPException: _on_http,
        Exception: _on_crash,
    }


async def stamp(message: Message, scope: Scope) -> None:
    """Every answer has a request id; what the API says of money and keys is in no cache."""
    if message["type"] != "http.response.start":
        return
    headers = MutableScopeHeaders.from_message(message)
    headers.setdefault("x-request-id", request_id_of(scope))
    if scope["path"].startswith("/api/"):
        headers.setdefault("cache-control", "no-store")


def request_id_of(scope: Any) -> str:
    """The id of a request, the same whenever it is asked for."""
    state: dict[str, Any] = scope["state"]
    request_id: str = state.setdefault(REQUEST_ID, f"req_{id_text(new_id())}")
    return request_id


def _answer(request: Request[Any, Any, Any], exc: ApiError) -> Response[bytes]:
    return Response(
        exc.body(request_id_of(request.scope)),
        status_code=exc.status,
        media_type=MediaType.JSON,
        headers={name.decode(): value.decode() for name, value in exc.headers},
    )


def _on_error(request: Request[Any, Any, Any], exc: Exception) -> Response[bytes]:
    return _answer(request, to_api_error(exc))


def _on_http(request: Request[Any, Any, Any], exc: Exception) -> Response[bytes]:
    """Litestar's own refusals: its default body is invisible in every SDK."""
    assert isinstance(exc, HTTPException)
    return _answer(request, _translated(request, exc))


def _translated(request: Request[Any, Any, Any], exc: HTTPException) -> ApiError:
    if isinstance(exc, NotFoundException):
        message = f"There is no {request.method} {request.url.path[:200]}."
        return ApiError(404, "unknown_url", message)
    if isinstance(exc, MethodNotAllowedException):
        allowed = (exc.headers or {}).get("allow", "")
        headers = ((b"allow", allowed.encode()),) if allowed else ()
        message = f"{request.method} is not allowed here."
        return ApiError(405, "method_not_allowed", message, headers=headers)
    if isinstance(exc, RequestEntityTooLarge):
        message = f"The body is larger than {BODY_BYTES_MAX} bytes."
        return ApiError(413, "request_too_large", message)
    if isinstance(exc, ValidationException):
        return _invalid(exc)
    if exc.status_code >= 500:
        return internal_error()
    return ApiError(exc.status_code, "invalid_request", exc.detail)


def _invalid(exc: ValidationException) -> ApiError:
    """A parameter or a whole body that is missing or not of its kind."""
    first = exc.extra[0] if isinstance(exc.extra, list) and exc.extra else {}
    param = first.get("key") if isinstance(first, dict) else None
    if not isinstance(param, str):
        return refuse("The request is not what this endpoint takes.")
    if param.startswith("data"):
        return refuse("A JSON object is missing in the body.")
    return refuse("That is not what this parameter takes.", param)


def _on_crash(request: Request[Any, Any, Any], exc: Exception) -> Response[bytes]:
    facts = {"request_id": request_id_of(request.scope)}
    logging.getLogger("gateway.edge").error("request.crashed", exc_info=exc, extra=facts)
    return _answer(request, internal_error())
