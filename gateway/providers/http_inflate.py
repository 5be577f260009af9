"""Compressed answers: some providers compress although told not to."""

import zlib

# A bomb is inflated piece by piece, so that the relay's bounds apply.
PIECE_BYTES_MAX = 64 * 1024
# Compressed bytes that hold nothing; sound ones have at most a header's worth in a row.
EMPTY_BYTES_MAX = 64 * 1024
_INFLATABLE = frozenset({"deflate", "gzip", "x-gzip"})


class BadCompression(Exception):
    """The text says why."""


class Inflater:
    """Feed what came, then `next` until it is empty."""

    __slots__ = ("_empty", "_tail", "_zlib")

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(47)  # zlib or gzip, whichever it is
        self._tail = b""
        self._empty = 0

    def feed(self, data: bytes) -> None:
        """Only when `next` gave nothing."""
        self._tail = data

    def next(self) -> bytes:
        """At most PIECE_BYTES_MAX bytes, b'' when more must be fed. Raises BadCompression."""
        if not self._tail:
            return b""
        if self._zlib.eof:
            raise BadCompression("bytes follow its compressed end")
        try:
            piece = self._zlib.decompress(self._tail, PIECE_BYTES_MAX)
        except zlib.error as exc:
            raise BadCompression("it is badly compressed") from exc
        self._empty = 0 if piece else self._empty + len(self._tail)
        self._tail = self._zlib.unused_data or self._zlib.unconsumed_tail
        if self._empty > EMPTY_BYTES_MAX:
            raise BadCompression("it is badly compressed")
        return piece

    @property
    def has_more(self) -> bool:
        """Whether `next` has more without being fed."""
        return bool(self._tail)

    def end(self) -> None:
        """The body ended here. Raises BadCompression when the compression did not."""
        if not self._zlib.eof:
            raise BadCompression("its compression broke off")


def inflater_for(encoding: str | None) -> Inflater | None:
    """None when the bytes are to be taken as they are, which other encodings are too."""
    return Inflater() if encoding is not None and encoding.lower() in _INFLATABLE else None
