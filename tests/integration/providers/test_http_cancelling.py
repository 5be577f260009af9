"""Requests given up at every stage, and answers that come before their request is sent."""

import asyncio
import socket
from typing import Any

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
    turns,
    until,
)

OK = sized(b"ok")
LARGE = b"x" * (16 * 1024 * 1024)


async def cancelled(task: asyncio.Future[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_cancelled_while_the_answer_is_awaited(client: HttpClient, peer: Peer) -> None:
    peer.scripts = [(Do.HOLD,), (OK,)]
    waiting = asyncio.ensure_future(post(client, peer))
    await until(lambda: len(peer.asked) == 1)
    await cancelled(waiting)

    await until(lambda: peer.left == 1)
    assert await ask(client, peer) == b"ok"
    assert peer.connections == 2


@pytest.mark.parametrize("wire", [b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"])
async def test_cancelled_within_the_head(client: HttpClient, peer: Peer, wire: bytes) -> None:
    late = asyncio.Event()
    peer.scripts = [(wire, late, Do.HOLD), (OK,)]
    waiting = asyncio.ensure_future(post(client, peer))
    await until(lambda: len(peer.asked) == 1)
    late.set()
    await turns()
    await cancelled(waiting)

    await until(lambda: peer.left == 1)
    assert await ask(client, peer) == b"ok"


async def test_cancelled_while_the_request_is_sent(client: HttpClient, peer: Peer) -> None:
    peer.reads_body = False
    given_up = asyncio.Event()
    peer.scripts = [(given_up, Do.CUT)]
    waiting = asyncio.ensure_future(post(client, peer, LARGE))
    await until(lambda: len(peer.asked) == 1)
    await cancelled(waiting)
    given_up.set()
    peer.reads_body = True
    peer.says(OK)

    assert await ask(client, peer) == b"ok"
    assert peer.connections == 2


@pytest.mark.parametrize("rounds", range(12))
async def test_cancelled_at_the_moment_of_the_answer(
    client: HttpClient, peer: Peer, rounds: int
) -> None:
    """Whoever comes next gets its own answer, whatever the cancelled one had already got."""
    gate = asyncio.Event()
    peer.scripts = [(gate, sized(b"first")), (sized(b"second"),), (sized(b"third"),)]
    waiting = asyncio.ensure_future(post(client, peer))
    await until(lambda: len(peer.asked) == 1)
    gate.set()
    await turns(rounds // 2)
    if rounds % 2:
        second = asyncio.ensure_future(ask(client, peer))
        waiting.cancel()
    else:
        waiting.cancel()
        second = asyncio.ensure_future(ask(client, peer))
    await asyncio.gather(waiting, return_exceptions=True)

    assert await second == b"second"
    assert await ask(client, peer) == b"third"


async def test_a_late_cancellation_does_not_touch_the_next_request(
    client: HttpClient, peer: Peer
) -> None:
    """The whole answer came and the connection is another's when the first is cancelled."""
    peer.scripts = [(OK,), (sized(b"next"),)]
    target = client.target(peer.url(), {})
    await ask(client, peer)
    peer.scripts = [(OK,), (sized(b"next"),)]
    connection = target.pool.pick()
    assert connection is not None
    first = connection.send(target.head, b"")
    await until(first.done)
    second = asyncio.ensure_future(ask(client, peer))
    await turns(1)
    connection.give_up(first)

    assert await second == b"next"
    assert peer.connections == 1


async def test_an_answer_between_a_cancellation_and_its_effect_is_dropped(
    client: HttpClient, peer: Peer
) -> None:
    peer.scripts = [(Do.HOLD,), (OK,)]
    waiting = asyncio.ensure_future(post(client, peer))
    await until(lambda: len(peer.asked) == 1)
    (connection,) = client.target(peer.url(), {}).pool._open
    waiting.cancel()
    connection.data_received(sized(b"first"))

    assert not connection.is_open()
    await asyncio.gather(waiting, return_exceptions=True)
    assert await ask(client, peer) == b"ok"


async def test_cancelled_within_the_body(client: HttpClient, peer: Peer) -> None:
    peer.scripts = [(CHUNKED + chunks(b"some"), Do.HOLD), (OK,)]
    reply = await post(client, peer)
    assert await reply.read() == b"some"
    reading = asyncio.ensure_future(reply.read())
    await turns()
    await cancelled(reading)
    reply.close()

    await until(lambda: peer.left == 1)
    assert await ask(client, peer) == b"ok"


async def test_cancelled_while_connecting() -> None:
    """Nobody accepts: the handshake of TLS never comes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = HttpClient(20.0)
        port = listener.getsockname()[1]
        target = client.target(f"https://127.0.0.1:{port}/", {})
        waiting = asyncio.ensure_future(client.post(target, b""))
        listener.settimeout(5)
        accepted, _ = await asyncio.get_running_loop().run_in_executor(None, listener.accept)
        with accepted:
            await cancelled(waiting)
            accepted.settimeout(5)
            while await asyncio.get_running_loop().run_in_executor(None, accepted.recv, 4096):
                pass
        await client.close()


REFUSAL = sized(b"too large", status=b"413 Content Too Large")


@pytest.mark.parametrize("how", [Do.CLOSE, Do.RESET, Do.HOLD])
async def test_an_early_answer_is_delivered_and_ends_the_connection(
    client: HttpClient, peer: Peer, how: Do
) -> None:
    peer.reads_body = False
    seen = asyncio.Event()
    peer.scripts = [(REFUSAL, seen, how) if how is not Do.HOLD else (REFUSAL, seen)]
    reply = await post(client, peer, LARGE)
    seen.set()

    assert (reply.status, await read_all(reply)) == (413, b"too large")
    peer.reads_body = True
    peer.says(OK)
    assert await ask(client, peer) == b"ok"
    assert peer.connections == 2


async def test_an_early_head_counts_although_its_body_never_comes(
    client: HttpClient, peer: Peer
) -> None:
    peer.reads_body = False
    seen = asyncio.Event()
    peer.scripts = [(head(b"content-length: 100", status=b"413 No") + b"too", seen, Do.RESET)]
    reply = await post(client, peer, LARGE)
    seen.set()

    assert reply.status == 413
    with pytest.raises(UpstreamFailed):
        await read_all(reply)


async def test_an_answer_may_begin_before_the_request_ends(client: HttpClient, peer: Peer) -> None:
    """The rest of the request is sent all the same, while the answer comes."""

    class Early(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert hasattr(transport, "write")
            self.transport = transport
            self.got = 0

        def data_received(self, data: bytes) -> None:
            if not self.got:
                self.transport.write(CHUNKED + chunks(b"early "))
            self.got += len(data)
            if self.got >= len(LARGE):
                self.transport.write(chunks(b"%d" % (self.got >= len(LARGE))) + END)

    server = await asyncio.get_running_loop().create_server(Early, "127.0.0.1", 0)
    peer_url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    reply = await client.post(client.target(peer_url, {}), LARGE)

    assert await read_all(reply) == b"early 1"
    server.close()
    await client.close()
    await server.wait_closed()


@pytest.mark.parametrize("how", [Do.CLOSE, Do.RESET])
async def test_a_peer_that_leaves_without_an_answer(
    client: HttpClient, peer: Peer, how: Do
) -> None:
    peer.says(how)

    with pytest.raises(UpstreamFailed, match=r"^no answer: ") as caught:
        await post(client, peer)

    assert caught.value.may_have_billed
