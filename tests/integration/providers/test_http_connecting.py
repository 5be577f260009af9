"""Names, addresses, TLS: what fails here cannot have cost anything."""

import asyncio
import datetime
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trustme

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
    running_peer,
    sized,
    turns,
    until,
)

OK = sized(b"ok")
DAY = datetime.timedelta(days=1)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def server_tls(authority: trustme.CA, *names: str, expired: bool = False) -> ssl.SSLContext:
    now = datetime.datetime.now(datetime.UTC)
    ends = now + (-DAY if expired else DAY)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["h2", "http/1.1"])
    cert = authority.issue_cert(*names, not_before=now - 9 * DAY, not_after=ends)
    cert.configure_cert(context)
    return context


def trusting(authority: trustme.CA, monkeypatch: pytest.MonkeyPatch) -> HttpClient:
    """A client made like the product's, on a machine that trusts this authority alone."""
    with authority.cert_pem.tempfile() as path:
        monkeypatch.setenv("SSL_CERT_FILE", path)
        monkeypatch.setenv("SSL_CERT_DIR", "/nowhere")
        client = HttpClient(5.0)
        client.target("https://localhost/", {})  # reads the file
    return client


@asynccontextmanager
async def secured(
    authority: trustme.CA, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[HttpClient, Peer]]:
    client = trusting(authority, monkeypatch)
    async with running_peer(server_tls(authority, "localhost", "127.0.0.1")) as peer:
        yield client, peer
        await client.close()


async def refusal(client: HttpClient, url: str) -> UpstreamFailed:
    with pytest.raises(UpstreamFailed, match=r"^no connection: ") as caught:
        await client.post(client.target(url, {"x-key": "secret"}), b"{}")
    assert not caught.value.may_have_billed
    assert "secret" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
