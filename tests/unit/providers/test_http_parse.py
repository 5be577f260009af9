"""Heads and chunks at every cut, where sockets might join what a test cut in two."""

import pytest

from gateway.providers.http_inflate import BadCompression, Inflater
from gateway.providers.http_parse import (
    FRAMING_BYTES_MAX,
    UNTIL_EOF,
    BadAnswer,
    ChunkedBody,
    parse_head,
)

CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
BODY = b"one\r\n0\r\n\r\n, two"
WIRE = b"5;a=b\r\none\r\n\r\n0001\r\n0\r\n9\r\n\r\n\r\n, two\r\n0\r\n\r\n"
TRAILED = WIRE[:-2] + b"x: y\r\n\r\n"


def body() -> ChunkedBody:
    chunks = parse_head(CHUNKED).chunks
    assert chunks is not None
    return chunks


@pytest.mark.parametrize("wire", [WIRE, TRAILED], ids=["plain", "trailed"])
def test_chunks_are_the_same_at_every_two_cuts(wire: bytes) -> None:
    for first in range(len(wire)):
        for second in range(first, len(wire)):
            chunks = body()
            got = chunks.feed(wire[:first]) + chunks.feed(wire[first:second])
            assert not chunks.is_complete
            got += chunks.feed(wire[second:])
            assert (got, chunks.is_complete, chunks.fault) == (BODY, True, "")
            assert chunks.is_clean or len(wire) - second < 5


@pytest.mark.parametrize("extra", [b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"x", b"0\r\n\r\n", CHUNKED])
def test_what_follows_the_end_is_seen_at_every_cut(extra: bytes) -> None:
    """In one piece with the end; later bytes find an idle connection, and end it."""
    wire = WIRE + extra
    for cut in range(len(WIRE)):
        chunks = body()
        got = chunks.feed(wire[:cut]) + chunks.feed(wire[cut:])
        assert (got, chunks.is_complete, chunks.is_clean) == (BODY, True, False)


def test_a_second_answer_adds_nothing_to_the_first() -> None:
    chunks = body()

    assert chunks.feed(WIRE + CHUNKED + WIRE) == BODY
    assert chunks.is_complete
    assert not chunks.is_clean


def test_what_came_before_a_fault_is_kept() -> None:
    chunks = body()

    assert chunks.feed(b"3\r\none\r\nzz\r\n") == b"one"
    assert (chunks.is_complete, chunks.fault) == (False, "its chunks are badly framed")


def test_framing_is_bounded_by_the_body() -> None:
    chunks = body()
    extension = b"1;" + b"x" * 10 + b"\r\na\r\n"
    for _ in range(FRAMING_BYTES_MAX // 4):
        chunks.feed(extension)
    allowed = chunks.fault
    chunks.feed(b"1;" + b"x" * FRAMING_BYTES_MAX * 4)

    assert allowed == ""
    assert chunks.fault == "its chunks are more framing than body"


@pytest.mark.parametrize(
    ("headers", "length", "keeps_alive"),
    [
        (b"content-length: 5\r\n", 5, True),
        (b"Content-Length:5 \t\r\n", 5, True),
        (b"", UNTIL_EOF, True),
        (b"content-length: 0\r\nConnection: KEEP-alive\r\n", 0, True),
        (b"content-length: 0\r\nconnection: close\r\n", 0, False),
        (b"content-length: 0\r\nconnection: upgrade, close\r\n", 0, False),
        (b"content-length: 0\r\nconnection:\r\nconnection: close\r\n", 0, False),
        (b"content-length: 0\r\nx-connection: close\r\n", 0, True),
    ],
)
def test_a_head_says_where_the_body_ends(headers: bytes, length: int, keeps_alive: bool) -> None:
    head = parse_head(b"HTTP/1.1 200 OK\r\n" + headers + b"\r\n")

    assert (head.length, head.keeps_alive, head.chunks) == (length, keeps_alive, None)


@pytest.mark.parametrize("size", [60_000, 70_000])
def test_the_size_of_a_head_is_bounded(size: int) -> None:
    raw = b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * (size // 6) + b"\r\n"
    if size < 64 * 1024:
        assert parse_head(raw).status == 200
        return
    with pytest.raises(BadAnswer, match="too large"):
        parse_head(raw)


def test_a_sound_head_can_be_cut_at_no_byte() -> None:
    raw = b"HTTP/1.1 200 OK\r\na: b\r\ncontent-length: 3\r\n\r\n"
    for at in range(len(raw) - 4):
        with pytest.raises(BadAnswer):
            parse_head(raw[:at] + b"\x01" + raw[at + 1 :] if at not in (13, 14) else b"\r\n\r\n")


def test_an_inflater_that_ended_takes_nothing_more() -> None:
    inflater = Inflater()
    inflater.feed(b"x\x9c\x03\x00\x00\x00\x00\x01")
    assert inflater.next() == b""
    inflater.end()
    inflater.feed(b"x")

    with pytest.raises(BadCompression, match="bytes follow"):
        inflater.next()
