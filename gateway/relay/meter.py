"""Stage 4: what the answer cost, read from its bytes as they pass.

`StreamMeter` cuts a byte stream into what may leave at once and the few frames that carry usage,
an error or the end. `BodyMeter` does the same for a JSON body. Both keep the text that came, so
that tokens can be counted when the provider reports none.
"""

from collections.abc import Iterator
from enum import Enum, auto

import msgspec

from gateway.protocols import sse
from gateway.protocols.chat_answer import Answer, read_answer, texts_in, with_usage
from gateway.relay.seen import Seen

# Of a frame that is too long to be held back, the end still is: usage is found there.
LONG_END_BYTES = 16 * 1024


class PieceKind(Enum):
    """What the reply does with a piece."""

    PLAIN = auto()
    """Send it."""
    USAGE = auto()
    """A frame with nothing but usage: settle, and send it only to a client that asked."""
    ERROR = auto()
    """The provider failed in the middle: the stream ends here."""
    DONE = auto()
    """The end: settle, then send it."""


class Piece(msgspec.Struct, frozen=True):
    kind: PieceKind
    data: bytes
    answer: Answer | None = None


class StreamMeter:
    """Feed it what arrives; it yields pieces in order. Frames leave whole, as they came."""

    def __init__(self, *, buffer_bytes_max: int) -> None:
        self.seen = Seen()
        self.is_done = False
        self._buffer_bytes_max = buffer_bytes_max
        self._tail = b""
        self._long_end: bytes | None = None

    @property
    def is_mid_frame(self) -> bool:
        """True while part of a frame was passed on: nothing may come between."""
        return self._long_end is not None

    def is_plain(self, chunk: bytes) -> bool:
        """Whether chunk is nothing but whole frames that may leave at once, as most are.

        Then it counts as fed; otherwise nothing has happened yet.
        """
        is_whole = chunk.endswith(b"\n\n") and not self._tail and self._long_end is None
        if not is_whole or self.is_done or sse.may_matter(chunk):
            return False
        self.seen.bytes += len(chunk)
        self.seen.keep(chunk)
        return True

    def feed(self, chunk: bytes) -> list[Piece]:
        """The pieces that are complete now."""
        self.seen.bytes += len(chunk)
        if self.is_done:
            return []
        if self._long_end is not None:
            return self._feed_long(self._long_end, chunk)
        data = self._tail + chunk if self._tail else chunk
        length = sse.complete_length(data)
        self._tail = data[length:] if length < len(data) else b""
        if not length:
            return self._pass_long() if len(self._tail) > self._buffer_bytes_max else []
        complete = data[:length] if self._tail else data
        if not sse.may_matter(complete):
            self.seen.keep(complete)
            return [Piece(PieceKind.PLAIN, complete)]
        return list(self._look_into(complete))

    def end(self) -> list[Piece]:
        """The pieces of a last frame whose empty line never came; half a frame is dropped."""
        if self.is_done:
            return []
        if self._long_end is not None:
            last, self._long_end = self._long_end, None
            return [Piece(PieceKind.PLAIN, self._end_of_long(last) + b"\n\n")]
        tail, self._tail = self._tail.rstrip(b"\r\n"), b""
        payload = sse.payload_of(tail + b"\n\n").strip()
        is_whole = payload == b"[DONE]" or read_answer(payload) is not None
        if is_whole or tail.startswith(b":"):
            return list(self._look_into(tail + b"\n\n"))
        return []

    def _look_into(self, complete: bytes) -> Iterator[Piece]:
        plain: list[bytes] = []
        for frame in sse.split_frames(complete):
            if not sse.may_matter(frame):
                plain.append(frame)
                continue
            piece = self._piece_of(frame)
            if piece.kind is PieceKind.PLAIN:
                plain.append(piece.data)
                continue
            if plain:
                yield self._plain(plain)
                plain = []
            yield piece
            if piece.kind in {PieceKind.DONE, PieceKind.ERROR}:
                self.is_done = True
                return
        if plain:
            yield self._plain(plain)

    def _plain(self, frames: list[bytes]) -> Piece:
        data = b"".join(frames)
        self.seen.keep(data)
        return Piece(PieceKind.PLAIN, data)

    def _piece_of(self, frame: bytes) -> Piece:
        payload = sse.payload_of(frame)
        if payload.strip() == b"[DONE]":
            return Piece(PieceKind.DONE, frame)
        answer = read_answer(payload)
        if answer is None or not (answer.has_error or answer.has_usage):
            return Piece(PieceKind.PLAIN, frame)
        self.seen.note(answer)
        if answer.has_error:
            self.seen.add_text(texts_in(payload))
            return Piece(PieceKind.ERROR, frame, answer)
        if not answer.has_choices:
            return Piece(PieceKind.USAGE, frame, answer)
        # Usage beside text: what the provider billed is not told to the client.
        changed = sse.with_payload(frame, payload, with_usage(payload, answer, b"null"))
        return Piece(PieceKind.PLAIN, changed)

    def _pass_long(self) -> list[Piece]:
        """The frame does not fit into the buffer: it passes in parts, all but its end unseen."""
        data, self._tail = self._tail, b""
        head, self._long_end = data[:-LONG_END_BYTES], data[-LONG_END_BYTES:]
        self.seen.add_text([head.decode(errors="replace")])
        return [Piece(PieceKind.PLAIN, head)] if head else []

    def _feed_long(self, held: bytes, chunk: bytes) -> list[Piece]:
        data = held + chunk
        # The boundary may lie across two chunks: look from two bytes before this one.
        end = sse.first_end(data, max(len(held) - 2, 0))
        if end < 0:
            self._tail = data
            return self._pass_long()
        self._long_end = None
        pieces = [Piece(PieceKind.PLAIN, self._end_of_long(data[:end]))]
        rest = data[end:]
        self.seen.bytes -= len(rest)
        return pieces + (self.feed(rest) if rest else [])

    def _end_of_long(self, data: bytes) -> bytes:
        """The end of a long frame, its usage noted and taken out."""
        self.seen.add_text([data.decode(errors="replace")])
        at = data.rfind(b'"usage"')
        if at < 0:
            return data
        members = b"{" + data[at:].rstrip()
        answer = read_answer(members)
        if answer is None or not answer.has_usage:
            return data
        self.seen.note(answer)
        changed = with_usage(members, answer, b"null")[1:]
        return data[:at] + changed + data[at + len(members) - 1 :]


class BodyMeter:
    """A whole JSON answer. `is_completion`: it has the shape of one."""

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.seen = Seen()
        self.seen.bytes = len(body)
        self.answer = read_answer(body)
        if self.answer is not None:
            self.seen.note(self.answer)
            self.seen.keep_body(body)
        answer = self.answer
        self.is_completion = answer is not None and (answer.has_usage or answer.has_choices)