async def test_tls_with_a_certificate_of_the_host(
    authority: trustme.CA, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    async with secured(authority, monkeypatch) as (client, peer):
        peer.scripts = [(OK,), (CHUNKED + chunks(b"a"), chunks(b"b") + END), (OK,)]
        target = client.target(peer.url(host), {})
        bodies = [await read_all(await client.post(target, b"{}")) for _ in range(3)]

        assert bodies == [b"ok", b"ab", b"ok"]
        assert peer.connections == 1
        secured_by = peer.writers[0].get_extra_info("ssl_object")
        assert secured_by.selected_alpn_protocol() == "http/1.1"


async def test_large_bodies_both_ways_over_tls(
    authority: trustme.CA, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = bytes(range(256)) * 12_000
    async with secured(authority, monkeypatch) as (client, peer):
        peer.make = lambda asked: sized(asked.body)
        for _ in range(2):
            reply = await post(client, peer, body)
            await turns(100)
            assert await read_all(reply) == body

        assert peer.connections == 1


@pytest.mark.parametrize("fault", ["wrong host", "untrusted", "expired"])
async def test_tls_with_a_bad_certificate_is_no_connection(
    authority: trustme.CA, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    issuer = trustme.CA() if fault == "untrusted" else authority
    name = "other.example" if fault == "wrong host" else "localhost"
    client = trusting(authority, monkeypatch)
    async with running_peer(server_tls(issuer, name, expired=fault == "expired")) as peer:
        assert "SSLCertVerificationError" in (await refusal(client, peer.url("localhost"))).reason
        assert peer.asked == []
        await client.close()


async def test_a_plain_peer_on_a_tls_port_is_no_connection(peer: Peer) -> None:
    client = HttpClient(5.0)
    peer.greeting = b"220 hello\r\n"
    await refusal(client, peer.url().replace("http:", "https:"))

    assert peer.asked == []
    await client.close()


async def test_a_tls_peer_on_a_plain_port_is_no_answer(
    authority: trustme.CA, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = HttpClient(5.0)
    async with running_peer(server_tls(authority, "localhost")) as peer:
        with pytest.raises(UpstreamFailed):
            await client.post(client.target(peer.url().replace("https:", "http:"), {}), b"")

        assert peer.asked == []
        await client.close()


@pytest.mark.parametrize("goodbye", [True, False])
async def test_over_tls_only_a_proper_goodbye_ends_a_body_without_a_length(
    authority: trustme.CA, monkeypatch: pytest.MonkeyPatch, goodbye: bool
) -> None:
    """Anybody on the way can cut a connection, and what came would look whole."""
    async with secured(authority, monkeypatch) as (client, peer):
        peer.says(head() + b"all of it", Do.CLOSE if goodbye else Do.CUT)
        if goodbye:
            assert await ask(client, peer) == b"all of it"
        else:
            with pytest.raises(UpstreamFailed):
                await ask(client, peer)


@pytest.mark.parametrize("wire", [OK[:-1], CHUNKED + chunks(b"ok"), OK[:20]])
@pytest.mark.parametrize("how", [Do.CLOSE, Do.CUT, Do.RESET])
async def test_an_answer_that_breaks_off_over_tls_is_not_whole(
    authority: trustme.CA, monkeypatch: pytest.MonkeyPatch, wire: bytes, how: Do
) -> None:
    async with secured(authority, monkeypatch) as (client, peer):
        peer.says(wire, how)

        with pytest.raises(UpstreamFailed) as caught:
            await ask(client, peer)
        assert caught.value.may_have_billed


async def test_an_idle_tls_connection_that_the_peer_closed_is_not_used(
    authority: trustme.CA, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with secured(authority, monkeypatch) as (client, peer):
        peer.scripts = [(OK, Do.CLOSE), (OK,)]
        assert await ask(client, peer) == b"ok"
        await until(lambda: peer.left == 1)
        assert await ask(client, peer) == b"ok"


async def test_a_refused_connection() -> None:
    client = HttpClient(5.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    assert "ConnectionRefused" in (await refusal(client, f"http://127.0.0.1:{port}/")).reason
    await client.close()


async def test_a_name_that_does_not_exist() -> None:
    client = HttpClient(5.0)

    await refusal(client, "http://nowhere.invalid/")
    await client.close()


async def test_the_deadline_holds_for_tls_too() -> None:
    client = HttpClient(0.1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"https://127.0.0.1:{listener.getsockname()[1]}/"
        assert "Timeout" in (await refusal(client, url)).reason
    await client.close()


async def test_the_deadline_holds_for_the_name_too() -> None:
    client = HttpClient(0.05)
    target = client.target("http://slow.example/", {})
    async with target.pool._lookup:  # another request asks for the name, for ever
        assert "Timeout" in (await refusal(client, "http://slow.example/")).reason
    await client.close()


async def test_another_address_is_tried_when_the_first_refuses(peer: Peer) -> None:
    """localhost may be ::1 first, where nobody listens."""
    peer.says(OK)
    client = HttpClient(5.0)
    infos = [(family, 1, 6, "", (host, peer.port)) for family, host in ADDRESSES]
    target = client.target(peer.url("both.example"), {})
    target.pool._addresses = infos
    target.pool._addresses_until = asyncio.get_running_loop().time() + 60

    assert await read_all(await client.post(target, b"")) == b"ok"
    assert b"host: both.example:%d\r\n" % peer.port in peer.asked[0].head
    await client.close()


ADDRESSES = [(socket.AF_INET6, "::1"), (socket.AF_INET, "127.0.0.2"), (socket.AF_INET, "127.0.0.1")]


async def test_the_request_is_what_was_prepared_and_nothing_more(peer: Peer) -> None:
    peer.says(OK)
    client = HttpClient(5.0)
    target = client.target(peer.url() + "?a=b%20c", {"accept": "x/y", "x-key": "k"})
    await read_all(await client.post(target, b"body"))

    assert peer.asked[0].head == (
        b"POST /v1/chat/completions?a=b%%20c HTTP/1.1\r\nhost: 127.0.0.1:%d\r\naccept: x/y\r\n"
        b"x-key: k\r\ncontent-length: 4\r\n\r\n" % peer.port
    )
    assert peer.asked[0].body == b"body"
    await client.close()


async def test_small_requests_are_not_held_back(peer: Peer) -> None:
    peer.says(OK)
    client = HttpClient(5.0)
    await ask(client, peer)
    connection = client.target(peer.url(), {}).pool.pick()
    assert connection is not None
    sock = connection._transport.get_extra_info("socket")

    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    await client.close()
