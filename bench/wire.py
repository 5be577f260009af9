"""The little HTTP/1.1 that the mock and the load speak themselves. Pure."""

import re

_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,10})[ \t]*\r\n")
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:[ \t]*chunked[ \t]*\r\n")


class BadAnswer(Exception):
    """The peer does not speak HTTP/1.1 as we know it."""


def content_length(lower_head: bytes) -> int | None:
    """From a head in lower case that ends with one CRLF; None when there is no such header."""
    found = _LENGTH.search(lower_head)
    return int(found[1]) if found else None


def is_chunked(lower_head: bytes) -> bool:
    return _CHUNKED.search(lower_head) is not None


def http_chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def dechunk(buffer: bytes, at: int = 0) -> tuple[bytes, int, bool]:
    """(payload of the chunks that are complete, where they end, whether the body ended).

    Raises BadAnswer when a chunk has no size.
    """
    parts: list[bytes] = []
    while (line := buffer.find(b"\r\n", at)) >= 0:
        try:
            size = int(buffer[at:line].partition(b";")[0], 16)
        except ValueError as exc:
            raise BadAnswer("a chunk without a size") from exc
        if not size:
            # Trailers are allowed; nobody here sends any but the empty line.
            end = buffer.find(b"\r\n\r\n", line)
            if end < 0:
                break
            return b"".join(parts), end + 4, True
        end = line + 2 + size
        if len(buffer) < end + 2:
            break
        parts.append(buffer[line + 2 : end])
        at = end + 2
    return parts[0] if len(parts) == 1 else b"".join(parts), at, False
