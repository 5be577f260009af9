"""The server's end of one HTTP/1.1 connection: the only door to httptools on this side.

One request at a time: what is sent before the answer to the last one is dropped, and the
connection closes after that answer. While a queued request kept reading paused, a client that
hung up would not be noticed. A request's task starts when its first packet is parsed to the end,
so most bodies are there before anybody has to wait for them.
"""

import asyncio
import functools
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

import httptools

from config.ids import id_text, new_id
from gateway.errors import NOT_CHARGED, ApiError
from gateway.http1.exchange import Exchange, Header

if TYPE_CHECKING:
    from uvicorn import Config
    from uvicorn.server import ServerState

# A head beyond the limit is read this far, so that the edge can refuse it with the request's ids.
HEADERS_CUT_FACTOR = 4
NEVER = float("inf")
REASONS = {400: "Bad Request", 431: "Request Header Fields Too Large"}
OFFER = {b"upgrade", b"connection", b"http2-settings"}


class _Pipelined(Exception):
    """A request came before the answer to the one before it."""


class _Trailer(Exception):
    """A header field after the body: it would pass for one that came before it."""


class _BadTarget(Exception):
    """A target that is no URL."""


@functools.lru_cache(maxsize=1)
def _rendered(headers: tuple[Header, ...]) -> bytes:
    return b"".join([b"%b: %b\r\n" % header for header in headers])


def _is_url(target: bytes) -> bool:
    if target.startswith(b"/"):
        return target.isascii()
    try:
        urlsplit(target)
    except ValueError:  # neither ASCII nor, with a bracket too many, a host
        return False
    return True


