"""The connection to a healthy, a restarted and a refusing server."""

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import redis.asyncio

from billing.errors import TillRefused, TillUnavailable
from billing.till_link import Script, TillLink
from gateway.embedded.valkey import EmbeddedValkey
from tests.support.faultproxy import running_proxy
from tests.support.gateway import eventually
from tests.support.tills import Said, admit, look, nothing_unseen, running_link, running_till


@pytest.fixture
async def own_valkey(tmp_path: Path) -> AsyncIterator[EmbeddedValkey]:
    """A server that this test may stop and misuse."""
    server = EmbeddedValkey(tmp_path / "valkey")
    await server.start()
    yield server
    await server.stop()


@pytest.fixture(autouse=True)
async def unseen() -> AsyncIterator[None]:
    async with nothing_unseen():
        yield


async def up(link: TillLink) -> None:
    async def probe() -> bool | None:
        return link.is_up or None

    await eventually(probe)


async def down(link: TillLink) -> None:
    async def probe() -> bool | None:
        return None if link.is_up else True

    await eventually(probe)


async def stat(url: str, name: str) -> int:
    client = redis.asyncio.from_url(url)
    try:
        return int((await client.info())[name])
    finally:
        await client.aclose()


async def test_a_thousand_calls_at_once_get_their_own_answers(till_url: str) -> None:
    seeded = random.Random(1)
    said = [seeded.randbytes(seeded.randrange(2000)) for _ in range(1000)]
    async with running_link(till_url) as link:
        before = await stat(till_url, "total_reads_processed")
        answers = await asyncio.gather(*(link.command(("ECHO", text)) for text in said))
        reads = await stat(till_url, "total_reads_processed") - before

    assert answers == said
    # All left with one write; the server reads it in pieces of its own buffer's size.
    assert reads < 200


async def test_calls_of_many_tasks_keep_their_order(till_url: str) -> None:
    async with running_link(till_url) as link:

        async def push(number: int) -> None:
            await link.command(("RPUSH", f"order:{number % 7}", number))

        await asyncio.gather(*(push(number) for number in range(1000)))
        for which in range(7):
            kept = await link.command(("LRANGE", f"order:{which}", 0, -1))
            assert [int(number) for number in kept] == list(range(which, 1000, 7))


async def test_binary_and_large_arguments_come_back_unchanged(till_url: str) -> None:
    large = bytes(range(256)) * 20_000
    async with running_link(till_url) as link:
        assert await link.command(("ECHO", large)) == large
        assert await link.command(("ECHO", 2**53 - 1)) == b"9007199254740991"
        assert await link.command(("ECHO", "ü\r\n")) == "ü\r\n".encode()


async def test_a_forgotten_script_is_taught_again(till_url: str) -> None:
    said = Said()
    scopes = said.account(1000)
    async with running_till(till_url, said) as till:
        await admit(till, scopes, 1)
        await till.link.command(("SCRIPT", "FLUSH"))
        await asyncio.gather(*(admit(till, scopes, 1) for _ in range(100)))
        await till.link.command(("SCRIPT", "FLUSH"))
        await admit(till, scopes, 1)

    assert (await look(till_url, scopes)).open == 102


async def test_a_failing_script_is_a_refusal_and_the_link_goes_on(till_url: str) -> None:
    broken = Script("broken", "#!lua\nreturn redis.error_reply('OUCH it hurts')")
    async with running_link(till_url, [broken]) as link:
        with pytest.raises(TillRefused) as caught:
            await link.run(broken, (), ())
        with pytest.raises(TillRefused):
            await link.command(("NOSUCHCOMMAND",))
        assert await link.command(("ECHO", "on")) == b"on"

    assert caught.value.reply.startswith("OUCH")


@pytest.mark.parametrize(("password", "error"), [("wrong", "WRONGPASS"), ("", "NOAUTH")])
async def test_a_wrong_password_never_connects_and_is_not_shown(
    till_url: str, password: str, error: str
) -> None:
    at = till_url.index("@")
    url = f"redis://:{password}{till_url[at:]}" if password else f"redis://{till_url[at + 1 :]}"
    async with running_link(url, wait=False) as link:
        assert not await link.wait_up(0.1)
        with pytest.raises(TillUnavailable) as caught:
            await link.command(("PING",))

    assert not caught.value.asked
    assert error in link.last_error
    assert "wrong" not in link.last_error.lower().replace("wrongpass", "")


async def test_nothing_listens_and_then_something_does(own_valkey: EmbeddedValkey) -> None:
    async with running_proxy(own_valkey.url) as (proxy, url):
        proxy.refuse()
        async with running_link(url, wait=False) as link:
            assert not await link.wait_up(0.1)
            proxy.heal()
            await up(link)
            assert await link.command(("PING",)) == b"PONG"


