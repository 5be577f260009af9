"""Both stores gone, then the worker killed: the next one charges what clients got, once."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from tests.support.farebox import PEPPER, Running, farebox, is_gone, running_serve
from tests.support.faultproxy import FaultProxy, running_proxy
from tests.support.gateway import eventually
from tests.support.rawclient import Outcome, RawRequest, chat, exchange

STREAMS = 10
WORDS = 30
CONFIG = """
[server]
drain_timeout_s = 2
[keys]
mode = "test"
[metrics]
open = true
[limits]
loop_lag_max_ms = 10000
[book]
connect_timeout_s = 1
statement_timeout_ms = 1000
[providers.slow]
kind = "echo"
chunk_delay_ms = 40
[models.slow]
routes = [{ provider = "slow" }]
price = { input_usd_per_mtok = "1", output_usd_per_mtok = "4" }
output_tokens_max = 200
"""


@asynccontextmanager
async def running(folder: Path, **env: str) -> AsyncIterator[Running]:
    """A server whose stores are reached through this loop, which its start must not block."""
    opened = running_serve(folder, "--config", "own.toml", "--data-dir", "data", **env)
    server = await asyncio.to_thread(opened.__enter__)
    try:
        yield server
    finally:
        await asyncio.to_thread(opened.__exit__, None, None, None)


async def paying_key(folder: Path, env: dict[str, str]) -> str:
    made = await farebox("accounts", "create", "--json", cwd=folder, **env)
    account = made.json["billing_account_id"]
    await farebox("credits", "grant", account, "1000", cwd=folder, **env)
    options = ("--account", account, "--name", "k", "--json")
    key = await farebox("keys", "create", *options, cwd=folder, **env)
    return str(key.json["api_key"])


async def metric(server: Running, name: str) -> float:
    answer = await exchange(server.origin, RawRequest(method="GET", target="/metrics"), deadline=20)
    lines = [line for line in answer.body.decode().splitlines() if line.startswith(name)]
    return sum(float(line.split()[-1]) for line in lines)


async def streams(server: Running, key: str, stores: list[FaultProxy]) -> list[Outcome]:
    """Live streams whose stores go away in the middle, each to its end."""
    content = "word " * WORDS
    payload: dict[str, Any] = {"model": "slow", "stream": True}
    request = chat(key, {**payload, "messages": [{"role": "user", "content": content}]})
    calls = [
        asyncio.ensure_future(exchange(server.base_url, request, deadline=60))
        for _ in range(STREAMS)
    ]

    async def all_open() -> bool | None:
        return await metric(server, "farebox_inflight_requests") == STREAMS or None

    await eventually(all_open)
    for store in stores:
        store.refuse()
    return await asyncio.gather(*calls)


async def test_a_worker_killed_without_its_stores_leaves_its_receipts_to_the_next(
    tmp_path: Path, book_url: str, till_url: str
) -> None:
    (tmp_path / "own.toml").write_text(CONFIG)
    direct = {
        "FAREBOX_DATABASE_URL": book_url,
        "FAREBOX_BOOK__ROLES": "shared",
        "FAREBOX_TILL_URL": till_url,
        "FAREBOX_KEYS__PEPPER": PEPPER,
        "FAREBOX_CONFIG": "own.toml",
    }
    key = await paying_key(tmp_path, direct)
    spool = tmp_path / "data" / "spool"
    async with AsyncExitStack() as stack:
        book, book_at = await stack.enter_async_context(running_proxy(book_url))
        till, till_at = await stack.enter_async_context(running_proxy(till_url))
        behind = {**direct, "FAREBOX_DATABASE_URL": book_at, "FAREBOX_TILL_URL": till_at}
        server = await stack.enter_async_context(running(tmp_path, **behind))
        answers = await streams(server, key, [book, till])
        (file,) = spool.glob("*.spool")
        lines = file.read_bytes().count(b"\n")
        (worker,) = server.facts["workers"]
        os.kill(worker, signal.SIGKILL)

        async def gone() -> bool | None:
            return is_gone(worker) or None

        await eventually(gone)
        before = await farebox("receipts", "list", "--json", cwd=tmp_path, **direct)
        book.heal()
        till.heal()

        async def replayed() -> list[Any] | None:
            listed = await farebox("receipts", "list", "--json", cwd=tmp_path, **direct)
            return listed.json if len(listed.json) >= STREAMS else None

        receipts = await eventually(replayed, 60)
        again = await eventually(lambda: served(server, key), 60)
        counted = await metric(server, 'farebox_spool_receipts_total{result="replayed"}')
    audit = await farebox("audit", cwd=tmp_path, **direct)

    assert [answer.frames()[-1] for answer in answers] == ["[DONE]"] * STREAMS
    assert (lines, before.json, counted) == (STREAMS, [], STREAMS)
    told = {answer.head.get("x-receipt-id") for answer in answers if answer.head is not None}
    assert {receipt["request_id"] for receipt in receipts} == told
    assert {receipt["outcome"] for receipt in receipts} == {"complete"}
    assert len({receipt["price_nanos"] for receipt in receipts}) == 1
    assert again.status == 200
    assert list(spool.iterdir()) == []
    # Each is charged once: the audit counts a ledger row for each priced receipt.
    assert (audit.status, audit.out.splitlines()[-1]) == (0, "clean"), audit.out


async def served(server: Running, key: str) -> Outcome | None:
    payload = {"model": "slow", "messages": [{"role": "user", "content": "hi"}]}
    answer = await exchange(server.base_url, chat(key, payload), deadline=30)
    return answer if answer.status == 200 else None
