"""The client's side of a request: headers, body, answers. No money here."""

import asyncio
import time
from collections.abc import Iterable, Mapping

from gateway.errors import NOT_CHARGED, ApiError, late_body, unavailable
from gateway.http1.exchange import Exchange, Header
from gateway.relay.call import Arrival

EXPOSED = (
    b"x-request-id, x-receipt-id, x-farebox-overhead-ms, x-farebox-max-tokens, x-cost-usd, "
    b"x-balance-usd, retry-after, retry-after-ms, x-ratelimit-limit-requests, "
    b"x-ratelimit-limit-tokens, x-ratelimit-remaining-requests, x-ratelimit-remaining-tokens, "
    b"x-ratelimit-reset-requests, x-ratelimit-reset-tokens"
)
CORS: tuple[Header, ...] = (
    (b"access-control-allow-origin", b"*"),
    (b"access-control-expose-headers", EXPOSED),
)
PREFLIGHT: tuple[Header, ...] = (
    (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
    (b"access-control-allow-headers", b"*, authorization"),
    (b"access-control-max-age", b"7200"),
)
JSON: Header = (b"content-type", b"application/json")
LABEL_CHARS_MAX = 128
RETRIES_MAX = 1000


class ClientLeft(Exception):
    """The client hung up before its request was complete."""


def check_headers(exchange: Exchange, headers: Mapping[bytes, bytes], bytes_max: int) -> None:
    """Refuse headers that are too large, and bodies that are compressed or not JSON."""
    if exchange.head_bytes > bytes_max and (
        sum(len(name) + len(value) + 4 for name, value in exchange.headers) > bytes_max
    ):
        message = f"The headers are larger than {bytes_max} bytes. {NOT_CHARGED}"
        raise ApiError(431, "headers_too_large", message)
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        message = f"Compressed request bodies are not accepted. {NOT_CHARGED}"
        raise ApiError(415, "unsupported_encoding", message)
    content_type = headers.get(b"content-type", b"application/json")
    if not content_type.lower().startswith(b"application/json"):
        message = f"The body must be JSON: send 'Content-Type: application/json'. {NOT_CHARGED}"
        raise ApiError(415, "unsupported_media_type", message)


def note_labels(arrival: Arrival, headers: Mapping[bytes, bytes]) -> None:
    """Keep the client's own request id and retry count, as labels only."""
    label = headers.get(b"x-request-id")
    if label is not None:
        text = label[:LABEL_CHARS_MAX].decode("latin-1")
        arrival.client_request_id = "".join(c for c in text if c.isprintable())
    retries = headers.get(b"x-stainless-retry-count", b"0")
    if retries.isdigit():
        arrival.client_retry_count = min(int(retries[:9]), RETRIES_MAX)


class Bodies:
    """Bytes of the request bodies that are still arriving, of one worker, and their bound."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self.bytes = 0

    def add(self, size: int) -> None:
        """Raises ApiError 503 when that is too much."""
        if self.bytes + size > self._bytes_max:
            raise unavailable("The gateway is reading too many large requests.")
        self.bytes += size


async def read_body(
    exchange: Exchange,
    headers: Mapping[bytes, bytes],
    bytes_max: int,
    timeout_s: float,
    bodies: Bodies,
) -> bytes:
    """The whole body. Raises ApiError 413, 400 or 503, or ClientLeft."""
    declared = headers.get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > bytes_max:
        raise _too_large(bytes_max)
    if not exchange.is_whole:
        return await _read_slowly(exchange, bytes_max, timeout_s, bodies)
    body = exchange.take_body()
    if len(body) > bytes_max:
        raise _too_large(bytes_max)
    return body


async def _read_slowly(
    exchange: Exchange, bytes_max: int, timeout_s: float, bodies: Bodies
) -> bytes:
    """The body of a request that did not come in one piece."""
    parts: list[bytes] = []
    size = counted = 0
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                await exchange.more_body()
                if exchange.gone:
                    raise ClientLeft
                is_whole, part = exchange.is_whole, exchange.take_body()
                parts.append(part)
                size += len(part)
                if size > bytes_max:
                    raise _too_large(bytes_max)
                if is_whole:
                    return b"".join(parts)
                bodies.add(len(part))
                counted += len(part)
    except TimeoutError as exc:
        raise late_body() from exc
    finally:
        bodies.bytes -= counted


def _too_large(bytes_max: int) -> ApiError:
    message = f"The body is larger than {bytes_max} bytes. {NOT_CHARGED}"
    return ApiError(413, "request_too_large", message, headers=((b"connection", b"close"),))


def send_answer(exchange: Exchange, status: int, headers: Iterable[Header], body: bytes) -> None:
    """A whole answer."""
    all_headers = list(headers)
    if status != 204:  # which has no body, and must not speak of one
        all_headers.append((b"content-length", b"%d" % len(body)))
    if exchange.gone:
        return
    exchange.start(status, all_headers)
    exchange.end(body)


def send_error(exchange: Exchange, exc: ApiError, arrival: Arrival) -> None:
    """An error as the OpenAI envelope, with the ids that support asks for."""
    headers = [JSON, *own_headers(arrival), *exc.headers]
    send_answer(exchange, exc.status, headers, exc.body(f"req_{arrival.request_id}"))


def own_headers(arrival: Arrival) -> list[Header]:
    """The headers of every answer that called no provider: all of its time was ours."""
    overhead_s = time.monotonic() - arrival.started_mono
    return [
        (b"x-request-id", f"req_{arrival.request_id}".encode()),
        (b"x-farebox-overhead-ms", b"%.2f" % (overhead_s * 1000)),
        *CORS,
    ]
