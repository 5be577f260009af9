"""Which connections are used again: those of which it is sure that the next answer is the next."""

import asyncio
import os

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
    until,
)

OK = sized(b"ok")
REUSABLE = {
    "sized": OK,
    "empty": sized(b""),
    "chunked": CHUNKED + chunks(b"o", b"k") + END,
    "with a trailer": CHUNKED + chunks(b"ok") + b"0\r\na: b\r\n\r\n",
    "said so": sized(b"ok", b"Connection: Keep-Alive"),
    "no content": head(status=b"204 No Content"),
    "an error": sized(b"ok", status=b"500 Oops"),
    "after a hint": b"HTTP/1.1 100 Continue\r\n\r\n" + OK,
}
NOT_REUSABLE = {
    "old": OK.replace(b"1.1", b"1.0", 1),
    "old, but said so": sized(b"ok", b"connection: keep-alive").replace(b"1.1", b"1.0", 1),
    "said not": sized(b"ok", b"Connection: Close"),
    "said not among other things": sized(b"ok", b"connection: x, close"),
    "said both": sized(b"ok", b"connection: keep-alive", b"connection: close"),
    "a byte too many": OK + b"x",
    "a line too many": OK + b"\r\n",
    "an answer too many": OK + OK,
    "a body where none is": head(b"content-length: 2", status=b"204 No Content") + b"ok",
    "chunked, said not": head(b"transfer-encoding: chunked", b"connection: close") + END,
    "chunked, a byte too many": CHUNKED + chunks(b"ok") + END + b"x",
    "chunked, a line too many": CHUNKED + chunks(b"ok") + END + b"\r\n",
    "chunked, half a line too many": CHUNKED + chunks(b"ok") + END + b"\n",
    "chunked, an end too many": CHUNKED + chunks(b"ok") + END + END,
    "chunked, an answer too many": CHUNKED + chunks(b"ok") + END + OK,
    "chunked, chunks too many": (CHUNKED + chunks(b"ok") + END) * 2,
}
BODIES = {"empty": b"", "no content": b"", "a body where none is": b"", "chunked, said not": b""}


@pytest.mark.parametrize("what", REUSABLE)
async def test_a_connection_is_used_again(client: HttpClient, peer: Peer, what: str) -> None:
    peer.says(REUSABLE[what])
    for _ in range(3):
        assert await ask(client, peer) == BODIES.get(what, b"ok")

    assert peer.connections == 1


@pytest.mark.parametrize("what", NOT_REUSABLE)
async def test_a_connection_is_not_used_again(client: HttpClient, peer: Peer, what: str) -> None:
    peer.says(NOT_REUSABLE[what])
    for number in range(1, 4):
        assert await ask(client, peer) == BODIES.get(what, b"ok")
        assert peer.connections == number

    await until(lambda: peer.left == 3)


@pytest.mark.parametrize("extra", [b"x", b"\r\n", OK])
async def test_bytes_that_nobody_asked_for_end_an_idle_connection(
    client: HttpClient, peer: Peer, extra: bytes
) -> None:
    later = asyncio.Event()
    peer.scripts = [(OK, later, extra, Do.HOLD), (sized(b"second"),)]

    assert await ask(client, peer) == b"ok"
    later.set()
    await until(lambda: peer.left == 1)
    assert await ask(client, peer) == b"second"


@pytest.mark.parametrize("extra", [b"x", b"\r\n", sized(b"first's")])
async def test_bytes_behind_an_answer_never_reach_the_next_request(
    client: HttpClient, peer: Peer, extra: bytes
) -> None:
    """They arrive between two turns of the loop: only the kernel knows of them."""
    peer.scripts = [(OK, Do.HOLD), (sized(b"second"),)]
    assert await ask(client, peer) == b"ok"

    os.write(peer.writers[0].get_extra_info("socket").fileno(), extra)

    assert await ask(client, peer) == b"second"
    assert peer.connections == 2


@pytest.mark.parametrize("how", [Do.CLOSE, Do.RESET])
async def test_a_connection_that_the_peer_closed_is_not_used(
    client: HttpClient, peer: Peer, how: Do
) -> None:
    peer.scripts = [(OK, how), (OK,)]

    assert await ask(client, peer) == b"ok"
    await until(lambda: peer.left == 1)
    assert await ask(client, peer) == b"ok"
    assert peer.connections == 2


