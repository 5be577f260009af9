"""Everything around the gateway for as long as a campaign runs: stores, provider, lines, processes.

The stores are the campaign's own, because it kills them. The gateway's processes reach each of
them through a proxy, so that a line can be broken and a restarted store is found again.
Failure: what a store or process says when it does not come up.
"""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID

import asyncpg
import msgspec
import redis.asyncio

from billing import book
from billing.money import read_credits
from billing.prices_store import sync_config_prices
from billing.tokens import count_tokens
from config.ids import new_id
from config.secret import Secret
from config.settings import Settings
from gateway.embedded.postgres import EmbeddedPostgres
from gateway.embedded.server import EmbeddedServer
from gateway.embedded.valkey import EmbeddedValkey
from gateway.protocols.chat import prompt_text, read_facts
from gateway.rates import config_rates
from gateway.supervisor import READY, encode_settings, listen
from keys.principal import Budget
from keys.store import KeyTerms, create_key
from migrations.runner import migrate
from tests.faults.plan import LEASE_S, MODELS, RENEW_S, Model
from tests.faults.processes import Child, Forge, NotStarted, running_forge
from tests.support.faultproxy import FaultProxy, running_proxy
from tests.support.gateway import PEPPER, make_settings, zoo_model
from tests.support.upstream.launch import Upstream

# What it may lose is decided by processes that are killed, never by a machine that stops.
FAST = {"fsync": "off", "synchronous_commit": "on", "full_page_writes": "off"}
OUTPUT_TOKENS_MAX = 200
# A slow machine must not look like a fault: what is waited for in vain is short, the rest is not.
SETTINGS: dict[str, object] = {
    "till__hold_lease_s": LEASE_S,
    "till__renew_every_s": RENEW_S,
    "till__rebuild_wait_ms": 300,
    "work__every_s": 0.2,
    "work__sweep_grace_s": 0.3,
    "work__takeover_after_s": 0.6,
    "timeouts__upstream_chunk_s": 0.8,
    "timeouts__upstream_first_byte_s": 3.0,
    "timeouts__drain_s": 0.4,
    "timeouts__write_stall_s": 2.0,
    "server__drain_timeout_s": 10,
    # So that streams ask for more, and calls are cut to what can be paid.
    "limits__stream_window_tokens": 48,
    "limits__output_tokens_min": 12,
    # The machine is busy, and that is no fault of a run.
    "limits__loop_lag_max_ms": 2000,
    "log__level": "warning",
}
RUNS_PER_BOOK = 25


