"""Where every request arrives: `/v1/*` goes to the relay, everything else to Litestar.

Raw on purpose: a framework's routing, injection and response classes would cost more than the
whole relay.
"""

import logging
import re

from gateway.errors import NOT_CHARGED, ApiError, internal_error
from gateway.http1.asgi import serve_asgi
from gateway.http1.exchange import Exchange
from gateway.relay.call import Arrival
from gateway.relay.http_in import PREFLIGHT, own_headers, send_answer, send_error
from gateway.relay.models import list_models, one_model
from gateway.relay.pipeline import ROUTE as CHAT
from gateway.relay.pipeline import chat_completions
from gateway.services import Services

log = logging.getLogger("gateway.edge")

CHAT_TARGET = CHAT.encode()
MODELS = "/v1/models"
SLASHES = re.compile(r"/{2,}")
# Reachable without /v1 too: half of all base URLs are written without it.
DIALECT = re.compile(r"/(chat/completions|models)(/|$)")


class Edge:
    """The application of one worker."""

    def __init__(self, services: Services, control_plane: object) -> None:
        self._services = services
        self._control_plane = control_plane

    async def __call__(self, exchange: Exchange) -> None:
        arrival = Arrival.now()
        try:
            if exchange.target == CHAT_TARGET and exchange.method == b"POST":
                await chat_completions(self._services, arrival, exchange)
                return
            path = canonical(exchange.path)
            if path.startswith("/v1/") or path == "/v1":
                await self._dispatch(path, arrival, exchange)
            else:
                await self._control(exchange)
        except ApiError as exc:
            self._services.metrics.count_request("/v1", exc.status, exc.code)
            send_error(exchange, exc, arrival)
        except Exception:
            log.exception("request.crashed", extra={"request_id": f"req_{arrival.request_id}"})
            self._services.metrics.count_request("/v1", 500, "internal_error")
            if not exchange.is_started:
                send_error(exchange, internal_error(), arrival)

    async def _control(self, exchange: Exchange) -> None:
        timeouts = self._services.settings.timeouts
        body_s, stall_s = timeouts.body_s, timeouts.write_stall_s
        await serve_asgi(self._control_plane, exchange, body_s=body_s, write_stall_s=stall_s)

    async def _dispatch(self, path: str, arrival: Arrival, exchange: Exchange) -> None:
        method = exchange.method.decode("ascii")
        if method == "OPTIONS":
            send_answer(exchange, 204, [*own_headers(arrival), *PREFLIGHT], b"")
        elif path == CHAT:
            allow(method, "POST")
            await chat_completions(self._services, arrival, exchange)
        elif path == MODELS:
            allow(method, "GET")
            await list_models(self._services, arrival, exchange)
        elif path.startswith(MODELS + "/"):
            allow(method, "GET")
            await one_model(self._services, arrival, exchange, path[len(MODELS) + 1 :])
        else:
            raise unknown_url(method, path)


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