async def test_a_restarted_server_is_found_again(own_valkey: EmbeddedValkey) -> None:
    said = Said()
    scopes = said.account(1000)
    async with running_proxy(own_valkey.url) as (proxy, url), running_till(url, said) as till:
        await admit(till, scopes, 300)
        await own_valkey.stop()
        await down(till.link)
        with pytest.raises(TillUnavailable) as caught:
            await admit(till, scopes, 1)
        await own_valkey.start()
        proxy.lead_to(own_valkey.url)
        await up(till.link)
        await admit(till, scopes, 300)
        seen = await look(url, scopes)

    assert not caught.value.asked
    assert (seen.held, seen.open) == (600, 2)


async def test_a_server_that_is_no_primary_is_not_there(own_valkey: EmbeddedValkey) -> None:
    said = Said()
    scopes = said.account(1000)
    client = redis.asyncio.from_url(own_valkey.url)
    async with client, running_till(own_valkey.url, said) as till:
        await admit(till, scopes, 1)
        await client.replicaof("127.0.0.1", 1)
        with pytest.raises(TillUnavailable):
            await admit(till, scopes, 1)
        await client.replicaof("NO", "ONE")
        await up(till.link)
        await admit(till, scopes, 1)

    assert (await look(own_valkey.url, scopes)).open == 2


async def test_a_server_that_serves_nothing_stale_is_not_there(own_valkey: EmbeddedValkey) -> None:
    """MASTERDOWN, and LOADING in the same way: no connection until it is over."""
    client = redis.asyncio.from_url(own_valkey.url)
    async with client, running_link(own_valkey.url) as link:
        await client.config_set("replica-serve-stale-data", "no")
        await client.replicaof("127.0.0.1", 1)
        with pytest.raises(TillUnavailable):
            await link.command(("GET", "x"))
        await client.replicaof("NO", "ONE")
        await up(link)
        assert await link.command(("GET", "x")) is None


async def test_a_killed_connection_fails_its_calls_and_comes_back(till_url: str) -> None:
    async with running_link(till_url) as link:
        number = await link.command(("CLIENT", "ID"))
        blocked = [link.command(("BLPOP", "nothing", 0)), link.command(("ECHO", "after"))]
        client = redis.asyncio.from_url(till_url)
        await client.client_kill_filter(_id=str(number))
        await client.aclose()
        answers = await asyncio.gather(*blocked, return_exceptions=True)
        await up(link)
        assert await link.command(("ECHO", "again")) == b"again"

    assert all(isinstance(answer, TillUnavailable) and answer.asked for answer in answers)


async def test_calls_in_flight_fail_when_the_link_is_closed(till_url: str) -> None:
    clients = await stat(till_url, "connected_clients")
    descriptors = psutil.Process().num_fds()
    async with running_link(till_url) as link:
        awaited = [link.command(("BLPOP", "nothing", 0)) for _ in range(100)]
        unawaited = [link.command(("BLPOP", "nothing", 0)) for _ in range(100)]
        for future in unawaited:
            future.add_done_callback(lambda future: future.exception())
        await link.close()
        answers = await asyncio.gather(*awaited, return_exceptions=True)
        await link.close()
        with pytest.raises(TillUnavailable):
            await link.command(("PING",))

    assert {type(answer) for answer in answers} == {TillUnavailable}
    assert not link.is_up
    assert psutil.Process().num_fds() == descriptors

    async def gone() -> bool | None:
        return await stat(till_url, "connected_clients") <= clients or None

    await eventually(gone)


async def test_a_link_can_be_closed_at_any_moment_of_connecting(till_url: str) -> None:
    for turns in range(40):
        async with running_link(till_url, wait=False):
            for _ in range(turns):
                await asyncio.sleep(0)


async def test_no_more_calls_wait_than_may(till_url: str) -> None:
    async with running_link(till_url, pending_max=5) as link:
        waiting = [link.command(("BLPOP", "nothing", 0)) for _ in range(5)]
        with pytest.raises(TillUnavailable) as caught:
            await link.command(("PING",))
        await link.close()
        await asyncio.gather(*waiting, return_exceptions=True)

    assert not caught.value.asked


@pytest.mark.parametrize("url", ["", "http://x", "redis://", "redis:///0", "127.0.0.1:6379"])
async def test_an_address_that_is_none_is_refused_at_once(url: str) -> None:
    with pytest.raises(ValueError, match="redis://"):
        TillLink(url, [], call_timeout_s=1, stall_timeout_s=1, pending_max=1)
