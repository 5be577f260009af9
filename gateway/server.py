"""One worker: uvicorn with our own protocol limits and our own signal handling.

uvicorn would raise a caught SIGTERM again after it stopped, past every `finally`; here the signal
only says that it is time, and everything ends in order.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from config.ids import id_text, new_id
from config.settings import Settings
from gateway.app import build_app
from gateway.asgi import Edge
from gateway.errors import NOT_CHARGED, ApiError
from gateway.metrics import Metrics
from gateway.services import Services, open_services
from gateway.supervisor import BACKLOG

log = logging.getLogger("gateway.server")

# A head beyond the limit is read this far, so that the edge can refuse it with the request's ids.
HEADERS_CUT_FACTOR = 4
# For cut-off requests to count and settle what came; longer than till and book are waited for.
CUT_OFF_S = 5.0
REASONS = {400: "Bad Request", 431: "Request Header Fields Too Large"}


class _Pipelined(Exception):
    """A request came before the answer to the one before it."""


class _Trailer(Exception):
    """A header field after the body: it would pass for one that came before it."""


class Protocol(HttpToolsProtocol):
    """uvicorn's protocol with deadlines and bounds for the head of a request.

    One request at a time: what is sent before the answer to the last one is dropped, and the
    connection closes after that answer. While a queued request kept reading paused, a client that
    hung up would not be noticed.
    """

    headers_timeout_s = 10.0
    headers_bytes_max = 16 * 1024
    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None
    _in_head = True
    _is_deaf = False
    _body_parts = 0
    _bytes_beside_body = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            return
        if self._in_head:
            self._head_bytes += len(data)
        self._unset_keepalive_if_required()
        body_parts = self._body_parts
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as exc:
            self._ignore_upgrade(data[exc.args[0] :])
        except httptools.HttpParserError:
            if not self._is_deaf:
                self._refuse(400, "invalid_request", "This is no valid HTTP/1.1 request.")
        self._count_beside_body(len(data), body_parts)
        if self._in_head and self._head_bytes > self.headers_bytes_max * HEADERS_CUT_FACTOR:
            self._refuse(431, "headers_too_large", "The headers are too large.")
        elif self._head_timer is None and self._is_idle:
            # Empty lines between two requests end the keep-alive timer and begin no request.
            self._wait_for_head()

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _count_beside_body(self, size: int, body_parts: int) -> None:
        """Chunk extensions and trailers bring no body; unbounded they would go on for ever."""
        if self._in_head or self._is_idle or self._body_parts != body_parts:
            self._bytes_beside_body = 0
            return
        self._bytes_beside_body += size
        if self._bytes_beside_body > self.headers_bytes_max * HEADERS_CUT_FACTOR:
            self._refuse(431, "headers_too_large", "The trailers are too large.")

    def on_body(self, body: bytes) -> None:
        self._body_parts += 1
        super().on_body(body)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            raise _Trailer
        super().on_header(name, value)

    def on_message_begin(self) -> None:
        if not self._is_idle:
            self._is_deaf = True
            self.cycle.keep_alive = False
            raise _Pipelined
        super().on_message_begin()
        self._in_head = True
        if self._head_timer is None:
            self._wait_for_head()
        # For a client that stopped reading: closing politely would wait for it.
        self.scope["farebox.abort"] = self.transport.abort  # type: ignore[typeddict-unknown-key]

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # data_received goes on with it
        self._in_head = False
        self._head_bytes = 0
        self._stop_waiting()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Serve a request that offers an upgrade as if it did not: Java's client offers h2c always.

        httptools drops the body of such a request, so its head is parsed again without the offer.
        """
        if self.parser.get_method() == b"CONNECT":
            self._refuse(400, "invalid_request", "This is no proxy.")
            return
        offer = {b"upgrade", b"connection", b"http2-settings"}
        kept = [(name, value) for name, value in self.headers if name not in offer]
        tokens = b",".join(value for name, value in self.headers if name == b"connection")
        if b"close" in tokens.lower():
            kept.append((b"connection", b"close"))
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        lines += [b"%b: %b" % header for header in kept]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.data_received(b"\r\n".join(lines) + b"\r\n\r\n" + rest)

    def _wait_for_head(self) -> None:
        self._head_timer = self.loop.call_later(self.headers_timeout_s, self._head_too_late)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_too_late(self) -> None:
        self._head_timer = None
        if not self._is_idle:
            # A pipelined head is late: the answer before it goes on.
            self._wait_for_head()
        elif not self.transport.is_closing():
            # Never 408 (SDKs repeat it); a client that sends no head reads no answer either.
            self.transport.close()

    def _refuse(self, status: int, code: str, message: str) -> None:
        if self.transport.is_closing():
            return
        if not self._is_idle:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if not self._is_idle and self.cycle.response_started:
            # In the middle of another answer this one would be taken for a part of it.
            self.transport.close()
            return
        error = ApiError(status, code, f"{message} {NOT_CHARGED}")
        request_id = f"req_{id_text(new_id())}"
        body = error.body(request_id)
        head = (
            f"HTTP/1.1 {status} {REASONS[status]}\r\ncontent-type: application/json\r\n"
            f"x-request-id: {request_id}\r\naccess-control-allow-origin: *\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


class Server(uvicorn.Server):
    """A uvicorn server whose signals are handled by the worker."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def run_worker(
    settings: Settings,
    sock: socket.socket,
    say_ready: Callable[[], None],
    multiprocess_dir: str = "",
) -> None:
    """Serve on a listening socket until SIGTERM or SIGINT, then drain and settle.

    A second signal ends the drain; what is open then is settled as it stands.
    Raises BookUnavailable when Postgres cannot be reached at start.
    """
    parent = os.getppid()
    stop = asyncio.Event()
    hurry = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    for sig in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sig, on_signal)
    async with open_services(settings, Metrics(multiprocess_dir), hurry) as services:
        server = make_server(settings, services)
        serving = services.tasks.start(server.serve(sockets=[sock]), "server")
        stopping = services.tasks.start(stop.wait(), "stop")
        say_ready()
        await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
        log.info("worker.draining", extra={"open": services.open_calls})
        services.is_draining = True
        hurrying = services.tasks.start(hurry.wait(), "hurry")
        await drain(server, serving, hurrying)
        if os.getppid() != parent:
            # Killed with our parent, so are embedded stores: nothing is worth waiting for.
            hurry.set()
    log.info("worker.stopped")


async def drain(
    server: uvicorn.Server, serving: asyncio.Task[None], hurrying: asyncio.Task[Any]
) -> None:
    """Let running requests end; once hurrying is done, or uvicorn's patience, cut them off.

    A request that is cut off settles what came before this returns: its task ends after that.
    """
    server.should_exit = True
    await asyncio.wait([serving, hurrying], return_when=asyncio.FIRST_COMPLETED)
    left = list(server.server_state.tasks)
    for task in left:
        task.cancel()
    if left:
        log.warning("requests.cut_off", extra={"count": len(left)})
        await asyncio.wait(left, timeout=CUT_OFF_S)
    server.force_exit = True
    await asyncio.wait([serving], timeout=CUT_OFF_S)


def make_server(settings: Settings, services: Services) -> Server:
    limits, timeouts = settings.limits, settings.timeouts
    protocol = type(
        "ConfiguredProtocol",
        (Protocol,),
        {
            "headers_timeout_s": timeouts.headers_s,
            "headers_bytes_max": limits.headers_bytes_max,
        },
    )
    config = uvicorn.Config(
        Edge(services, build_app(services)),
        http=protocol,
        loop="none",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=settings.server.keepalive_timeout_s,
        timeout_graceful_shutdown=settings.server.drain_timeout_s,
    )
    return Server(config)
