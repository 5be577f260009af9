"""The connections to one origin.

Failure: UpstreamFailed with may_have_billed=False: when connecting fails, nothing was sent.
"""

import asyncio
import socket
import ssl
from collections.abc import Sequence

import aiohappyeyeballs
from aiohappyeyeballs import AddrInfoType

from gateway.providers.http_connection import HttpConnection
from gateway.providers.http_target import Origin
from gateway.providers.upstream import UpstreamFailed

NAME_TTL_S = 60.0
# The next address is tried beside one that has not answered for so long: RFC 8305, section 5.
NEXT_ADDRESS_S = 0.25
# Aborted connections are gone in the next turn of the loop.
CLOSE_S = 5.0


class Pool:
    """Idle connections are used again last in, first out: what is not needed grows old."""

    __slots__ = (
        "_addresses",
        "_addresses_until",
        "_emptied",
        "_idle",
        "_is_closed",
        "_lookup",
        "_open",
        "_origin",
        "_tls",
    )

    def __init__(self, origin: Origin, tls: ssl.SSLContext | None) -> None:
        self._origin = origin
        self._tls = tls
        self._idle: list[HttpConnection] = []
        self._open: set[HttpConnection] = set()
        self._emptied: asyncio.Future[None] | None = None
        self._is_closed = False
        self._addresses: Sequence[AddrInfoType] = ()
        self._addresses_until = 0.0
        self._lookup = asyncio.Lock()

    @property
    def is_empty(self) -> bool:
        return not self._open

    def pick(self) -> HttpConnection | None:
        """An idle connection, now the caller's."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_sound():
                return connection
            connection.abort("the connection was closed")
        return None

    async def connect(self, timeout_s: float) -> HttpConnection:
        """A new connection; timeout_s is for name, TCP and TLS together. Raises UpstreamFailed."""
        try:
            async with asyncio.timeout(timeout_s):
                connection = await self._connect()
        # uvloop says RuntimeError of some addresses.
        except (OSError, RuntimeError) as exc:
            self._addresses_until = 0.0
            reason = f"no connection: {type(exc).__name__}"
            raise UpstreamFailed(reason, may_have_billed=False) from exc
        if self._is_closed:
            connection.abort("the client was closed")
        # The peer may have closed it already, or have said something before it was asked.
        if not connection.is_open():
            raise UpstreamFailed("no connection: it was closed", may_have_billed=False)
        return connection

    def gain(self, connection: HttpConnection) -> None:
        self._open.add(connection)

    def keep(self, connection: HttpConnection) -> None:
        self._idle.append(connection)

    def lose(self, connection: HttpConnection) -> None:
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        if self._emptied is not None and not self._open and not self._emptied.done():
            self._emptied.set_result(None)

    def sweep(self, idle_before: float) -> None:
        """Close what was not used since then."""
        old = [c for c in self._idle if c.idle_since <= idle_before]
        del self._idle[: len(old)]
        for connection in old:
            connection.abort("it was idle")

    async def close(self) -> None:
        """Returns when every connection is closed but those still being made, which will be."""
        self._is_closed = True
        self._idle.clear()
        for connection in list(self._open):
            connection.abort("the client was closed")
        if self._open:
            self._emptied = asyncio.get_running_loop().create_future()
            await asyncio.wait({self._emptied}, timeout=CLOSE_S)

    async def _connect(self) -> HttpConnection:
        loop = asyncio.get_running_loop()
        sock = await aiohappyeyeballs.start_connection(
            await self._resolve(), happy_eyeballs_delay=NEXT_ADDRESS_S, interleave=1, loop=loop
        )
        connection = HttpConnection(loop, self)
        try:
            await loop.create_connection(
                lambda: connection,
                sock=sock,
                ssl=self._tls,
                server_hostname=self._origin.host.removesuffix(".") if self._tls else None,
            )
        except BaseException:
            # When this is cancelled at its end, uvloop does not tell the connection of its own.
            if connection in self._open:
                connection.drop()
                self.lose(connection)
            raise
        return connection

    async def _resolve(self) -> Sequence[AddrInfoType]:
        loop = asyncio.get_running_loop()
        # Of all who need a new connection at once, one asks.
        async with self._lookup:
            if not self._addresses or loop.time() > self._addresses_until:
                self._addresses = await loop.getaddrinfo(
                    self._origin.host, self._origin.port, type=socket.SOCK_STREAM
                )
                self._addresses_until = loop.time() + NAME_TTL_S
            return self._addresses
