"""Heads and chunked bodies of answers, as strict as a parser of money's messages must be.

llhttp (through httptools) checks every byte; what it leaves open is decided here. A head is parsed
only when all of it is there, by a parser of its own, so that no state outlives an answer.
"""

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

HEAD_BYTES_MAX = 64 * 1024
LINE_BYTES_MAX = 16 * 1024
# What may come besides the body, in chunk sizes, extensions and trailers: this, and so much for
# each byte of body. Without a bound a peer could keep a call alive and never send anything.
FRAMING_BYTES_MAX = 64 * 1024
FRAMING_PER_BYTE_MAX = 16

UNTIL_EOF = -1
_NO_BODY = frozenset({204, 304})
_LENGTH = b"\r\ncontent-length:"
_CODING = b"\r\ntransfer-encoding:"
_CONNECTION = b"\r\nconnection:"


class BadAnswer(Exception):
    """What came is no answer. The text says why, with nothing in it of what came."""


class Head:
    """The head of an answer; `length` is that of the body, or UNTIL_EOF, without `chunks`."""

    __slots__ = ("_low", "_raw", "chunks", "keeps_alive", "length", "status")

    def __init__(self, raw: bytes, low: bytes, status: int) -> None:
        self._raw = raw
        self._low = low
        self.status = status
        self.length = UNTIL_EOF
        self.chunks: ChunkedBody | None = None
        self.keeps_alive = raw.startswith(b"HTTP/1.1") and _keeps_alive(low)

    def header(self, name: str) -> str | None:
        """The first of that lower-case name. Bytes that are no UTF-8 come as surrogates."""
        key = f"\r\n{name}:".encode()
        start = self._low.find(key)
        if start < 0:
            return None
        start += len(key)
        value = self._raw[start : self._raw.find(b"\r\n", start)]
        return value.strip(b" \t").decode("utf-8", "surrogateescape")


def parse_head(raw: bytes) -> Head:
    """The head that these bytes, up to and with the first empty line, are. Raises BadAnswer.

    In a head that llhttp accepted, every header is CRLF, name, colon, and nothing is folded: so it
    is searched, not taken apart.
    """
    _check_size(raw)
    low = raw.lower()
    sink = _Sink() if _CODING in low else None
    parser = HttpResponseParser(sink)
    try:
        parser.feed_data(raw)
    except (HttpParserError, HttpParserUpgrade) as exc:
        raise BadAnswer("its head is no HTTP/1.1") from exc
    head = Head(raw, low, _status(raw, parser))
    if head.status < 200 or head.status in _NO_BODY:
        head.length = 0
    elif sink is not None:
        if low.count(_CODING) > 1 or _field(low, _CODING) != b"chunked":
            raise BadAnswer("its transfer-encoding is not chunked")
        head.chunks = ChunkedBody(parser, sink)
    elif (length := _field(low, _LENGTH)) is not None:
        # llhttp has seen to it that there is one, of decimal digits and below 2^64.
        head.length = int(length)
    return head


class ChunkedBody:
    """Takes the chunks apart. Use `feed`, then look at `is_complete` and `fault`."""

    __slots__ = ("_body_bytes", "_parser", "_sink", "_wire_bytes", "fault", "is_clean")

    def __init__(self, parser: HttpResponseParser, sink: "_Sink") -> None:
        self._parser = parser
        self._sink = sink
        self._wire_bytes = 0
        self._body_bytes = 0
        self.fault = ""
        """Why the body is broken off; what feed returned is good all the same."""
        self.is_clean = False
        """The body is complete, and nothing came after it."""

    @property
    def is_complete(self) -> bool:
        return self._sink.is_complete

    def feed(self, data: bytes) -> bytes:
        """What these bytes hold of the body, in one piece. Not after the end or a fault."""
        sink, pieces = self._sink, self._sink.pieces
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade):
            if not sink.is_complete:
                self.fault = "its chunks are badly framed"
        else:
            # llhttp skips line ends between messages in silence. With none of them the body ends
            # in one empty line; should that be cut in two, the connection is lost, not the answer.
            self.is_clean = (
                sink.is_complete and data.endswith(b"\r\n\r\n") and data[-5:-4] not in b"\r\n"
            )
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        self._body_bytes += len(body)
        self._wire_bytes += len(data)
        framing = self._wire_bytes - self._body_bytes
        allowed = FRAMING_BYTES_MAX + FRAMING_PER_BYTE_MAX * self._body_bytes
        if framing > allowed and not sink.is_complete:
            self.fault = "its chunks are more framing than body"
        return body


class _Sink:
    """What llhttp calls. It has no way back to the parser: a cycle would wait for the collector."""

    __slots__ = ("is_complete", "on_body", "pieces")

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.on_body = self.pieces.append
        self.is_complete = False

    def on_message_begin(self) -> None:
        if self.is_complete:
            raise BadAnswer("more came than one answer")  # stops the parser

    def on_message_complete(self) -> None:
        self.is_complete = True


def _check_size(raw: bytes) -> None:
    if len(raw) > HEAD_BYTES_MAX:
        raise BadAnswer("its head is too large")
    if len(raw) > LINE_BYTES_MAX and max(map(len, raw.split(b"\r\n"))) > LINE_BYTES_MAX:
        raise BadAnswer("its head has too long a line")
    if b"\0" in raw:
        raise BadAnswer("its head has a NUL")


def _status(raw: bytes, parser: HttpResponseParser) -> int:
    status = parser.get_status_code()
    if not raw.startswith((b"HTTP/1.1 ", b"HTTP/1.0 ")) or not 100 <= status <= 599:
        raise BadAnswer("its head is no HTTP/1.1")
    if status == 101:
        raise BadAnswer("it changes the protocol")
    return status


def _field(low: bytes, key: bytes) -> bytes | None:
    start = low.find(key)
    if start < 0:
        return None
    start += len(key)
    return low[start : low.find(b"\r\n", start)].strip(b" \t")


def _keeps_alive(low: bytes) -> bool:
    """Anything unusual said about the connection ends it."""
    return _CONNECTION not in low or (
        low.count(_CONNECTION) == 1 and _field(low, _CONNECTION) == b"keep-alive"
    )
