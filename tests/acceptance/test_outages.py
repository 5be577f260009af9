"""What the promise says, shown with counts: Postgres away, the till emptied, a worker killed.

Each with streams under way; `--full` takes as many and as long as the promise names.
"""

import asyncio
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import redis.asyncio

from tests.support.farebox import PEPPER, Running, farebox, running_serve
from tests.support.faultproxy import FaultProxy, running_proxy
from tests.support.gateway import eventually
from tests.support.rawclient import Outcome, chat, exchange

WORDS = 100
CONFIG = f"""
[keys]
mode = "test"
[server]
drain_timeout_s = 10
[till]
hold_lease_s = 1
renew_every_s = 0.5
rebuild_wait_ms = 500
[work]
every_s = 0.3
sweep_grace_s = 0.5
takeover_after_s = 0.5
[limits]
open_requests_per_key = 1000
open_requests_per_account = 1000
[providers.quick]
kind = "echo"
[providers.slow]
kind = "echo"
chunk_delay_ms = 30
output_tokens = {WORDS}
[models.quick]
routes = [{{ provider = "quick" }}]
price = {{ input_usd_per_mtok = "1", output_usd_per_mtok = "4" }}
output_tokens_max = 100
[models.slow]
routes = [{{ provider = "slow" }}]
price = {{ input_usd_per_mtok = "1", output_usd_per_mtok = "4" }}
output_tokens_max = {WORDS}
"""
PROMPT = "word " * WORDS
CREDITS = 1_000_000
PACE_S = 0.02


class Site:
    """A gateway with one worker, its stores behind proxies, and a key that can pay."""

    def __init__(self, server: Running, key: str, book: FaultProxy, book_url: str) -> None:
        self.server = server
        self.key = key
        self.book = book
        self.book_url = book_url

    async def call(self, model: str, *, stream: bool) -> Outcome:
        payload: dict[str, Any] = {
            "model": model,
            "messages": [{"role": "user", "content": PROMPT}],
            "stream": stream,
        }
        return await exchange(self.server.base_url, chat(self.key, payload), deadline=90)

    def streams(self, count: int) -> "list[asyncio.Task[Outcome]]":
        group = [self.call("slow", stream=True) for _ in range(count)]
        return [asyncio.ensure_future(call) for call in group]

    async def query(self, sql: str) -> list[asyncpg.Record]:
        conn = await asyncpg.connect(self.book_url)
        try:
            return list(await conn.fetch(sql))
        finally:
            await conn.close()

    async def outcomes(self) -> Counter[str]:
        rows = await self.query("SELECT outcome, count(*) AS n FROM charge_receipts GROUP BY 1")
        return Counter({row["outcome"]: row["n"] for row in rows})

    async def eventually_receipts(self, count: int, timeout_s: float = 30) -> Counter[str]:
        async def enough() -> Counter[str] | None:
            found = await self.outcomes()
            return found if found.total() >= count else None

        return await eventually(enough, timeout_s)

    async def charged(self) -> tuple[int, int]:
        """Nanos on receipts and nanos that the ledger took."""
        (row,) = await self.query(
            "SELECT (SELECT sum(price_nanos) FROM charge_receipts)::bigint AS receipts, "
            "(SELECT -sum(amount_nanos) FROM credit_ledger WHERE reason <> 'grant')::bigint AS took"
        )
        return row["receipts"], row["took"]


class Place:
    """A folder with a config, and stores that outlive the gateway."""

    def __init__(self, folder: Path, book_url: str, till_url: str) -> None:
        (folder / "own.toml").write_text(CONFIG)
        self.folder = folder
        self.book_url = book_url
        self.env = {
            "FAREBOX_KEYS__PEPPER": PEPPER,
            "FAREBOX_CONFIG": "own.toml",
            "FAREBOX_DATABASE_URL": book_url,
            "FAREBOX_BOOK__ROLES": "shared",
            "FAREBOX_TILL_URL": till_url,
        }

    @asynccontextmanager
    async def site(self) -> AsyncIterator[Site]:
        key = await paying_key(self.folder, self.env)
        async with running_proxy(self.book_url) as (proxy, far_book):
            serve = running_serve(self.folder, **{**self.env, "FAREBOX_DATABASE_URL": far_book})
            # In a thread: it waits for the gateway, which waits for the proxy on our event loop.
            server = await asyncio.to_thread(serve.__enter__)
            try:
                yield Site(server, key, proxy, self.book_url)
            finally:
                await asyncio.to_thread(serve.__exit__, None, None, None)

    async def audit(self) -> str:
        """What the audit found wrong after everything has ended."""
        done = await farebox("audit", "--at-rest", cwd=self.folder, **self.env)
        return "" if done.status == 0 else done.out + done.err


@pytest.fixture
def place(tmp_path: Path, book_url: str, till_url: str) -> Place:
    return Place(tmp_path, book_url, till_url)


async def paying_key(folder: Path, env: dict[str, str]) -> str:
    created = await farebox("accounts", "create", "--json", cwd=folder, **env)
    account = created.json["billing_account_id"]
    await farebox("credits", "grant", account, str(CREDITS), cwd=folder, **env)
    options = ("--account", account, "--name", "k", "--json")
    made = await farebox("keys", "create", *options, cwd=folder, **env)
    return str(made.json["api_key"])


