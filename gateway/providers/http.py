"""The pooled HTTP client of the hot path: the only door to aiohttp.

Answers come as they are: no redirects, no cookies, no environment proxies, no decompression that
was not asked for. Deadlines are the relay's; only connecting has one of its own.
"""

import zlib
from collections.abc import Callable, Mapping

import aiohttp

from gateway.providers.upstream import UpstreamFailed

# A gzip bomb is inflated piece by piece, so that the relay's bounds apply.
DECODED_CHUNK_MAX = 1024 * 1024
READ_BUFFER_BYTES = 256 * 1024
# A refused or unresolved connection carried nothing; after it was made, anything may have arrived.
_NOTHING_SENT = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.InvalidURL)


class HttpReply:
    """An aiohttp response as an UpstreamReply."""

    __slots__ = ("_content", "_inflate", "_response", "status")

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self._content = response.content
        self.status = response.status
        encoding = response.headers.get("content-encoding", "identity").lower()
        # 47: zlib or gzip, whichever it is. Some providers compress although told not to.
        self._inflate = zlib.decompressobj(47) if encoding in {"gzip", "deflate"} else None

    def header(self, name: str) -> str | None:
        return self._response.headers.get(name)

    async def pump(self, take: Callable[[bytes], bool]) -> bool:
        while piece := await self.read():
            if not take(piece):
                return True
        return False

    async def read(self) -> bytes:
        inflate = self._inflate
        try:
            if inflate is not None and inflate.unconsumed_tail:
                return self._inflated(inflate.unconsumed_tail)
            while chunk := await self._content.readany():
                data = chunk if inflate is None else self._inflated(chunk)
                if data:
                    return data
        except (aiohttp.ClientError, aiohttp.http_exceptions.HttpProcessingError, OSError) as exc:
            reason = f"the answer broke off: {type(exc).__name__}"
            raise UpstreamFailed(reason, may_have_billed=True) from exc
        if inflate is not None and not inflate.eof:
            raise UpstreamFailed("the compressed answer broke off", may_have_billed=True)
        return b""

    def _inflated(self, chunk: bytes) -> bytes:
        """At most DECODED_CHUNK_MAX bytes of it; the rest waits in `unconsumed_tail`."""
        assert self._inflate is not None
        try:
            return self._inflate.decompress(chunk, DECODED_CHUNK_MAX)
        except zlib.error as exc:
            raise UpstreamFailed("the answer is badly compressed", may_have_billed=True) from exc

    def close(self) -> None:
        if self._content.at_eof():
            self._response.release()
        else:
            self._response.close()


class HttpClient:
    """A connection pool shared by all providers of a worker."""

    def __init__(self, connect_timeout_s: float) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=60, keepalive_timeout=30),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_s),
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            read_bufsize=READ_BUFFER_BYTES,
            max_line_size=16 * 1024,
            max_field_size=16 * 1024,
        )

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> HttpReply:
        """POST and wait for the head. Raises UpstreamFailed."""
        try:
            response = await self._session.post(
                url, data=body, headers=headers, allow_redirects=False
            )
        except _NOTHING_SENT as exc:
            reason = f"no connection: {type(exc).__name__}"
            raise UpstreamFailed(reason, may_have_billed=False) from exc
        except (aiohttp.ClientError, OSError, TimeoutError) as exc:
            reason = f"no answer: {type(exc).__name__}"
            raise UpstreamFailed(reason, may_have_billed=True) from exc
        return HttpReply(response)

    async def close(self) -> None:
        await self._session.close()
