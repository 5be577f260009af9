"""The spool: what neither store took is on disk, and comes into the book exactly once."""

import asyncio
import logging
import resource
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from billing.book import Pool, acquire
from billing.posting import post_receipts
from billing.receipts import ChargeReceipt, encode_receipt
from billing.settler import Settled
from billing.spool import Spool, spool_line
from billing.spool_replay import Post, Replayed, replay_spool
from config.clock import Seconds
from config.ids import id_text
from gateway.supervise import Tasks
from tests.support.books import Account, balance, check_book, make_account, open_pool
from tests.support.gateway import eventually

START = 10**9


class Desk:
    """A spool, and receipts that nobody else takes."""

    def __init__(self, folder: Path, account: Account) -> None:
        self.folder = folder
        self.account = account
        self.results: Counter[str] = Counter()
        self.untaken: list[Settled] = []
        self.asked: list[Seconds] = []
        self.spool = self.make("w_one")

    def make(self, owner: str, waiting_max: int = 1000) -> Spool:
        return Spool(
            self.folder,
            owner,
            waiting_max=waiting_max,
            untaken=self._untaken,
            on_result=lambda result, count: self.results.update({result: count}),
        )

    def _untaken(self, age_s: Seconds) -> list[Settled]:
        self.asked.append(age_s)
        return self.untaken

    def settled(self, price: int = 7) -> Settled:
        loop = asyncio.get_running_loop()
        receipt = self.account.receipt(price)
        name = id_text(receipt.request_id)
        reply, committed = loop.create_future(), loop.create_future()
        return Settled(receipt, name, self.account.scopes, reply, committed, loop.time())

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(self.folder.iterdir())}

    def lines(self) -> list[bytes]:
        return b"".join(self.files().values()).splitlines(keepends=True)


@asynccontextmanager
async def at_work(desk: Desk, spool: Spool | None = None) -> AsyncIterator[None]:
    spool, tasks = spool or desk.spool, Tasks()
    tasks.start(spool.run(), "spool")
    try:
        yield
    finally:
        await tasks.close()
        spool.close()


@pytest.fixture
async def desk(book_url: str, tmp_path: Path) -> AsyncIterator[Desk]:
    async with open_pool(book_url, 1) as pool:
        yield Desk(tmp_path / "spool", await make_account(pool, START))


def line_of(receipt: ChargeReceipt) -> bytes:
    return spool_line(encode_receipt(receipt))


def post_into(pool: Pool) -> Post:
    """Into the book and nothing else: there is no till here."""

    async def post(receipts: list[ChargeReceipt]) -> None:
        async with acquire(pool) as conn:
            await post_receipts(conn, receipts)

    return post


async def replay(book_url: str, folder: Path) -> Replayed:
    async with open_pool(book_url, 2) as pool:
        done = await replay_spool(folder, post_into(pool))
        await check_book(pool)
    return done


async def left(book_url: str, account: Account) -> int:
    async with open_pool(book_url, 1) as pool:
        return await balance(pool, account)


