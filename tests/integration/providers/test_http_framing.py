"""Where an answer ends: the same body however it is cut up, and only a whole one is whole."""

import pytest

from gateway.providers.http import HttpClient
from gateway.providers.upstream import UpstreamFailed
from tests.integration.providers.peer import (
    CHUNKED,
    END,
    Do,
    Peer,
    ask,
    chunks,
    head,
    post,
    read_all,
    sized,
)

BODY = b'{"choices":[]}\r\n\r\n0\r\n\r\n'
SIZED = sized(BODY, b"a: b")
IN_CHUNKS = CHUNKED + b"4;x=y\r\n" + BODY[:4] + b"\r\n" + chunks(BODY[4:5], BODY[5:]) + END
TRAILED = CHUNKED + chunks(BODY) + b"0\r\nx-trailer: y\r\n\r\n"
INFORMED = b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + SIZED
ANSWERS = {"sized": SIZED, "chunked": IN_CHUNKS, "trailed": TRAILED, "informed": INFORMED}
CUTS = [(name, at) for name, wire in ANSWERS.items() for at in range(len(wire))]


@pytest.mark.parametrize(("name", "at"), CUTS)
async def test_an_answer_cut_in_two_is_the_same(
    client: HttpClient, peer: Peer, name: str, at: int
) -> None:
    peer.says(ANSWERS[name][:at], ANSWERS[name][at:])

    assert await ask(client, peer) == BODY


@pytest.mark.parametrize("name", ANSWERS)
async def test_an_answer_that_comes_byte_by_byte_is_the_same(
    client: HttpClient, peer: Peer, name: str
) -> None:
    wire = ANSWERS[name]
    peer.says(*(wire[i : i + 1] for i in range(len(wire))))

    assert await ask(client, peer) == BODY


@pytest.mark.parametrize(("name", "at"), CUTS)
async def test_an_answer_that_breaks_off_anywhere_is_not_whole(
    client: HttpClient, peer: Peer, name: str, at: int
) -> None:
    peer.says(ANSWERS[name][:at], Do.RESET if at % 2 else Do.CLOSE)

    with pytest.raises(UpstreamFailed) as caught:
        await ask(client, peer)

    assert caught.value.may_have_billed


async def test_what_came_before_a_break_is_delivered_first(client: HttpClient, peer: Peer) -> None:
    peer.says(CHUNKED + chunks(b"one", b"two") + b"zz\r\n")
    reply = await post(client, peer)

    assert await reply.read() == b"onetwo"
    for _ in range(2):
        with pytest.raises(UpstreamFailed, match="broke off: its chunks are badly framed"):
            await reply.read()


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
@pytest.mark.parametrize("length", [b"x: y", b"content-length: 7", b"transfer-encoding: chunked"])
async def test_some_answers_have_no_body(
    client: HttpClient, peer: Peer, status: bytes, length: bytes
) -> None:
    peer.says(head(length, status=status))

    assert await ask(client, peer) == b""


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
async def test_without_a_length_the_end_of_the_connection_is_the_end(
    client: HttpClient, peer: Peer, version: bytes
) -> None:
    peer.says(head(version=version), b"some", b" more", Do.CLOSE)

    assert await ask(client, peer) == b"some more"


async def test_without_a_length_a_reset_is_no_end(client: HttpClient, peer: Peer) -> None:
    peer.says(head() + b"some", Do.RESET)

    with pytest.raises(UpstreamFailed):
        await ask(client, peer)


async def test_informational_heads_are_skipped(client: HttpClient, peer: Peer) -> None:
    hints = b"HTTP/1.1 100 Continue\r\n\r\n" + b"HTTP/1.1 102 Processing\r\nx: y\r\n\r\n"
    peer.says(hints, hints + SIZED)
    reply = await post(client, peer)

    assert (reply.status, await read_all(reply)) == (200, BODY)


async def test_headers_are_found_by_lower_case_names_and_the_first_counts(
    client: HttpClient, peer: Peer
) -> None:
    fields = (b"X-Request-ID: \t One \t", b"x-request-id: two", b"odd: \xff\xc3\xa9", b"empty:")
    peer.says(sized(b"\r\nin-body: no\r\n", *fields))
    reply = await post(client, peer)
    await read_all(reply)

    assert reply.header("x-request-id") == "One"
    assert reply.header("odd") == "\udcffé"
    assert reply.header("empty") == ""
    assert reply.header("request-id") is None
    assert reply.header("in-body") is None


