"""Everything a worker needs, built once and closed once."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

from billing import book
from billing.errors import BillingError
from billing.fleet import PoolBook
from billing.history import has_receipt
from billing.prices import PriceBook
from billing.prices_store import load_prices
from billing.roles import request_url, worker_url
from billing.settler import Settler
from billing.sweep import Sweeper
from billing.till import Scripts, Till
from billing.till_link import TillLink
from billing.till_rates import Limiter
from billing.tokens import TokenCounter
from config.ids import id_text, new_id
from config.settings import Book, Settings
from gateway.catalog import Catalog, build_catalog
from gateway.client_address import read_networks
from gateway.holds import HoldKeeper
from gateway.metrics import Metrics, watch_loop
from gateway.operators import Operators
from gateway.providers.http import HttpClient
from gateway.relay.aside import Aside
from gateway.relay.authenticate import Authenticator
from gateway.relay.http_in import Bodies
from gateway.relay.once import Claims
from gateway.relay.watchdog import Watchdogs
from gateway.shedding import Shedding
from gateway.sign_in import SignIn
from gateway.spooling import make_spool, replay_orphans, unposted
from gateway.supervise import Tasks

if TYPE_CHECKING:
    from gateway.relay.reply import Reply

log = logging.getLogger("gateway.services")

FIRST_TILL_WAIT_S, FIRST_TILL_AGAIN_S = 5.0, 0.05
# For receipts on their way when somebody is in a hurry; the till's outbox keeps the rest.
HURRIED_SETTLE_S = 3.0


class Services:
    """The parts of a worker, and the few numbers they share.

    `pool` sees all accounts; what acts for one of them uses as_tenant().
    """

    def __init__(
        self, settings: Settings, pool: book.Pool, request_pool: book.Pool, metrics: Metrics
    ) -> None:
        self.settings = settings
        self.pool = pool
        self.request_pool = request_pool
        self.metrics = metrics
        self.tasks = Tasks()
        self.counter = TokenCounter()
        self.client = HttpClient(settings.timeouts.upstream_connect_s)
        self.catalog: Catalog = build_catalog(settings, self.client)
        self.prices = PriceBook([])
        self.shedding = Shedding(settings, metrics, self.tasks)
        scripts = Scripts()
        self.link = TillLink(
            settings.till.url.reveal(),
            scripts.all(),
            call_timeout_s=settings.till.call_timeout_ms / 1000,
            stall_timeout_s=settings.till.stall_timeout_ms / 1000,
            pending_max=settings.till.calls_pending_max,
        )
        self.proxies = read_networks(settings.server.trusted_proxies)
        self.limiter = Limiter(self.link, scripts.rate)
        self.sign_in = SignIn(settings, pool, self.link, self.tasks)
        self.operators = Operators(settings.keys, pool)
        worker = worker_name()
        self.till = Till(
            self.link,
            scripts,
            PoolBook(pool, worker),
            worker=worker,
            lease_ms=settings.till.hold_lease_s * 1000,
            rebuild_ms=settings.till.rebuild_wait_ms,
        )
        self.authenticator = Authenticator(
            settings, pool, self.tasks, self.sign_in.sessions, self.till.seed_budget
        )
        self.settler = Settler(
            pool,
            self.till,
            batch_max=settings.book.commit_batch_max,
            pending_max=settings.book.receipts_pending_max,
            on_result=metrics.count_settlements,
            gather_s=settings.book.commit_gather_ms / 1000,
        )
        self.claims = Claims(pool, self.till, self.tasks, settings.timeouts.request_total_s)
        self.spool = make_spool(settings, worker, self.settler, metrics)
        self.is_draining = False
        self.dogs = Watchdogs()
        self.bodies = Bodies(settings.limits.bodies_bytes_max)
        self.aside = Aside()
        self.replies: set[Reply] = set()
        self.drains = 0
        self.holds = HoldKeeper(self)

    @property
    def open_calls(self) -> int:
        """Requests under way."""
        return len(self.replies)

    def as_tenant(
        self, account_id: UUID
    ) -> contextlib.AbstractAsyncContextManager[book.Connection]:
        """A transaction that can reach the rows of this account only. Raises BookUnavailable."""
        return book.as_tenant(self.request_pool, account_id)

    async def is_in_book(self, request_uid: UUID) -> bool:
        """Whether a request has its receipt. Raises BookUnavailable."""
        async with book.acquire(self.pool) as conn:
            return await has_receipt(conn, request_uid)

    async def refresh_prices(self) -> None:
        """Read the price book once. Raises BookUnavailable."""
        async with book.acquire(self.pool) as conn:
            self.prices = await load_prices(conn)

    async def keep_prices(self) -> None:
        """Read the price book again and again; an unreachable book leaves the last one in use."""
        while True:
            await asyncio.sleep(self.settings.billing.prices_refresh_s)
            try:
                await self.refresh_prices()
            except BillingError as exc:
                log.warning("prices.refresh_failed", extra={"error": str(exc)})

    async def wait_for_till(self) -> None:
        """Until holds can be placed, but not for long: refusing is better than silence."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_TILL_WAIT_S):
                while True:
                    with contextlib.suppress(BillingError):
                        await self.link.wait_up(FIRST_TILL_WAIT_S)
                        await self.till.learn_epoch()
                        return
                    await asyncio.sleep(FIRST_TILL_AGAIN_S)

    def sample(self, lag_s: float) -> None:
        """Gauges that are read from state, and whether that state allows more."""
        oldest_s = self.settler.oldest_age_s()
        self.shedding.look(lag_s, oldest_s)
        self.metrics.inflight.set(self.open_calls)
        self.metrics.settlements_pending.set(self.settler.pending)
        self.metrics.settlement_oldest.set(oldest_s)
        if self.spool is not None:
            self.metrics.spool_uncommitted.set(self.spool.uncommitted)


