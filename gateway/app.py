"""The control plane: everything that is not the hot path. Litestar, with our error envelope."""

from typing import Any

from litestar import Litestar, MediaType, Request, Response, get
from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp

from billing.errors import BillingError
from billing.figures import Figures, read
from gateway.api import (
    account,
    auth,
    docs,
    grants,
    keys,
    operator_accounts,
    operator_keys,
    operator_payments,
    payments,
    upstream_credentials,
)
from gateway.api.body import BODY_BYTES_MAX
from gateway.api.openapi import document
from gateway.api.policy import Policy, guard, require_policies
from gateway.api.refusals import exception_handlers, stamp
from gateway.errors import ApiError, to_api_error
from gateway.health import failing_parts, may_read_metrics
from gateway.metrics import CONTENT_TYPE, figures_text
from gateway.services import Services
from keys.errors import KeysError

__all__ = ["build_app"]

RESOURCES = (
    auth,
    keys,
    upstream_credentials,
    grants,
    account,
    payments,
    operator_accounts,
    operator_keys,
    operator_payments,
)


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
    for resource in RESOURCES:
        handlers += resource.handlers(services)
    handlers += docs.handlers(services, lambda: document(handlers))
    require_policies(handlers)
    return Litestar(
        route_handlers=handlers,
        guards=[guard(services)],
        exception_handlers=exception_handlers(),
        before_send=[stamp],
        request_max_body_size=BODY_BYTES_MAX,
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