def show(title: str, **counts: object) -> None:
    """The counts, for whoever runs this with -s or reads the report."""
    facts = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in counts.items())
    sys.stderr.write(f"\n{title}: {facts}\n")


async def test_postgres_away_costs_nobody_anything(place: Place, is_full: bool) -> None:
    """Ten minutes, scaled to one: warm accounts go on, and every receipt is there afterwards."""
    away_s = 60 if is_full else 4
    async with place.site() as site:
        assert (await site.call("quick", stream=False)).status == 200
        await site.eventually_receipts(1)
        site.book.refuse()
        ends, answers = time.monotonic() + away_s, Counter[int]()

        async def keep_calling(*, stream: bool) -> None:
            while time.monotonic() < ends:
                answer = await site.call("slow" if stream else "quick", stream=stream)
                answers[answer.status] += 1
                # A load that the bound on waiting receipts has room for.
                await asyncio.sleep(PACE_S)

        async with asyncio.TaskGroup() as group:
            for number in range(8):
                group.create_task(keep_calling(stream=number < 4))
        during = (await site.outcomes()).total()
        site.book.heal()
        outcomes = await site.eventually_receipts(answers.total() + 1)
        receipts, took = await site.charged()

    show("postgres away", seconds=away_s, answered=answers[200], receipts=outcomes.total())
    assert answers.keys() == {200}
    assert during == 1
    assert outcomes == {"complete": answers.total() + 1}
    assert receipts == took > 0
    assert await place.audit() == ""


async def test_an_emptied_till_costs_no_stream_anything(
    place: Place, till_url: str, is_full: bool
) -> None:
    count = 100 if is_full else 40
    client = redis.asyncio.from_url(till_url)
    async with place.site() as site:
        streams = site.streams(count)
        await eventually(lambda: open_holds(client, count))
        await client.flushall()
        # Refused, or served once all that was open is back.
        meanwhile = await site.call("quick", stream=False)
        await eventually(lambda: open_holds(client, count))
        answers = await asyncio.gather(*streams)
        again = await site.call("quick", stream=False)
        outcomes = await site.eventually_receipts(count + 1 + (meanwhile.status == 200))
        (row,) = await site.query("SELECT epoch FROM till_epoch")
    await client.aclose()

    whole = sum(answer.frames()[-1] == "[DONE]" for answer in answers)
    show("till emptied", streams=count, whole=whole, receipts=outcomes.total(), epoch=row["epoch"])
    assert whole == count
    assert meanwhile.status in {200, 503}
    assert again.status == 200
    assert outcomes == {"complete": count + 1 + (meanwhile.status == 200)}
    assert row["epoch"] == 2
    assert await place.audit() == ""


async def test_a_killed_worker_leaves_receipts_at_what_was_certain(
    place: Place, till_url: str, is_full: bool
) -> None:
    count = 100 if is_full else 40
    client = redis.asyncio.from_url(till_url)
    async with place.site() as site:
        streams = site.streams(count)
        await eventually(lambda: open_holds(client, count))
        await eventually(lambda: checkpoints(client, count))
        (pid,) = site.server.facts["workers"]
        os.kill(pid, signal.SIGKILL)
        answers = await asyncio.gather(*streams, return_exceptions=True)
        outcomes = await site.eventually_receipts(count)
        rows = await site.query(
            "SELECT price_nanos, output_tokens, hold_nanos FROM charge_receipts"
        )
        again = await eventually(lambda: served(site))
        receipts, took = await site.charged()
    await client.aclose()

    delivered = [words_in(answer) for answer in answers]
    show(
        "worker killed",
        streams=count,
        outcomes=dict(outcomes),
        charged_tokens=sum(row["output_tokens"] for row in rows),
        delivered_words=sum(delivered),
    )
    assert outcomes == {"recovered": count}
    assert again.status == 200
    assert receipts <= took
    assert min(row["price_nanos"] for row in rows) > 0
    # What came since the last checkpoint is the operator's; never more than what came.
    assert max(row["output_tokens"] for row in rows) <= WORDS
    assert sum(row["output_tokens"] for row in rows) <= sum(delivered) + count
    assert await place.audit() == ""


async def open_holds(client: Any, count: int) -> bool | None:
    leases = [await client.zcard(key) async for key in client.scan_iter("fb:*:leases")]
    return sum(leases) == count or None


async def checkpoints(client: Any, count: int) -> bool | None:
    """True when every hold has a checkpoint with output in it."""
    found = [key async for key in client.scan_iter("fb:*:h:*", count=1000)]
    drafts = [await client.hget(key, "draft") or b"" for key in found]
    return len([d for d in drafts if b'"output_tokens"' in d]) == count or None


async def served(site: Site) -> Outcome | None:
    """The first answer of the worker that took the place of the dead one."""
    try:
        answer = await site.call("quick", stream=False)
    except OSError:
        return None
    return answer if answer.status == 200 else None


def words_in(answer: Outcome | BaseException) -> int:
    """Frames with text that the client got before the end."""
    if isinstance(answer, BaseException):
        return 0
    return len(re.findall(rb'"content":"[^"]', answer.body))