def worker_name() -> str:
    """A name for this worker that no other has, now or later."""
    return f"w_{id_text(new_id())}"


@contextlib.asynccontextmanager
async def open_services(
    settings: Settings, metrics: Metrics, hurry: asyncio.Event | None = None
) -> AsyncIterator[Services]:
    """Build, start, and at the end settle everything that is still open; less patiently in a hurry.

    Raises BookUnavailable when Postgres cannot be reached at start.
    """
    limits = settings.book
    pool, request_pool = await _open_pools(limits)
    services = Services(settings, pool, request_pool, metrics)
    try:
        await services.refresh_prices()
        services.link.start()
        commits = services.tasks.start(services.settler.run_commits(), "settler.commits")
        confirms = services.tasks.start(services.settler.run_confirms(), "settler.confirms")
        services.tasks.start(services.keep_prices(), "prices.keep")
        services.tasks.start(services.holds.run_alive(), "holds.alive")
        services.tasks.start(services.holds.run_renewals(), "holds.renew")
        if services.spool is not None:
            post = Sweeper(pool, services.till, grace_s=0, takeover_s=0).post
            orphans = replay_orphans(Path(limits.spool_dir), post, metrics)
            services.tasks.start(orphans, "spool.replay")
            services.tasks.start(services.spool.run(), "spool.run")
        services.tasks.start(watch_loop(metrics, services.sample), "loop.watch")
        await services.wait_for_till()
        yield services
        services.settler.stop()
        settled = services.tasks.start(_all_ended(commits, confirms), "settler.end")
        hurrying = services.tasks.start((hurry or asyncio.Event()).wait(), "settler.hurry")
        await asyncio.wait(
            [settled, hurrying],
            timeout=settings.server.drain_timeout_s,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if hurrying.done():
            await asyncio.wait([settled], timeout=HURRIED_SETTLE_S)
        if services.settler.pending:
            facts = await unposted(services.settler, services.spool)
            log.error("receipts.unposted", extra=facts)
        else:
            await services.holds.say_gone()
    finally:
        await services.tasks.close()
        if services.spool is not None:
            services.spool.close()
        await services.client.close()
        await services.link.close()
        pool.terminate()
        request_pool.terminate()


async def _open_pools(limits: Book) -> tuple[book.Pool, book.Pool]:
    """The worker's pool and that of requests that act for one tenant. Raises BookUnavailable."""
    timeouts = (limits.connect_timeout_s, limits.statement_timeout_ms)
    pool = await book.open_pool(worker_url(limits), limits.pool_size_max, *timeouts)
    try:
        request_size = limits.request_pool_size_max
        return pool, await book.open_pool(request_url(limits), request_size, *timeouts)
    except BaseException:
        pool.terminate()
        raise


async def _all_ended(*tasks: asyncio.Task[None]) -> None:
    await asyncio.wait(tasks)
