"""The HTTP/1.1 client of the hot path.

Answers come as they are: no redirects, no cookies, no environment proxies, no decompression that
was not needed. A request is sent once and never repeated. Deadlines are the relay's; only
connecting has one of its own.
Failure: UpstreamFailed.
"""

import asyncio
import re
import ssl
from collections.abc import Mapping

from config.secret import Secret
from gateway.providers.http_pool import Pool
from gateway.providers.http_reply import HttpReply
from gateway.providers.http_target import HEAD_END, Origin, read_url, request_head

IDLE_S = 30.0
BEARER = re.compile(rb"[\x21-\x7e]+")


class Target:
    """One URL with its headers, ready to be sent."""

    __slots__ = ("head", "pool")

    def __init__(self, pool: Pool, head: bytes) -> None:
        self.pool = pool
        self.head = head

    def authorized(self, key: Secret) -> "Target":
        """The same, with a bearer credential: printable ASCII without spaces."""
        bearer = key.reveal().encode("ascii")
        assert BEARER.fullmatch(bearer)
        start = self.head.removesuffix(HEAD_END)
        return Target(self.pool, b"%bauthorization: Bearer %b\r\n%b" % (start, bearer, HEAD_END))


class HttpClient:
    """Connections shared by all providers of a worker. Made inside a running loop, closed once."""

    def __init__(
        self,
        connect_timeout_s: float,
        *,
        idle_s: float = IDLE_S,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`tls` replaces the usual trust (the system's certificates, SSL_CERT_FILE)."""
        self._connect_timeout_s = connect_timeout_s
        self._idle_s = idle_s
        self._tls = tls
        self._pools: dict[Origin, Pool] = {}
        self._sweeper: asyncio.TimerHandle | None = None
        self._is_closed = False

    def target(self, url: str, headers: Mapping[str, str]) -> Target:
        """Prepare POSTs to a URL. Raises ValueError, which shows no value of a header."""
        origin, path = read_url(url)
        head = request_head(origin, path, headers)
        pool = self._pools.get(origin)
        if pool is None:
            tls = self._trust() if origin.is_tls else None
            pool = self._pools[origin] = Pool(origin, tls)
        return Target(pool, head)

    async def post(self, target: Target, body: bytes) -> HttpReply:
        """POST and wait for the head. Raises UpstreamFailed. Cancelling closes the connection."""
        connection = target.pool.pick()
        if connection is None:
            self._keep_sweeping()
            connection = await target.pool.connect(self._connect_timeout_s)
        waiter = connection.send(target.head, body)
        # crash-point: upstream.written
        try:
            return await waiter
        except asyncio.CancelledError:
            connection.give_up(waiter)
            raise

    async def close(self) -> None:
        """Close all connections; what is under way fails."""
        self._is_closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        for pool in self._pools.values():
            await pool.close()

    def _trust(self) -> ssl.SSLContext:
        if self._tls is None:
            # Reads all certificates of the system, so it is made when one is needed.
            self._tls = ssl.create_default_context()
            self._tls.set_alpn_protocols(["http/1.1"])
        return self._tls

    def _keep_sweeping(self) -> None:
        if self._sweeper is None and not self._is_closed:
            loop = asyncio.get_running_loop()
            self._sweeper = loop.call_later(self._idle_s / 4, self._sweep)

    def _sweep(self) -> None:
        """One timer for all connections, and none while there are no connections."""
        self._sweeper = None
        idle_before = asyncio.get_running_loop().time() - self._idle_s
        for pool in self._pools.values():
            pool.sweep(idle_before)
        if not all(pool.is_empty for pool in self._pools.values()):
            self._keep_sweeping()