@contextmanager
def files_at_most(size: int) -> Iterator[None]:
    """No file of this process grows beyond that: a disk that is full in the middle of a line."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def test_a_kept_receipt_is_a_line_on_disk_that_its_owner_locks(
    desk: Desk, book_url: str
) -> None:
    async with at_work(desk):
        settled = desk.settled()
        assert await desk.spool.keep(settled, 5)
        assert await desk.spool.keep(settled, 5)  # once is enough

        assert desk.lines() == [line_of(settled.receipt)]
        assert desk.spool.uncommitted == 1
        # Somebody's: nobody else replays it.
        assert await replay(book_url, desk.folder) == Replayed()
        assert [path.stat().st_mode & 0o777 for path in desk.folder.iterdir()] == [0o600]
    assert desk.folder.stat().st_mode & 0o777 == 0o700

    assert await replay(book_url, desk.folder) == Replayed(files=1, receipts=1)
    assert await left(book_url, desk.account) == START - 7
    assert desk.files() == {}


async def test_many_who_wait_share_a_sync(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    async with at_work(desk):
        settled = [desk.settled(n) for n in range(300)]
        kept = await asyncio.gather(*(desk.spool.keep(one, 5) for one in settled))

        assert all(kept)
        assert sorted(desk.lines()) == sorted(line_of(one.receipt) for one in settled)
    writes = [r.receipts for r in caplog.records if r.message == "spool.written"]  # type: ignore[attr-defined]
    assert sum(writes) == 300
    assert len(writes) <= 4


async def test_the_file_is_emptied_when_the_book_has_all_of_it_and_deleted_at_the_end(
    desk: Desk,
) -> None:
    async def is_empty() -> bool | None:
        return desk.lines() == [] or None

    async with at_work(desk):
        for _ in range(2):
            one, two = desk.settled(), desk.settled()
            assert await desk.spool.keep(one, 5)
            assert await desk.spool.keep(two, 5)
            one.committed.set_result(None)
            three = desk.settled()
            assert await desk.spool.keep(three, 5)
            assert len(desk.lines()) == 3
            two.committed.set_result(None)
            three.committed.set_result(None)
            await eventually(is_empty)
            assert len(desk.files()) == 1
    assert desk.files() == {}


async def test_what_nobody_waits_for_is_kept_all_the_same(desk: Desk) -> None:
    desk.untaken = [desk.settled(), desk.settled()]
    async with at_work(desk):

        async def kept() -> bool | None:
            return desk.spool.uncommitted == 2 or None

        await eventually(kept)
    assert len(desk.lines()) == 2
    assert set(desk.asked) == {1.0}


async def test_the_end_of_a_worker_keeps_what_is_left(desk: Desk) -> None:
    async with at_work(desk):
        first = desk.settled()
        assert await desk.spool.keep(first, 5)
        desk.untaken = [first, desk.settled(), desk.settled()]
        assert await desk.spool.keep_rest(5) == 0
    assert len(desk.lines()) == 3


async def test_a_worker_that_ends_during_a_write_leaves_what_was_written(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk_answers = threading.Event()
    monkeypatch.setattr("billing.spool._sync", lambda _: disk_answers.wait(10))
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    tasks, settled = Tasks(), desk.settled()
    tasks.start(desk.spool.run(), "spool")
    assert not await desk.spool.keep(settled, 0.1)

    await tasks.close()
    disk_answers.set()
    await asyncio.to_thread(lambda: None)  # behind the write, in the same thread
    desk.spool.close()

    assert desk.lines() == [line_of(settled.receipt)]


async def test_a_caller_that_is_cancelled_does_not_take_its_receipt_along(desk: Desk) -> None:
    settled = desk.settled()
    waiting = asyncio.ensure_future(desk.spool.keep(settled, 5))
    await asyncio.sleep(0)
    waiting.cancel()
    async with at_work(desk):
        assert await desk.spool.keep(settled, 5)
    assert desk.lines() == [line_of(settled.receipt)]


async def test_what_waits_for_the_disk_is_bounded(desk: Desk) -> None:
    spool = desk.make("w_two", waiting_max=2)
    settled = [desk.settled() for _ in range(3)]
    kept = await asyncio.gather(*(spool.keep(one, 0.01) for one in settled))
    async with at_work(desk, spool):
        assert await spool.keep(settled[0], 5)

    assert kept == [False] * 3
    assert desk.lines() == [line_of(one.receipt) for one in settled[:2]]


async def test_a_disk_that_refuses_is_told_and_tried_again(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    desk.folder.write_text("no folder")
    settled, committed = desk.settled(), desk.settled()
    async with at_work(desk):
        assert not await desk.spool.keep(settled, 0.01)
        assert not await desk.spool.keep(committed, 0.01)
        committed.committed.set_result(None)  # nobody needs a line of it any more
        desk.folder.unlink()
        assert await desk.spool.keep(settled, 5)

    assert desk.lines() == [line_of(settled.receipt)]
    assert desk.results["failed"] >= 1
    assert desk.results["written"] == 1
    failed = [record for record in caplog.records if record.message == "spool.failed"]
    assert {record.levelno for record in failed} == {logging.ERROR}


async def test_a_disk_that_is_full_within_a_line_leaves_no_half_of_it(
    desk: Desk, book_url: str
) -> None:
    async with at_work(desk):
        first, second = desk.settled(1), desk.settled(2)
        second.receipt.served_model = "m" * 1000
        assert await desk.spool.keep(first, 5)
        with files_at_most(len(line_of(first.receipt)) + 50):
            assert not await desk.spool.keep(second, 0.3)
            assert desk.lines() == [line_of(first.receipt)]
        assert await desk.spool.keep(second, 5)
        assert sorted(desk.lines()) == sorted(line_of(one.receipt) for one in (first, second))
    assert desk.results["failed"] >= 1

    done = await replay(book_url, desk.folder)
    assert (done.receipts, done.bad, done.left) == (2, 0, 0)
    assert await left(book_url, desk.account) == START - 3


async def test_torn_and_corrupt_lines_are_put_aside_and_stop_nothing(
    desk: Desk, book_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    receipts = [desk.account.receipt(2**n) for n in range(6)]
    lines = [line_of(receipt) for receipt in receipts]
    changed = lines[1].replace(b'"price_nanos":2', b'"price_nanos":9')
    foreign = spool_line(b'{"some":"thing"}')
    torn = lines[5][:-10]
    desk.folder.mkdir()
    broken = [changed, foreign, b"\n", b"\xff\x00 garbage\n", b"x" * 300_000 + b"\n"]
    content = [lines[0], *broken, lines[2], lines[3], lines[4], torn]
    (desk.folder / "w_dead.spool").write_bytes(b"".join(content))
    (desk.folder / "w_other.spool").write_bytes(lines[5])

    done = await replay(book_url, desk.folder)

    # The line that is longer than any of ours comes in two pieces.
    assert done == Replayed(files=2, receipts=5, bad=7)
    assert await left(book_url, desk.account) == START - (1 + 4 + 8 + 16 + 32)
    assert desk.files() == {"w_dead.spool.bad": b"".join([*broken, torn])}
    told = [r for r in caplog.records if r.message == "spool.lines_bad"]
    assert [(r.levelno, r.lines) for r in told] == [(logging.ERROR, 7)]  # type: ignore[attr-defined]


async def test_a_receipt_that_the_book_refuses_is_put_aside(desk: Desk, book_url: str) -> None:
    good = [desk.account.receipt(n) for n in range(600)]
    poison = desk.account.receipt(5, attempt=0)
    desk.folder.mkdir()
    lines = [line_of(receipt) for receipt in (*good[:300], poison, *good[300:])]
    (desk.folder / "w_dead.spool").write_bytes(b"".join(lines))

    done = await replay(book_url, desk.folder)

    assert done == Replayed(files=1, receipts=600, refused=1)
    assert await left(book_url, desk.account) == START - sum(range(600))
    assert desk.files() == {"w_dead.spool.bad": line_of(poison)}


async def test_a_receipt_that_the_book_refuses_does_not_vanish_with_its_owner(
    desk: Desk, book_url: str
) -> None:
    async with at_work(desk):
        good, bad = desk.settled(), desk.settled()
        bad.receipt.attempt = 0
        for one in (good, bad):
            assert await desk.spool.keep(one, 5)
        good.committed.set_result(None)
        bad.committed.set_exception(TimeoutError())
        bad.committed.exception()

        async def replayed() -> Replayed | None:
            done = await replay(book_url, desk.folder)
            return done if done.files else None

        assert await eventually(replayed) == Replayed(files=1, receipts=1, refused=1)
        # And the owner has a new file for the next ones.
        third = desk.settled()
        assert await desk.spool.keep(third, 5)
    assert [line_of(bad.receipt), line_of(third.receipt)] == sorted(
        desk.lines(), key=lambda line: line != line_of(bad.receipt)
    )


async def test_replays_beside_each_other_and_again_charge_once(desk: Desk, book_url: str) -> None:
    receipts = [desk.account.receipt(n) for n in range(50)]
    desk.folder.mkdir()
    for number in range(20):
        mine = receipts[number : number + 30]  # most are in several files
        (desk.folder / f"w_{number}.spool").write_bytes(b"".join(map(line_of, mine)))

    done = await asyncio.gather(*(replay(book_url, desk.folder) for _ in range(4)))
    again = await replay(book_url, desk.folder)

    assert sum(one.files for one in done) == 20
    assert sum(one.bad + one.refused + one.left for one in done) == 0
    assert again == Replayed()
    assert await left(book_url, desk.account) == START - sum(range(49))


async def test_a_book_that_is_away_leaves_the_file_for_the_next_time(
    desk: Desk, book_url: str
) -> None:
    desk.folder.mkdir()
    path = desk.folder / "w_dead.spool"
    path.write_bytes(line_of(desk.account.receipt(9)) + b"torn")
    async with open_pool(book_url, 1) as pool:
        pool.terminate()
        away = await replay_spool(desk.folder, post_into(pool))

    assert away == Replayed(left=1)
    assert path.exists()
    assert await replay(book_url, desk.folder) == Replayed(files=1, receipts=1, bad=1)
    assert await left(book_url, desk.account) == START - 9


async def test_a_folder_that_is_not_there_has_nothing_to_replay(
    book_url: str, tmp_path: Path
) -> None:
    assert await replay(book_url, tmp_path / "none") == Replayed()
