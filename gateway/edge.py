"""The one ASGI callable: `/v1/*` goes to the relay, everything else to Litestar.

Raw on purpose: a framework's routing, injection and response classes would cost more than the
whole relay.
"""

import logging
import re
from collections.abc import Awaitable

from gateway.errors import NOT_CHARGED, ApiError, internal_error
from gateway.relay.call import Arrival
from gateway.relay.http_in import (
    PREFLIGHT,
    Message,
    Receive,
    Scope,
    Send,
    own_headers,
    send_answer,
    send_error,
)
from gateway.relay.models import list_models, one_model
from gateway.relay.pipeline import ROUTE as CHAT
from gateway.relay.pipeline import chat_completions
from gateway.services import Services

log = logging.getLogger("gateway.edge")

MODELS = "/v1/models"
SLASHES = re.compile(r"/{2,}")
# Reachable without /v1 too: half of all base URLs are written without it.
DIALECT = re.compile(r"/(chat/completions|models)(/|$)")


class Edge:
    """The application of one worker."""

    def __init__(self, services: Services, control_plane: object) -> None:
        self._services = services
        self._control_plane = control_plane

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._control_plane(scope, receive, send)  # type: ignore[operator]
            return
        path = scope["path"]
        if path != CHAT:
            path = canonical(path)
            if not path.startswith("/v1/") and path != "/v1":
                await self._control_plane(scope, receive, send)  # type: ignore[operator]
                return
        await self._dialect(path, scope, receive, send)

    async def _dialect(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        arrival = Arrival.now()
        watched = Started(send)
        try:
            await self._dispatch(path, arrival, scope, receive, watched)
        except ApiError as exc:
            self._services.metrics.count_request("/v1", exc.status, exc.code)
            await send_error(send, exc, arrival)
        except Exception:
            log.exception("request.crashed", extra={"request_id": f"req_{arrival.request_id}"})
            self._services.metrics.count_request("/v1", 500, "internal_error")
            if watched.started:
                raise
            await send_error(send, internal_error(), arrival)

    async def _dispatch(
        self, path: str, arrival: Arrival, scope: Scope, receive: Receive, send: Send
    ) -> None:
        method = scope["method"]
        if method == "OPTIONS":
            await send_answer(send, 204, [*own_headers(arrival), *PREFLIGHT], b"")
        elif path == CHAT:
            allow(method, "POST")
            await chat_completions(self._services, arrival, scope, receive, send)
        elif path == MODELS:
            allow(method, "GET")
            await list_models(self._services, arrival, scope, send)
        elif path.startswith(MODELS + "/"):
            allow(method, "GET")
            await one_model(self._services, arrival, scope, send, path[len(MODELS) + 1 :])
        else:
            raise unknown_url(method, path)


class Started:
    """A send that remembers whether the answer was begun."""

    __slots__ = ("_send", "started")

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False

    def __call__(self, message: Message) -> Awaitable[None]:
        self.started = True
        return self._send(message)


def canonical(path: str) -> str:
    """One slash for many, none at the end, `/v1` in front of the dialect's paths."""
    path = SLASHES.sub("/", path).rstrip("/") or "/"
    if path.startswith("/v1/v1/"):
        path = path[3:]
    if DIALECT.match(path):
        return "/v1" + path
    return path


def allow(method: str, allowed: str) -> None:
    if method != allowed and not (allowed == "GET" and method == "HEAD"):
        message = f"{method} is not allowed here, use {allowed}. {NOT_CHARGED}"
        headers = ((b"allow", allowed.encode()),)
        raise ApiError(405, "method_not_allowed", message, headers=headers)


def unknown_url(method: str, path: str) -> ApiError:
    message = (
        f"There is no {method} {path[:200]}. See /v1/chat/completions and /v1/models. {NOT_CHARGED}"
    )
    return ApiError(404, "unknown_url", message)
