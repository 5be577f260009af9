"""Till and book away at once: running streams finish, and their receipts are on disk by then."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from billing.spool import SUFFIX
from config.ids import read_id
from gateway.cli.context import with_stores
from gateway.embedded.stores import StoreUrls
from gateway.work import working
from tests.support.books import check_book, open_pool
from tests.support.faultproxy import FaultProxy, running_proxy
from tests.support.gateway import Gateway, eventually, make_settings, running_gateway, zoo_model
from tests.support.rawclient import Outcome, chat, exchange
from tests.support.upstream.launch import Upstream

STREAMS = 12
MODELS = {"paced": zoo_model("plain:tokens=20,chunk_delay_ms=50"), "plain": zoo_model("plain")}
SETTINGS: dict[str, Any] = {
    "server__drain_timeout_s": 1,
    "book__statement_timeout_ms": 500,
    "book__connect_timeout_s": 1,
}


class Away:
    """A gateway whose stores can be taken away, and the folder of its spool."""

    def __init__(self, gateway: Gateway, stores: list[FaultProxy], folder: Path) -> None:
        self.gateway = gateway
        self.stores = stores
        self.folder = folder
        self.at_end: list[bool] = []
        """Of each stream: was its receipt on disk when its client saw the end?"""

    def harm(self, fault: str) -> None:
        for store in self.stores:
            store.refuse() if fault == "refuse" else store.half_open()

    def heal(self) -> None:
        for store in self.stores:
            store.heal()

    def spooled(self) -> bytes:
        return b"".join(path.read_bytes() for path in self.folder.glob(f"*{SUFFIX}"))

    async def streams(self, key: str, fault: str) -> list[Outcome]:
        """Live streams whose stores are taken away in the middle; all of them to their end."""

        async def live() -> bool | None:
            return self.gateway.services.open_calls == STREAMS or None

        running = [asyncio.ensure_future(self.one_stream(key)) for _ in range(STREAMS)]
        await eventually(live)
        self.harm(fault)
        return await asyncio.gather(*running)

    async def one_stream(self, key: str) -> Outcome:
        payload = {"model": "paced", "messages": [{"role": "user", "content": "hi"}]}
        request = chat(key, {**payload, "stream": True})
        answer = await exchange(self.gateway.base_url, request, deadline=30)
        self.at_end.append(str(receipt_id(answer)).encode() in self.spooled())
        assert answer.frames()[-1] == "[DONE]"
        return answer

    async def plain(self, key: str) -> Outcome:
        payload = {"model": "plain", "messages": [{"role": "user", "content": "hi"}]}
        return await exchange(self.gateway.base_url, chat(key, payload), deadline=30)


@asynccontextmanager
async def two_proxies(
    book_url: str, till_url: str, upstream: Upstream, folder: Path, **more: Any
) -> AsyncIterator[Away]:
    given = {**SETTINGS, "book__spool_dir": str(folder), **more}
    settings = make_settings(upstream.base_url, MODELS, **given)
    async with AsyncExitStack() as stack:
        book, book_at = await stack.enter_async_context(running_proxy(book_url))
        till, till_at = await stack.enter_async_context(running_proxy(till_url))
        opened = running_gateway(book_at, till_at, upstream.base_url, settings)
        gateway = await stack.enter_async_context(opened)
        yield Away(gateway, [book, till], folder)


def receipt_id(answer: Outcome) -> UUID:
    assert answer.head is not None
    return read_id(answer.head.get("x-receipt-id") or "")


async def charged(book_url: str) -> dict[UUID, int]:
    """Receipts in the book, each with the number of times it was charged."""
    async with open_pool(book_url, 1) as pool:
        await check_book(pool)
        rows = await pool.fetch(
            "SELECT r.request_id, count(l.reference) AS charges FROM charge_receipts AS r"
            " LEFT JOIN credit_ledger AS l ON l.reference = r.request_id::text"
            " AND l.reason = 'charge' GROUP BY r.request_id"
        )
    return {row["request_id"]: row["charges"] for row in rows}


@pytest.mark.parametrize("fault", ["refuse", "half_open"])
async def test_each_stream_ends_with_its_receipt_on_disk_and_comes_into_the_book_once(
    book_url: str, till_url: str, upstream: Upstream, tmp_path: Path, fault: str
) -> None:
    folder = tmp_path / "spool"
    async with two_proxies(book_url, till_url, upstream, folder) as away:
        key = await away.gateway.key()
        answers = await away.streams(key, fault)
        refused = await away.plain(key)
        uncommitted = away.gateway.services.spool.uncommitted  # type: ignore[union-attr]
        assert await charged(book_url) == {}
        away.heal()
        await eventually(lambda: idle(away.gateway), 40)

        async def emptied() -> bool | None:
            return away.spooled() == b"" or None

        await eventually(emptied)

    assert away.at_end == [True] * STREAMS
    assert uncommitted >= STREAMS
    assert refused.status == 503
    receipts = await charged(book_url)
    assert {receipt_id(answer): 1 for answer in answers}.items() <= receipts.items()
    # A till that was asked and said nothing leaves a receipt of nothing, too.
    assert sum(receipts.values()) == STREAMS
    assert list(folder.iterdir()) == []


async def is_empty(folder: Path) -> bool | None:
    return not os.listdir(folder) or None


async def idle(gateway: Gateway) -> bool | None:
    return (gateway.services.open_calls == 0 and gateway.services.settler.is_idle) or None


@pytest.mark.parametrize("heir", ["worker", "work"])
async def test_a_stop_without_either_store_loses_nothing(
    heir: str,
    book_url: str,
    till_url: str,
    upstream: Upstream,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "spool"
    async with two_proxies(book_url, till_url, upstream, folder) as away:
        answers = await away.streams(await away.gateway.key(), "refuse")
    (told,) = [record for record in caplog.records if record.message == "receipts.unposted"]
    left = away.spooled()
    settings = make_settings(upstream.base_url, MODELS, book__spool_dir=str(folder))

    async def all_in() -> dict[UUID, int] | None:
        receipts = await charged(book_url)
        return receipts if len(receipts) >= STREAMS else None

    if heir == "worker":
        async with running_gateway(book_url, till_url, upstream.base_url, settings):
            receipts = await eventually(all_in)
    else:
        urls = StoreUrls(book_url, till_url, {}, embedded=False)
        async with working(with_stores(settings, urls)):
            receipts = await eventually(all_in)
            await eventually(lambda: is_empty(folder))

    assert told.levelno == logging.ERROR
    facts = vars(told)
    assert (facts["count"], facts["in_till"], facts["lost"]) == (STREAMS, 0, 0)
    assert left.count(b"\n") == STREAMS
    assert receipts == {receipt_id(answer): 1 for answer in answers}
    assert list(folder.iterdir()) == []


async def test_a_disk_that_refuses_too_ends_no_stream_and_loses_nothing_while_the_worker_lives(
    book_url: str, till_url: str, upstream: Upstream, tmp_path: Path
) -> None:
    folder = tmp_path / "spool"
    folder.write_text("no folder")
    async with two_proxies(book_url, till_url, upstream, folder) as away:
        answers = await away.streams(await away.gateway.key(), "refuse")
        away.heal()
        await eventually(lambda: idle(away.gateway), 40)

    assert await charged(book_url) == {receipt_id(answer): 1 for answer in answers}
