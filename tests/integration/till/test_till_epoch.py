"""The epoch of the till: who may open it, when it ends, and what a late word of an old one does."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from billing.errors import TillRebuilding, TillRefused
from billing.fleet import PoolBook, read_epoch
from billing.till import Till
from billing.till_epoch import AccountState, epoch_key
from billing.till_link import Arg, TillLink
from billing.till_wire import Renewal
from tests.support.books import open_pool
from tests.support.tills import (
    SCRIPTS,
    Said,
    admit,
    confirmation,
    look,
    running_link,
    running_till,
    settle,
)

KEY = epoch_key(0)


@pytest.fixture
async def link(till_url: str) -> AsyncIterator[TillLink]:
    async with running_link(till_url) as link:
        yield link


async def shard(link: TillLink, epoch: int, to: str) -> str:
    return str(await link.run(SCRIPTS.shard, (KEY,), (epoch, to)), "ascii")


async def test_a_shard_that_was_closed_for_an_epoch_opens_in_no_older_one(link: TillLink) -> None:
    """A worker that had read the epoch before it ended opened the emptied shard in it again."""
    told = [await shard(link, *word) for word in ((1, "close"), (1, "open"), (2, "close"))]
    late = await shard(link, 1, "open")
    closed = await link.command(("GET", KEY))
    told += [await shard(link, *word) for word in ((2, "open"), (2, "close"), (1, "close"))]

    assert (late, closed) == ("newer", b"-2")
    assert told == ["closed", "open", "closed", "open", "open", "newer"]
    assert await link.command(("GET", KEY)) == b"2"


async def test_an_emptied_shard_is_not_opened_as_if_nothing_happened(link: TillLink) -> None:
    await shard(link, 1, "close")
    await shard(link, 1, "open")
    await link.command(("FLUSHALL",))

    assert await shard(link, 1, "open") == "lost"
    assert await link.command(("GET", KEY)) is None


async def test_a_worker_that_starts_on_an_emptied_till_begins_a_new_epoch(till_url: str) -> None:
    """It opened the old one before the others had noticed: they never placed their holds again."""
    said = Said()
    scopes = said.account(1000)
    async with running_till(till_url, said) as old, running_till(till_url, said) as new:
        await admit(old, scopes, 600)
        await old.link.command(("FLUSHALL",))
        said.began_at, said.others = 0.0, 1
        with pytest.raises(TillRebuilding):
            await admit(new, scopes, 600)

        assert said.epoch == 2
        assert not await old.epoch.has(1)


async def test_a_shard_that_a_young_epoch_did_not_close_yet_is_waited_for(till_url: str) -> None:
    said = Said()
    scopes = said.account(1000)
    said.server = "x"
    async with running_till(till_url, said) as till:
        await till.epoch.set_shards(2, "close")
        said.epoch, said.server = 2, (await till.link.command(("INFO", "server"))).decode()
        said.server = said.server.partition("run_id:")[2].split()[0]
        await till.link.command(("DEL", scopes.epoch_key))
        said.began_at = asyncio.get_running_loop().time()
        with pytest.raises(TillRebuilding):
            await admit(till, scopes, 1)

        assert said.epoch == 2


async def test_workers_that_open_the_first_till_together_begin_one_epoch(
    book_url: str, till_url: str
) -> None:
    """The second ended the epoch that the first had just begun."""
    async with open_pool(book_url, 12) as pool:
        books = [PoolBook(pool, f"w_{at}") for at in range(8)]
        read = [await book.read_epoch() for book in books]
        await asyncio.gather(
            *(book.bump_epoch(known, "server") for book, known in zip(books, read, strict=True))
        )
        async with pool.acquire() as conn:
            assert (await read_epoch(conn)).number == 1


async def test_workers_that_find_the_till_lost_together_end_one_epoch(book_url: str) -> None:
    async with open_pool(book_url, 12) as pool:
        books = [PoolBook(pool, f"w_{at}") for at in range(8)]
        await books[0].bump_epoch(await books[0].read_epoch(), "server")
        read = [await book.read_epoch() for book in books]
        ended = await asyncio.gather(
            *(book.bump_epoch(known, "server") for book, known in zip(books, read, strict=True))
        )

        assert {epoch.number for epoch in ended} == {2}


class Mute(TillLink):
    """A connection that may not ask who the server is."""

    def command(self, args: tuple[Arg, ...]) -> asyncio.Future[object]:
        if args[0] != "INFO":
            return super().command(args)
        future = asyncio.get_running_loop().create_future()
        future.set_exception(TillRefused("NOPERM"))
        return future


async def test_an_emptied_till_that_does_not_tell_its_name_ends_its_epoch(
    book_url: str, till_url: str
) -> None:
    """The book had no server to compare with, so its epoch never ended."""
    link = Mute(till_url, SCRIPTS.all(), call_timeout_s=2, stall_timeout_s=5, pending_max=1000)
    link.start()
    await link.wait_up(5)
    async with open_pool(book_url) as pool:
        till = Till(link, SCRIPTS, PoolBook(pool, "w"), worker="w", lease_ms=1000)
        first = await till.learn_epoch()
        await link.command(("FLUSHALL",))
        till.epoch.doubt(first, is_lost=True)
        second = await till.learn_epoch()
        await link.close()

    assert (first, second) == (1, 2)


async def test_a_frozen_account_stays_frozen_when_a_confirm_overtakes_its_seed(
    till_url: str,
) -> None:
    """The confirm's version was newer, so the seed was kept out together with its status."""
    said = Said()
    scopes = said.account(1000)
    async with running_till(till_url, said) as till:
        request_id = await admit(till, scopes, 100)
        await settle(till, scopes, request_id, 100)
        await till.link.command(("DEL", scopes.scope_keys[0], scopes.outbox_key))
        newer = AccountState(account_id=scopes.account_id, balance_nanos=900, version=2, status="")
        await till.confirm(confirmation(newer, scopes, request_id))
        await till.seed(said.put(scopes.account_id, 1000, 1, "frozen"))

    seen = await look(till_url, scopes)
    assert (seen.posted, seen.version, seen.status) == (900, 2, "frozen")


