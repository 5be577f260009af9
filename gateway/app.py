"""The control plane: everything that is not the hot path. Litestar, with our error envelope."""

import logging
from typing import Any

from litestar import Litestar, MediaType, Request, Response, get
from litestar.exceptions import HTTPException, MethodNotAllowedException, NotFoundException
from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp

from billing.errors import BillingError
from billing.figures import Figures, read
from config.ids import id_text, new_id
from gateway.api import docs
from gateway.api.openapi import document
from gateway.api.policy import Policy, guard, require_policies
from gateway.errors import ApiError, internal_error, to_api_error
from gateway.health import failing_parts, may_read_metrics
from gateway.metrics import CONTENT_TYPE, figures_text
from gateway.services import Services
from keys.errors import KeysError

__all__ = ["build_app"]


def build_app(services: Services) -> ASGIApp:
    """The Litestar application of one worker."""

    @get("/livez", media_type=MediaType.JSON, sync_to_thread=False, policy=Policy.PUBLIC)
    def livez() -> dict[str, str]:
        """200 as long as the process answers."""
        return {"status": "ok"}

    @get("/readyz", media_type=MediaType.JSON, policy=Policy.PUBLIC)
    async def readyz() -> Response[dict[str, Any]]:
        """200 when requests can be served: both stores answer and nobody is shutting us down."""
        failing = await failing_parts(services)
        status = 503 if failing else 200
        return Response({"ready": not failing, "failing": failing}, status_code=status)

    @get("/metrics", policy=Policy.PUBLIC)
    async def metrics(request: Request[Any, Any, Any]) -> Response[bytes]:
        """Prometheus text format, for the metrics token or an operator key."""
        if not await _is_reader(services, request.headers.get("authorization", "")):
            message = "Send the metrics token or an operator key as bearer."
            headers = ((b"www-authenticate", b"Bearer"),)
            kind = "authentication_error"
            raise ApiError(401, "invalid_api_key", message, kind=kind, headers=headers)
        services.metrics.fold()
        text = await services.aside.run(services.metrics.text)
        text += figures_text(await _figures(services))
        return Response(text, media_type=CONTENT_TYPE.decode())

    handlers: list[HTTPRouteHandler] = [livez, readyz, metrics]
    handlers += docs.handlers(services, lambda: document(handlers))
    require_policies(handlers)
    return Litestar(
        route_handlers=handlers,
        guards=[guard(services)],
        exception_handlers={
            ApiError: _on_error,
            KeysError: _on_error,
            BillingError: _on_error,
            HTTPException: _on_http,
            Exception: _on_crash,
        },
        request_max_body_size=services.settings.limits.body_bytes_max,
        openapi_config=None,
        logging_config=None,
    )


async def _is_reader(services: Services, authorization: str) -> bool:
    try:
        return await may_read_metrics(services, authorization)
    except KeysError as exc:
        raise to_api_error(exc) from exc


async def _figures(services: Services) -> tuple[Figures, int] | None:
    """What the work process published; nothing when the till is away."""
    try:
        return await read(services.link)
    except BillingError:
        return None


def _answer(exc: ApiError) -> Response[bytes]:
    request_id = f"req_{id_text(new_id())}"
    headers = {name.decode(): value.decode() for name, value in exc.headers}
    return Response(
        exc.body(request_id),
        status_code=exc.status,
        media_type=MediaType.JSON,
        headers={**headers, "x-request-id": request_id},
    )


def _on_error(_: Request[Any, Any, Any], exc: Exception) -> Response[bytes]:
    return _answer(to_api_error(exc))


def _on_http(request: Request[Any, Any, Any], exc: Exception) -> Response[bytes]:
    """Litestar's own refusals: its default body is invisible in every SDK."""
    assert isinstance(exc, HTTPException)
    if isinstance(exc, NotFoundException):
        message = f"There is no {request.method} {request.url.path[:200]}."
        return _answer(ApiError(404, "unknown_url", message))
    if isinstance(exc, MethodNotAllowedException):
        message = f"{request.method} is not allowed here."
        return _answer(ApiError(405, "method_not_allowed", message))
    return _answer(ApiError(exc.status_code, "invalid_request", exc.detail))


def _on_crash(_: Request[Any, Any, Any], exc: Exception) -> Response[bytes]:
    logging.getLogger("gateway.edge").error("request.crashed", exc_info=exc)
    return _answer(internal_error())