NO_ANSWER = {
    "another protocol": b"SSH-2.0-OpenSSH_9.6\r\n",
    "not even a line": b"\x16\x03\x01",
    "empty lines first": b"\r\n\r\n" + SIZED,
    "a status of five digits": b"HTTP/1.1 99999 X\r\n\r\n",
    "a status of two digits": b"HTTP/1.1 99 X\r\n\r\n",
    "a status below any": head(status=b"000 X"),
    "a status above any": head(status=b"600 X"),
    "a version of the future": b"HTTP/2.0 200 OK\r\n\r\n",
    "a version in between": b"HTTP/1.2 200 OK\r\n\r\n",
    "another protocol from now on": head(b"upgrade: x", b"connection: upgrade", status=b"101 S"),
    "another protocol, not named": head(status=b"101 Switching"),
    "a length and chunks": head(b"content-length: 3", b"transfer-encoding: chunked") + b"abc",
    "chunks and a length": head(b"transfer-encoding: chunked", b"content-length: 3") + b"abc",
    "two lengths": head(b"content-length: 3", b"content-length: 4") + b"abcd",
    "one length twice": head(b"content-length: 3", b"content-length: 3") + b"abc",
    "a list of lengths": head(b"content-length: 3, 3") + b"abc",
    "a length with a sign": head(b"content-length: +3") + b"abc",
    "a length below zero": head(b"content-length: -3") + b"abc",
    "a length in hex": head(b"content-length: 0x3") + b"abc",
    "a length too large": head(b"content-length: 99999999999999999999") + b"abc",
    "an empty length": head(b"content-length:") + b"abc",
    "an unknown coding": head(b"transfer-encoding: gzip") + b"abc",
    "two codings": head(b"transfer-encoding: gzip, chunked") + chunks(b"abc") + END,
    "two headers of codings": head(*[b"transfer-encoding: chunked"] * 2) + chunks(b"abc") + END,
    "a coding after chunks": head(b"transfer-encoding: chunked, identity") + b"abc",
    "a folded header": head(b"a: b\r\n c", b"content-length: 0"),
    "a fold at once": head(b" a: b", b"content-length: 0"),
    "a NUL in a value": head(b"a: b\0c", b"content-length: 0"),
    "a NUL in a name": head(b"a\0: b", b"content-length: 0"),
    "a NUL in the status line": head(b"content-length: 0", status=b"200 O\0K"),
    "a space before the colon": head(b"a : b", b"content-length: 0"),
    "no colon": head(b"nonsense", b"content-length: 0"),
    "no name": head(b": b", b"content-length: 0"),
    "a bare line feed": head(b"a: b\nc: d", b"content-length: 0"),
    "a bare carriage return": head(b"a: b\rc: d", b"content-length: 0"),
    "a head of line feeds": b"HTTP/1.1 200 OK\n\nabc\r\n\r\n",
    "a long line": head(b"a: " + b"b" * (16 * 1024), b"content-length: 0"),
    "a large head": head(*[b"a: " + b"b" * 1000] * 70, b"content-length: 0"),
    "hints without end": b"HTTP/1.1 100 Continue\r\n\r\n" * 17,
}
BROKEN_OFF = {
    "no size": CHUNKED + b"zz\r\n",
    "a size below zero": CHUNKED + b"-1\r\n",
    "a size with a sign": CHUNKED + b"+1\r\na\r\n" + END,
    "a size with a prefix": CHUNKED + b"0x1\r\na\r\n" + END,
    "a size with a space": CHUNKED + b"1 \r\na\r\n" + END,
    "a size too large": CHUNKED + b"f" * 17 + b"\r\n",
    "a size of line feeds": CHUNKED + b"1\na\n0\n\n",
    "more than the size": CHUNKED + b"1\r\nab\r\n" + END,
    "less than the size": CHUNKED + b"3\r\nab\r\n" + END,
    "an extension with a line feed": CHUNKED + b"1;a\na\r\n" + END,
    "a trailer without a colon": CHUNKED + b"0\r\nnonsense\r\n\r\n",
    "a trailer with a length": CHUNKED + b"0\r\ncontent-length: 3\r\n\r\n",
    "a folded trailer": CHUNKED + b"0\r\na: b\r\n c\r\n\r\n",
    "compressed, but not": sized(b"plain", b"content-encoding: gzip"),
}


@pytest.mark.parametrize("what", NO_ANSWER)
async def test_it_is_no_answer(client: HttpClient, peer: Peer, what: str) -> None:
    peer.says(NO_ANSWER[what], Do.HOLD)

    with pytest.raises(UpstreamFailed, match=r"^no answer: ") as caught:
        await post(client, peer)

    assert caught.value.may_have_billed
    assert len(caught.value.reason) < 80
    assert "secret" not in caught.value.reason


@pytest.mark.parametrize("what", BROKEN_OFF)
async def test_it_is_an_answer_that_breaks_off(client: HttpClient, peer: Peer, what: str) -> None:
    peer.says(BROKEN_OFF[what], Do.HOLD)

    with pytest.raises(UpstreamFailed, match=r"^the answer ") as caught:
        await ask(client, peer)

    assert caught.value.may_have_billed


@pytest.mark.parametrize(
    "part", [b"a" * 8192, b"1;" + b"x" * 200 + b"\r\na\r\n", b"0\r\n"], ids=["size", "ext", "end"]
)
async def test_framing_without_end_is_no_body(client: HttpClient, peer: Peer, part: bytes) -> None:
    more = {b"0": b"a: b\r\n" * 1000, b"1": part * 100}.get(part[:1], part)
    peer.says(CHUNKED + part, *[more] * 60, Do.HOLD)

    with pytest.raises(UpstreamFailed, match="broke off"):
        await ask(client, peer)


async def test_an_extension_without_end_is_no_body(client: HttpClient, peer: Peer) -> None:
    peer.says(CHUNKED + b"1;x=", *[b"y" * 8192] * 9, Do.HOLD)

    with pytest.raises(UpstreamFailed, match="more framing than body"):
        await ask(client, peer)


async def test_a_head_without_end_is_no_answer(client: HttpClient, peer: Peer) -> None:
    peer.says(b"HTTP/1.1 200 OK\r\n", *[b"a: b\r\n" * 1000] * 11, Do.HOLD)

    with pytest.raises(UpstreamFailed, match="too large"):
        await post(client, peer)


async def test_many_tiny_chunks_are_a_body(client: HttpClient, peer: Peer) -> None:
    peer.says(CHUNKED + chunks(*[b"a"] * 20_000) + END)

    assert await ask(client, peer) == b"a" * 20_000