class World:
    """What the runs of a campaign share."""

    def __init__(
        self,
        forge: Forge,
        spool: Path,
        postgres: EmbeddedPostgres,
        valkey: EmbeddedValkey,
        upstream: Upstream,
        proxies: tuple[FaultProxy, FaultProxy, FaultProxy],
    ) -> None:
        self.forge = forge
        self.spool = spool
        self.postgres = postgres
        self.valkey = valkey
        self.upstream = upstream
        self.till_line, self.book_line, self.provider_line = proxies
        self.sock = listen("127.0.0.1", 0)
        self.origin = f"http://127.0.0.1:{self.sock.getsockname()[1]}"
        self.worker: Child | None = None
        self.second: Child | None = None
        self.work: Child | None = None
        self.prompt_tokens = 0
        self._books = 0
        self._runs = 0
        self._database = ""

    @property
    def book_url(self) -> str:
        """The way of the campaign itself, which no fault is on."""
        return urlunsplit(urlsplit(self.postgres.url)._replace(path=f"/{self._database}"))

    @property
    def till_url(self) -> str:
        return self.valkey.url

    def settings(self) -> Settings:
        """The gateway's, whose ways lead through the proxies."""
        provider = _through(self.upstream.base_url, self.provider_line)
        more: dict[str, object] = {**SETTINGS, "book__spool_dir": str(self.spool)}
        mine = make_settings(provider, _models(self.prompt_tokens), **more)
        book_url = Secret(_through(self.book_url, self.book_line))
        till_url = Secret(_through(self.till_url, self.till_line))
        return msgspec.structs.replace(
            mine,
            book=msgspec.structs.replace(mine.book, url=book_url),
            till=msgspec.structs.replace(mine.till, url=till_url),
        )

    async def begin_run(self, prompt: str) -> None:
        """Whole lines, a provider that remembers nothing, from time to time an empty book."""
        for line in (self.till_line, self.book_line, self.provider_line):
            line.heal()
        if not self.prompt_tokens:
            self.prompt_tokens = _count_prompt(prompt)
        assert _count_prompt(prompt) == self.prompt_tokens
        if self._runs % RUNS_PER_BOOK == 0:
            await self._new_book()
        self._runs += 1
        await asyncio.to_thread(self.upstream.record)

    def start_worker(self, crash_at: str = "") -> Child:
        """It serves soon; connections wait for it."""
        self.worker = self._launch_worker(crash_at)
        return self.worker

    def start_second(self) -> Child:
        """Another worker on the same port, which no fault is meant for."""
        self.second = self._launch_worker("")
        return self.second

    def _launch_worker(self, crash_at: str) -> Child:
        return self.forge.launch(
            "worker",
            stdin=encode_settings(self.settings()),
            kept=[self.sock.fileno()],
            crash_at=crash_at,
        )

    async def start_work(self, crash_at: str = "") -> Child:
        """The process that ends what others left: `farebox work`."""
        self.work = self.forge.launch(
            "work", stdin=encode_settings(self.settings()), crash_at=crash_at
        )
        await self.work.said(READY)
        return self.work

    async def serves(self, timeout_s: float) -> None:
        """Wait until the worker serves, or met its crash point before that."""
        assert self.worker is not None
        try:
            await self.worker.said(READY, timeout_s)
        except NotStarted:
            if self.worker.status != -signal.SIGKILL:
                raise

    async def reset(self) -> None:
        """After a run that did not come to its end: nothing of it goes on."""
        for child in (self.worker, self.second, self.work):
            if child is not None:
                child.kill()
                await child.stop()
        self.worker = self.second = self.work = None

    async def stop(self) -> None:
        for child in (self.worker, self.second, self.work):
            if child is not None:
                await child.stop()
        self.sock.close()

    @asynccontextmanager
    async def book(self) -> AsyncIterator[asyncpg.Connection]:
        conn = await book.connect(self.book_url)
        try:
            yield conn
        finally:
            await conn.close()

    @asynccontextmanager
    async def till(self) -> AsyncIterator["redis.asyncio.Redis"]:
        client = redis.asyncio.from_url(self.till_url)
        try:
            yield client
        finally:
            await client.aclose()

    async def account(self, credits: int, *, has_budget: bool) -> tuple[UUID, str]:
        """A new account, and a key of it that may spend that many credits: all that the account
        has, or its budget, and then the account has more."""
        async with self.book() as conn:
            account_id = await book.create_account(conn, "campaign")
            nanos = read_credits(str(credits))
            granted = 2 * nanos if has_budget else nanos
            await book.grant(conn, account_id, granted, f"g_{new_id()}", "campaign")
            budget = Budget(nanos=nanos, window="total") if has_budget else None
            terms = KeyTerms(name="campaign", kind="test", budget=budget)
            _, key = await create_key(conn, account_id, terms, pepper=PEPPER.encode())
        return account_id, key.secret

    async def restart(
        self, server: EmbeddedServer, line: FaultProxy, between: Callable[[], None] | None = None
    ) -> None:
        """Kill a store as a power cut would, but for what its kernel has; start it again."""
        os.kill(server.pid, signal.SIGKILL)
        await server.stop()
        line.cut()
        if between is not None:
            between()
        await server.start()
        line.lead_to(server.url)

    async def _new_book(self) -> None:
        """A book whose audit stays quick, and the till that belongs to it: empty."""
        if self.work is not None:
            await self.work.stop()
            self.work = None
        self._books += 1
        self._database = f"campaign_{self._books}"
        admin = await asyncpg.connect(self.postgres.url)
        await admin.execute(f"CREATE DATABASE {self._database}")
        await admin.close()
        await migrate(self.book_url)
        async with self.till() as till:
            await till.flushall()
        async with self.book() as conn:
            await sync_config_prices(conn, config_rates(self.settings()))


def _models(prompt_tokens: int) -> dict[str, dict[str, object]]:
    def mode(model: Model) -> str:
        comma = "," if ":" in model.mode else ":"
        return f"{model.mode}{comma}prompt={prompt_tokens}"

    def routes(model: Model) -> list[dict[str, str]]:
        names = [model.fails_first, mode(model)] if model.fails_first else [mode(model)]
        return [{"provider": "zoo", "model": name} for name in names]

    return {
        model.name: zoo_model("", routes=routes(model), output_tokens_max=OUTPUT_TOKENS_MAX)
        for model in MODELS.values()
    }


def _count_prompt(prompt: str) -> int:
    """As the gateway counts it when the provider reports nothing: both must agree."""
    body = {"model": "quick", "messages": messages(prompt)}
    return count_tokens(prompt_text(read_facts(msgspec.json.encode(body))))


def messages(prompt: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": prompt}]


def _through(url: str, proxy: FaultProxy) -> str:
    parts = urlsplit(url)
    userinfo = parts.netloc.rpartition("@")[0]
    place = f"127.0.0.1:{proxy.port}"
    return urlunsplit(parts._replace(netloc=f"{userinfo}@{place}" if userinfo else place))


@asynccontextmanager
async def running_world(folder: Path, upstream: Upstream) -> AsyncIterator[World]:
    """Enter it on the main thread: the stores live as long as the thread that started them."""
    async with AsyncExitStack() as stack:
        forge = stack.enter_context(running_forge(folder / "processes"))
        postgres = EmbeddedPostgres(folder / "postgres", settings=FAST)
        valkey = EmbeddedValkey(folder / "valkey")
        for server in (postgres, valkey):
            stack.push_async_callback(server.stop)
            await server.start()
        urls = (valkey.url, postgres.url, upstream.base_url)
        proxies = [(await stack.enter_async_context(running_proxy(url)))[0] for url in urls]
        lines = (proxies[0], proxies[1], proxies[2])
        world = World(forge, folder / "spool", postgres, valkey, upstream, lines)
        stack.push_async_callback(world.stop)
        yield world