async def test_a_request_is_never_sent_twice(client: HttpClient, peer: Peer) -> None:
    """The peer closes when it has read the second request on a connection it had kept."""
    peer.scripts = [(OK,), (Do.CLOSE,)]
    await ask(client, peer)

    with pytest.raises(UpstreamFailed) as caught:
        await ask(client, peer)

    assert caught.value.may_have_billed
    assert (len(peer.asked), peer.connections) == (2, 1)


async def test_the_last_used_is_used_first(client: HttpClient, peer: Peer) -> None:
    peer.says(OK)
    await asyncio.gather(*(ask(client, peer) for _ in range(5)))
    for _ in range(5):
        await ask(client, peer)

    assert peer.connections == 5
    assert len({asked.connection for asked in peer.asked[5:]}) == 1


async def test_an_unread_body_that_came_whole_costs_no_connection(
    client: HttpClient, peer: Peer
) -> None:
    peer.says(OK)
    (await post(client, peer)).close()

    assert await ask(client, peer) == b"ok"
    assert peer.connections == 1


async def test_closing_before_the_end_closes_the_connection(client: HttpClient, peer: Peer) -> None:
    peer.scripts = [(CHUNKED + chunks(b"some"), Do.HOLD), (OK,)]
    reply = await post(client, peer)
    assert await reply.read() == b"some"
    reply.close()
    reply.close()

    await until(lambda: peer.left == 1)
    with pytest.raises(UpstreamFailed, match="closed before its end"):
        await reply.read()
    assert await ask(client, peer) == b"ok"


async def test_closing_twice_does_not_touch_the_next_request(
    client: HttpClient, peer: Peer
) -> None:
    peer.scripts = [(OK,), (CHUNKED + chunks(b"se"), chunks(b"cond") + END)]
    first = await post(client, peer)
    await read_all(first)
    second = await post(client, peer)
    first.close()
    first.close()

    assert await read_all(second) == b"second"
    assert peer.connections == 1


async def test_idle_connections_are_closed_after_a_while(peer: Peer) -> None:
    peer.says(OK)
    client = HttpClient(5.0, idle_s=0.05)
    await asyncio.gather(*(ask(client, peer) for _ in range(3)))
    await until(lambda: peer.left == 3)

    assert await ask(client, peer) == b"ok"
    await until(lambda: peer.left == 4)
    await client.close()


async def test_a_connection_in_use_is_not_idle(peer: Peer) -> None:
    client = HttpClient(5.0, idle_s=0.02)
    later = asyncio.Event()
    peer.scripts = [(OK,), (later, sized(b"late")), (OK, Do.CLOSE)]
    await ask(client, peer)
    waiting = asyncio.ensure_future(ask(client, peer))
    await until(lambda: len(peer.asked) == 2)
    other = HttpClient(5.0, idle_s=0.02)
    await ask(other, peer)
    await until(lambda: peer.left == 1)
    later.set()

    assert await waiting == b"late"
    await client.close()
    await other.close()


async def test_targets_of_one_origin_share_connections(client: HttpClient, peer: Peer) -> None:
    peer.says(OK)
    for path in ("/a", "/b?c=d"):
        target = client.target(f"http://127.0.0.1:{peer.port}{path}", {})
        assert await read_all(await client.post(target, b"")) == b"ok"

    assert peer.connections == 1
    assert [asked.head.split(b" ")[1] for asked in peer.asked] == [b"/a", b"/b?c=d"]


async def test_closing_the_client_ends_what_is_under_way(client: HttpClient, peer: Peer) -> None:
    peer.scripts = [(OK,), (Do.HOLD,), (CHUNKED + chunks(b"some"), Do.HOLD)]
    await ask(client, peer)
    waiting = asyncio.ensure_future(post(client, peer))
    await until(lambda: len(peer.asked) == 2)
    reply = await post(client, peer)
    assert await reply.read() == b"some"
    await client.close()

    with pytest.raises(UpstreamFailed, match="the client was closed"):
        await waiting
    with pytest.raises(UpstreamFailed, match="the client was closed"):
        await reply.read()
    with pytest.raises(UpstreamFailed) as caught:
        await post(client, peer)
    assert not caught.value.may_have_billed
    await until(lambda: peer.left == peer.connections)