class Protocol(asyncio.Protocol):
    """Parses, keeps the limits of a head, and hands each request to `app(exchange)` in a task.

    Made by uvicorn's server, which knows of `shutdown`, the set of connections and the tasks.
    Deadlines are only marked here: `expire` is called for those that are over.
    """

    headers_timeout_s: ClassVar[float] = 10.0
    headers_bytes_max: ClassVar[int] = 16 * 1024
    keepalive_s: ClassVar[float] = 5.0
    write_stall_s: ClassVar[float] = 30.0
    unsent_bytes_max: ClassVar[int] = 64 * 1024

    def __init__(
        self, config: "Config", server_state: "ServerState", app_state: object, _loop: object = None
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.app: Any = config.loaded_app
        self.exchange: Exchange | None = None
        self.is_blocked = False
        self.ends_at = NEVER
        self._state = server_state
        self.transport: Any = None
        self._parser: Any = None
        self._url = b""
        self._headers: list[Header] = []
        self._head_bytes = 0
        self._packet_bytes = 0
        self._in_head = True
        self._in_keepalive = False
        self._is_deaf = False
        self._is_new = False
        self._is_reading_paused = False
        self._body_parts = 0
        self._bytes_beside_body = 0
        self._unsent_bytes = 0

    # The transport's side

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.set_write_buffer_limits(high=self.unsent_bytes_max)
        self._state.connections.add(self)  # type: ignore[arg-type]
        self._new_parser()
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._state.connections.discard(self)
        self.ends_at = NEVER
        self._parser = None
        self.is_blocked = False
        # Nothing of a lost connection is left for the garbage collection.
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            exchange.lose()

    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            return
        self._packet_bytes = len(data)
        if self._in_head:
            self._head_bytes += len(data)
        if self._in_keepalive:
            # Empty lines between two requests end the keep-alive and begin no request.
            self._expect_head()
        body_parts = self._body_parts
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as exc:
            self._ignore_upgrade(data[exc.args[0] :])
            return
        except httptools.HttpParserError:
            if not self._is_deaf:
                self._refuse(400, "invalid_request", "This is no valid HTTP/1.1 request.")
        if self._is_new:
            self._start()
        else:
            self._count_beside_body(len(data), body_parts)
        if self._in_head and self._head_bytes > self.headers_bytes_max * HEADERS_CUT_FACTOR:
            self._refuse(431, "headers_too_large", "The headers are too large.")

    def pause_writing(self) -> None:
        self.is_blocked = True

    def resume_writing(self) -> None:
        self.is_blocked = False
        if self._is_idle:
            self.resume_reading()
        elif self.exchange is not None:
            self.exchange.wake()

    # The parser's side

    def on_message_begin(self) -> None:
        if not self._is_idle:
            assert self.exchange is not None
            self._is_deaf = True
            self.exchange.keep_alive = False
            raise _Pipelined
        self._url = b""
        self._headers = []
        if not self._in_head:
            self._in_head = True
            self._head_bytes = self._packet_bytes
        if self.ends_at == NEVER:
            self._expect_head()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            raise _Trailer
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        parser = self._parser
        if parser.should_upgrade():
            return  # data_received goes on with it
        if not _is_url(self._url):
            raise _BadTarget
        self._in_head = False
        self.ends_at = NEVER
        self.exchange = Exchange(
            self,
            parser.get_method(),
            self._url,
            self._headers,
            keep_alive=parser.should_keep_alive() and parser.get_http_version() != "1.0",
            head_bytes=self._head_bytes,
        )
        self._head_bytes = 0
        self._is_new = True

    def on_body(self, body: bytes) -> None:
        self._body_parts += 1
        if self.exchange is not None:
            self.exchange.feed(body)

    def on_message_complete(self) -> None:
        if self.exchange is not None and not self._parser.should_upgrade():
            self.exchange.feed_end()

    # The exchange's side

    def default_lines(self) -> bytes:
        """Headers of every answer, as uvicorn renews them each second."""
        return _rendered(tuple(self._state.default_headers))

    def write(self, data: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(data)

    def pause_reading(self) -> None:
        if not self._is_reading_paused and not self.transport.is_closing():
            self._is_reading_paused = True
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        if self._is_reading_paused and not self.transport.is_closing():
            self._is_reading_paused = False
            self.transport.resume_reading()

    def abort(self) -> None:
        self.transport.abort()

    def answered(self, exchange: Exchange) -> None:
        """The answer is written: wait for the next request, or close."""
        self._state.total_requests += 1
        if not exchange.keep_alive:
            self._close()
            return
        self._expect_end()
        self._in_keepalive = True
        if self.is_blocked:
            # Who does not take its answer could ask for more and more of them.
            self.pause_reading()
        else:
            self.resume_reading()

    def peer(self) -> tuple[str, int] | None:
        name = self.transport.get_extra_info("peername")
        return name[:2] if isinstance(name, tuple) else None

    # The server's side

    def shutdown(self) -> None:
        """Close now, or after the answer that is under way."""
        if self._is_idle:
            self.transport.close()
        else:
            assert self.exchange is not None
            self.exchange.keep_alive = False

    def expire(self) -> None:
        """`ends_at` is over: no head came in time, or no further request.

        Never 408 (SDKs repeat it); a client that sends no head reads no answer either.
        """
        if not self._is_idle:
            self.ends_at = NEVER
            return
        before, self._unsent_bytes = self._unsent_bytes, self.transport.get_write_buffer_size()
        if not self._unsent_bytes:
            self.ends_at = NEVER
            self.transport.close()
        elif before and self._unsent_bytes >= before:
            # It takes nothing any more: closing politely would keep the rest for ever.
            self.ends_at = NEVER
            self.transport.abort()
        else:
            self.ends_at = self.loop.time() + self.write_stall_s

    @property
    def _is_idle(self) -> bool:
        return self.exchange is None or self.exchange.is_over

    def _new_parser(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        # A request after `connection: close` is dropped like every other pipelined one.
        self._parser.set_dangerous_leniencies(lenient_data_after_close=True)

    def _expect_head(self) -> None:
        self._in_keepalive = False
        self.ends_at = self.loop.time() + self.headers_timeout_s

    def _expect_end(self) -> None:
        self._unsent_bytes = 0
        self.ends_at = self.loop.time() + self.keepalive_s

    def _close(self) -> None:
        """Close when all is sent, which `expire` watches over."""
        self._expect_end()
        self.transport.close()

    def _start(self) -> None:
        self._is_new = False
        exchange = self.exchange
        assert exchange is not None
        if exchange.is_over:
            return
        tasks = self._state.tasks
        task = self.loop.create_task(self._serve(exchange))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async def _serve(self, exchange: Exchange) -> None:
        try:
            await self.app(exchange)
        finally:
            if not exchange.is_over:
                # Cut off or crashed in the middle: the client must not take it for a whole answer.
                exchange.lose()
                self._close()

    def _count_beside_body(self, size: int, body_parts: int) -> None:
        """Chunk extensions and trailers bring no body; unbounded they would go on for ever."""
        if self._in_head or self._is_idle or self._body_parts != body_parts:
            self._bytes_beside_body = 0
            return
        self._bytes_beside_body += size
        if self._bytes_beside_body > self.headers_bytes_max * HEADERS_CUT_FACTOR:
            self._refuse(431, "headers_too_large", "The trailers are too large.")

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Serve a request that offers an upgrade as if it did not: Java's client offers h2c always.

        httptools drops the body of such a request, so its head is parsed again without the offer.
        """
        if self._parser.get_method() == b"CONNECT":
            self._refuse(400, "invalid_request", "This is no proxy.")
            return
        kept = [(name, value) for name, value in self._headers if name not in OFFER]
        tokens = b",".join(value for name, value in self._headers if name == b"connection")
        if b"close" in tokens.lower():
            kept.append((b"connection", b"close"))
        version = self._parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self._parser.get_method(), self._url, version)]
        lines += [b"%b: %b" % header for header in kept]
        self._new_parser()
        self.data_received(b"\r\n".join(lines) + b"\r\n\r\n" + rest)

    def _refuse(self, status: int, code: str, message: str) -> None:
        if self.transport.is_closing():
            return
        exchange = self.exchange
        if exchange is not None and not exchange.is_over:
            exchange.lose()
            if exchange.is_started:
                # In the middle of another answer this one would be taken for a part of it.
                self._close()
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
        self._close()