class Slow(Said):
    """A book whose answer was read before the till lost everything, and arrives after it."""

    till: Till

    async def read_account(self, account_id: object) -> AccountState:
        state = self.accounts[account_id]  # type: ignore[index]
        if self.reads == 0:
            self.reads += 1
            await self.till.link.command(("FLUSHALL",))
            self.till.epoch.doubt(self.till.epoch.number, is_lost=True)
            await self.till.learn_epoch()
        return state


async def test_what_the_book_said_before_an_epoch_began_seeds_nothing_in_it(till_url: str) -> None:
    """Commits after that reading were confirmed to the till that is gone: credit came back."""
    said = Slow()
    scopes = said.account(1000)
    async with running_till(till_url, said) as till:
        said.till = till
        await till.learn_epoch()
        await till.seed_from_book(scopes.account_id)

    assert said.epoch == 2
    assert (await look(till_url, scopes)).posted is None


async def test_growth_that_the_till_lost_is_held_again_whatever_else_is_held(till_url: str) -> None:
    """The worker may spend what it was granted; only new growth can be refused."""
    said = Said()
    scopes = said.account(1000)
    async with running_till(till_url, said) as till:
        request_id = await admit(till, scopes, 400)
        await admit(till, scopes, 500)  # in the place of the growth that was lost
        wanted = Renewal(request_id=request_id, hold_nanos=700, is_forwarded=True)
        told = (await till.renew(scopes, wanted))[0]
        again = Renewal(
            request_id=request_id, hold_nanos=700, is_forwarded=True, draft=b"{}", is_new=True
        )
        answer = await till.renew(scopes, again)

    assert (told, answer) == (b"short", [b"ok", 700, 0])
    seen = await look(till_url, scopes)
    seen.check()
    assert (seen.holds[request_id], seen.available) == (700, -200)
