"""`farebox work`: what has to be done besides serving, by one process at a time.

It ends the holds of dead workers, posts receipts that nobody posted, looks whether ledger and till
agree, and ends intents to pay that expired. Several may run; the one that holds an advisory lock
works, the others stand by. It never serves a request.
Failure: a round that fails is logged and done again; while a store is away nothing is lost.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from billing import book
from billing.errors import BillingError
from billing.figures import Figures, publish, till_now_ms
from billing.fleet import PoolBook, forget_workers, is_leader
from billing.idempotency import purge_idempotent_requests
from billing.payment_attempts import GRACE, expire_attempts
from billing.roles import worker_url
from billing.spool_replay import replay_spool
from billing.sweep import Sweeper
from billing.till import Scripts, Till
from billing.till_link import TillLink
from config.clock import Seconds
from config.settings import Settings
from gateway.supervise import Tasks

log = logging.getLogger("gateway.work")

# Nobody waits for it, so it is patient.
TILL_CALL_S, TILL_STALL_S = 2.0, 5.0
CALLS_PENDING_MAX = 10_000
POOL_SIZE = 2
MINUTE_S, HOUR_S = 60.0, 3600.0
ATTEMPTS_AT_ONCE = 500
# So many looks may fail before their last figures are not shown any more.
FIGURES_LAST_LOOKS = 5


class Job(msgspec.Struct):
    """Something to do again and again; due at once."""

    name: str
    every_s: Seconds
    run: Callable[[], Awaitable[Counter[str] | None]]
    due_at: Seconds = 0


async def run_work(settings: Settings) -> None:
    """Stand by until nobody else works, then work, for ever."""
    said = ""
    while True:
        try:
            await _lead(settings)
            said = ""
        except BillingError as exc:
            error = f"{type(exc).__name__}: {exc.__cause__ or exc}"
            if error != said:
                log.warning("work.failed", extra={"error": error})
            said = error
        except Exception:
            log.exception("work.crashed")
        await asyncio.sleep(settings.work.every_s)


async def _lead(settings: Settings) -> None:
    """Work as long as we hold the lock; return when somebody else does."""
    conn = await book.connect(worker_url(settings.book))
    try:
        if not await is_leader(conn):
            return
        log.info("work.began")
        async with _jobs(settings) as jobs:
            while await is_leader(conn):  # asked again: the connection may have been lost
                for job in jobs:
                    await _do(job)
                await asyncio.sleep(min(job.every_s for job in jobs))
    finally:
        conn.terminate()


async def _do(job: Job) -> None:
    now = asyncio.get_running_loop().time()
    if now < job.due_at:
        return
    job.due_at = now + job.every_s
    try:
        done = await job.run()
    except BillingError:
        raise
    except Exception:
        # The others go on, with what they remember: how long a sweeper watched a lease, above all.
        log.exception("work.crashed", extra={"job": job.name})
        return
    if done:
        log.info("work.done", extra={"job": job.name, **done})


@asynccontextmanager
async def _jobs(settings: Settings) -> AsyncIterator[list[Job]]:
    """Everything there is to do, with the connections that it needs."""
    work, limits = settings.work, settings.book
    pool = await book.open_pool(
        worker_url(limits), POOL_SIZE, limits.connect_timeout_s, limits.statement_timeout_ms
    )
    scripts = Scripts()
    link = TillLink(
        settings.till.url.reveal(),
        scripts.all(),
        call_timeout_s=TILL_CALL_S,
        stall_timeout_s=TILL_STALL_S,
        pending_max=CALLS_PENDING_MAX,
    )
    link.start()
    await link.wait_up(TILL_CALL_S)
    till = Till(link, scripts, PoolBook(pool, ""), worker="", lease_ms=0)
    sweeper = Sweeper(pool, till, grace_s=work.sweep_grace_s, takeover_s=work.takeover_after_s)
    looks = Looks(pool, settings, link)

    async def sweep() -> Counter[str]:
        done = await sweeper.sweep()
        looks.swept.update(done)
        return done

    async def replay() -> Counter[str] | None:
        if not limits.spool_dir:
            return None
        done = await replay_spool(Path(limits.spool_dir), sweeper.post)
        return +Counter(msgspec.structs.asdict(done))

    async def forget() -> Counter[str]:
        async with book.acquire(pool) as conn:
            await forget_workers(conn)
            return +Counter(idempotency_keys=await purge_idempotent_requests(conn))

    async def expire() -> Counter[str]:
        async with book.acquire(pool) as conn:
            return +Counter(attempts=await expire_attempts(conn, GRACE, ATTEMPTS_AT_ONCE))

    try:
        yield [
            # Before the sweep: what a dead worker knew is better than what a sweeper guesses.
            Job("spool.replay", work.every_s, replay),
            Job("sweep", work.every_s, sweep),
            Job("audit", work.audit_every_s, looks.look),
            Job("forget", HOUR_S, forget),
            Job("payments.expire", MINUTE_S, expire),
        ]
    finally:
        await link.close()
        pool.terminate()


class Looks:
    """Looks whether the money adds up, and publishes what the metrics show of it."""

    def __init__(self, pool: book.Pool, settings: Settings, link: TillLink) -> None:
        from billing.drift import DriftWatch

        self._watch = DriftWatch(pool, settings.till.url.reveal())
        self._link = link
        self._lasts_ms = int(settings.work.audit_every_s * 1000) * FIGURES_LAST_LOOKS
        self.swept: Counter[str] = Counter()

    async def look(self) -> None:
        """One look; a store that is away must not keep the sweeper from its work."""
        try:
            seen = await self._watch.look()
            figures = Figures(
                drift_nanos=seen.drift_nanos,
                held_nanos=seen.held_nanos,
                liabilities_nanos=seen.liabilities_nanos,
                holds=seen.holds,
                oldest_hold_s=seen.hold_age_s,
                outbox=seen.entries,
                oldest_outbox_s=seen.entry_age_s,
                recovered=self.swept["recovered"],
                voided=self.swept["voided"],
                at_ms=await till_now_ms(self._link),
            )
            await publish(self._link, figures, self._lasts_ms)
        except (BillingError, TimeoutError) as exc:
            log.warning("work.look_failed", extra={"error": repr(exc)})


@asynccontextmanager
async def working(settings: Settings) -> AsyncIterator[None]:
    """Work in the background of this process while the context is open."""
    tasks = Tasks()
    tasks.start(run_work(settings), "work")
    try:
        yield
    finally:
        await tasks.close()
