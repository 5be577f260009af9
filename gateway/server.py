"""One worker: uvicorn's server with our own protocol and our own signal handling.

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

import uvicorn

from config.settings import Settings
from gateway.app import build_app
from gateway.edge import Edge
from gateway.http1.protocol import Protocol
from gateway.metrics import Metrics
from gateway.services import Services, open_services
from gateway.supervisor import BACKLOG

log = logging.getLogger("gateway.server")

# For cut-off requests to count and settle what came; longer than till and book are waited for.
CUT_OFF_S = 5.0
# Deadlines of connections are looked at this often: uvicorn calls `on_tick` every 0.1 s.
TICKS_A_SECOND = 10


class Server(uvicorn.Server):
    """A uvicorn server whose signals are handled by the worker.

    It accepts, ticks and drains; what comes over a connection is the protocol's.
    """

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def on_tick(self, counter: int) -> bool:
        """End what waits too long; at a tenth of the shortest patience, at least once a second."""
        protocol: Any = self.config.http_protocol_class
        patience_s = min(protocol.headers_timeout_s, protocol.keepalive_s, TICKS_A_SECOND)
        if counter % max(1, int(patience_s)) == 0:
            now = asyncio.get_running_loop().time()
            late = [conn for conn in self.server_state.connections if conn.ends_at <= now]  # type: ignore[union-attr]
            for conn in late:
                conn.expire()  # type: ignore[union-attr]
        return await super().on_tick(counter)


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
            "keepalive_s": settings.server.keepalive_timeout_s,
            "write_stall_s": timeouts.write_stall_s,
            # More than the default would let a client be farther behind, to nobody's use.
            "unsent_bytes_max": min(limits.stream_buffer_bytes_max, Protocol.unsent_bytes_max),
        },
    )
    config = uvicorn.Config(
        Edge(services, build_app(services)),
        interface="asgi3",  # it is none, and must not be wrapped as if it were an older one
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
