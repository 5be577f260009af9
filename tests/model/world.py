"""One small world: three accounts, two workers, two sweepers, a till, a book, and their fates.

Stores and connections are those of the `Stage`, which outlives many worlds.
"""

import asyncio
import time
from collections import Counter
from typing import Any
from uuid import UUID

import msgspec

from billing.book import (
    INSERT_ACCOUNT,
    INSERT_DEFAULT_KEY,
    INSERT_USER,
    Pool,
    acquire,
    grant,
)
from billing.errors import BookUnavailable, TillUnavailable
from billing.fleet import PoolBook, say_alive, say_gone
from billing.prices import Rates
from billing.prices_store import sync_config_prices
from billing.sweep import Sweeper
from billing.till import Scripts, Till
from billing.till_epoch import AccountState
from billing.till_scopes import shard_prefix
from config.ids import new_id
from tests.model.people import Purse, Request, Worker, new_request
from tests.model.seen import PASS_TIME, Look, look, put_back
from tests.model.wire import Network, WireLink

RATES = Rates(
    input_rate=10**9,
    output_rate=10**9,
    cached_input_rate=10**9,
    cache_write_rate=10**9,
    reasoning_rate=10**9,
)
CREDIT = 100_000
# Of the first account's first key, and of the third account's.
BUDGETS = {0: 250_000, 2: 150_000}
GRACE_S = 15
SHARDS_USED = ("fb:{s11}:", "fb:{s11}:", "fb:{s22}:")
# So many moments of the till are remembered, to go back to.
PAST_MAX = 12

INSERT_KEY = "INSERT INTO virtual_keys (id, billing_account_id) VALUES ($1, $2)"
NEW_BOOK = "UPDATE till_epoch SET epoch = 1, server_run_id = ''"
BOOK_TIME = "UPDATE till_epoch SET changed_at = changed_at - interval '1 hour'"
NO_WORKERS = "DELETE FROM workers"
NOT_HEARD_OF = "UPDATE workers SET seen_at = seen_at - interval '1 hour' WHERE name = $1"
SELECT_EPOCH = "SELECT epoch FROM till_epoch"
SELECT_OPENED = "SELECT epoch FROM till_epoch WHERE server_run_id <> ''"
SELECT_ACCOUNTS = """
SELECT id, balance_nanos, version
FROM billing_accounts
WHERE id = ANY($1::uuid[])
"""
SELECT_RECEIPTS = """
SELECT request_id, price_nanos, usage_source, hold_nanos
FROM charge_receipts
WHERE billing_account_id = ANY($1::uuid[])
"""
SELECT_LEDGER = """
SELECT
    billing_account_id, seq, amount_nanos, balance_after_nanos, reason, reference, virtual_key_id
FROM credit_ledger
WHERE billing_account_id = ANY($1::uuid[])
ORDER BY billing_account_id, seq
"""
SELECT_SPENT = """
SELECT virtual_key_id, spent_nanos, version
FROM scope_spend
WHERE virtual_key_id = ANY($1::uuid[])
"""


class Stage:
    """What outlives many worlds: the stores and the connections to them."""

    def __init__(self, pool: Pool, till_url: str, scripts: Scripts) -> None:
        self.pool = pool
        self.network = Network()
        self.scripts = scripts
        self.links = [WireLink(till_url, self.network, self.scripts.all()) for _ in range(4)]
        self.price_version = 0
        # Worlds are numbered from now on, so that stages may share a database.
        self.worlds = time.time_ns() // 1_000_000

    async def open(self) -> None:
        for link in self.links:
            link.start()
            assert await link.wait_up(5), link.last_error
        async with acquire(self.pool) as conn:
            await sync_config_prices(conn, {"m": RATES})
            self.price_version = await conn.fetchval("SELECT max(price_version) FROM model_prices")

    async def close(self) -> None:
        for link in self.links:
            await link.close()


class Ledger(msgspec.Struct):
    """The book as it stands: what is compared with the till."""

    epoch: int
    balances: dict[UUID, tuple[int, int]]
    """Balance and version of each account."""
    receipts: dict[UUID, tuple[int, str, int]]
    """Price, usage source and hold of each receipt."""
    rows: list[Any]
    spent: dict[UUID, tuple[int, int]]
    """What each key spent, all on one day, and the version of that."""

    def adjustment(self, uid: UUID) -> tuple[int, int] | None:
        """Version and amount of a request's adjustment."""
        for row in self.rows:
            if row["reason"] == "adjust" and row["reference"] == str(uid):
                return row["seq"], row["amount_nanos"]
        return None

    def spent_at(self, key_id: UUID, version: int) -> int:
        """What a key had spent at that version."""
        amounts = [row["amount_nanos"] for row in self.rows if row["virtual_key_id"] == key_id]
        return -sum(amounts[:version])

    def posted_at(self, account_id: UUID, version: int) -> int | None:
        """The balance of an account at that version."""
        for row in self.rows:
            if row["billing_account_id"] == account_id and row["seq"] == version:
                return int(row["balance_after_nanos"])
        return None


class World:
    """Everything of one run. `counts` says what happened."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.pool = stage.pool
        self.network = stage.network
        stage.worlds += 1
        self._number, self._ids = stage.worlds, 0
        self.counts: Counter[str] = Counter()
        self.purses: list[Purse] = []
        self.requests: dict[str, Request] = {}
        self.workers: list[Worker] = []
        self.sweepers: list[Sweeper] = []
        self.rounds: list[asyncio.Task[Counter[str]] | None] = [None, None]
        self.past: list[Look] = []
        self.lost_epoch = 0
        """The till lost something while the book was in this epoch; 0: never."""
        self.excused: set[str] = set()
        """Requests that the till may have lost and that their workers did not place again yet."""
        self.guessed: set[str] = set()
        """Requests for which a sweeper put something in, before this step."""
        self.at_risk: dict[str, int] = {}
        """Per scope, what was open whenever the till lost something."""
        self.has_waited = True
        """Whether workers had their time to place their holds again in the last epoch."""

    async def begin(self) -> None:
        self.network.clear()
        await self.network.links[0].command(("FLUSHALL",))
        async with acquire(self.pool) as conn:
            await conn.execute(NEW_BOOK)
            await conn.execute(NO_WORKERS)
        self.purses = await self._make_accounts()
        for slot in (0, 1):
            await self.start_worker(slot)
            self.sweepers.append(self._make_sweeper(slot))

    async def _make_accounts(self) -> list[Purse]:
        """Two accounts of one shard, the first with two keys, and one of another shard."""
        first, second, third = (self._id_in(shard) for shard in SHARDS_USED)
        purses: list[Purse] = []
        async with acquire(self.pool) as conn, conn.transaction():
            for account_id in (first, second, third):
                user_id, key_id = new_id(), new_id()
                await conn.execute(INSERT_USER, user_id, "test")
                await conn.execute(INSERT_ACCOUNT, account_id, user_id, None)
                await conn.execute(INSERT_DEFAULT_KEY, key_id, account_id)
                await grant(conn, account_id, CREDIT, f"g_{new_id()}", "")
                purses.append(Purse(account_id, key_id, BUDGETS.get(len(purses))))
            key_id = new_id()
            await conn.execute(INSERT_KEY, key_id, first)
        return [*purses, Purse(first, key_id)]

    def next_id(self) -> UUID:
        """A UUIDv7. Ids of two runs of one machine sort alike, so that both go alike."""
        self._ids += 1
        return UUID(int=self._number << 80 | 7 << 76 | 0b10 << 62 | self._ids)

    def _id_in(self, shard: str) -> UUID:
        while shard_prefix(uid := self.next_id()) != shard:
            pass
        return uid

    async def start_worker(self, slot: int) -> None:
        """A new worker in the place of a dead one, on the same connection."""
        name = f"w_{new_id()}"
        worker = Worker(name, self.stage.links[slot], self.stage.scripts, self.pool)
        async with acquire(self.pool) as conn:
            await say_alive(conn, name)
        self.workers[slot : slot + 1] = [worker]

    def _make_sweeper(self, slot: int) -> Sweeper:
        link = self.stage.links[2 + slot]
        till = Till(link, self.stage.scripts, PoolBook(self.pool, ""), worker="", lease_ms=0)
        return Sweeper(self.pool, till, grace_s=GRACE_S, takeover_s=0)

    @property
    def account_ids(self) -> list[UUID]:
        return [purse.account_id for purse in self.purses[:3]]

    def new_request(self, worker: Worker, purse: Purse, hold: int) -> Request:
        request = new_request(self.next_id(), purse, hold, self.stage.price_version)
        self.requests[request.id] = request
        return request

    async def ledger(self) -> Ledger:
        ids = self.account_ids
        async with acquire(self.pool) as conn:
            return Ledger(
                epoch=await conn.fetchval(SELECT_EPOCH),
                balances={
                    row["id"]: (row["balance_nanos"], row["version"])
                    for row in await conn.fetch(SELECT_ACCOUNTS, ids)
                },
                receipts={
                    row["request_id"]: (
                        row["price_nanos"],
                        row["usage_source"],
                        row["hold_nanos"],
                    )
                    for row in await conn.fetch(SELECT_RECEIPTS, ids)
                },
                rows=await conn.fetch(SELECT_LEDGER, ids),
                spent={
                    row["virtual_key_id"]: (row["spent_nanos"], row["version"])
                    for row in await conn.fetch(SELECT_SPENT, [p.key_id for p in self.purses])
                },
            )

    async def look(self) -> Look:
        return await look(self.stage.links[0])

    async def leave(self) -> None:
        """Stop whatever is still under way."""
        self.network.clear()
        for task in self.rounds:
            if task is not None:
                task.cancel()
                await asyncio.wait([task])

    # What befalls them.

    async def flush(self) -> None:
        """The till is emptied; its server and the connections stay."""
        await self._begin_loss()
        self.network.drop_closes()
        await self.stage.links[0].command(("FLUSHALL",))

    async def restart(self, steps: int) -> None:
        """The till's server starts again without what happened in the last steps."""
        await self._begin_loss()
        at = max(len(self.past) - 1 - steps, 0)
        back = self.past[at]
        del self.past[at + 1 :]
        self.network.restart()
        await put_back(self.stage.links[0], back)

    async def _begin_loss(self) -> None:
        async with acquire(self.pool) as conn:
            self.lost_epoch = await conn.fetchval(SELECT_OPENED) or 0
        self.has_waited = False
        self.excused = set(self.requests)
        posted = (await self.ledger()).receipts
        for request in self.requests.values():
            if request.uid not in posted:
                for key in request.purse.money_keys:
                    self.at_risk[key] = self.at_risk.get(key, 0) + request.liability

    async def kill(self, slot: int) -> None:
        """A worker dies with all it knew; another one starts in its place."""
        worker = self.workers[slot]
        unposted = {receipt.source_reference for receipt in worker.unposted}
        for name in {*worker.requests, *unposted}:
            self.requests[name].is_lost = True
        async with acquire(self.pool) as conn:
            await say_gone(conn, worker.name)
        await self.start_worker(slot)

    async def pause(self, slot: int) -> None:
        """A worker stands still for so long that it is taken for dead."""
        self.workers[slot].is_paused = True
        async with acquire(self.pool) as conn:
            await conn.execute(NOT_HEARD_OF, self.workers[slot].name)

    async def wake(self, slot: int) -> None:
        self.workers[slot].is_paused = False
        async with acquire(self.pool) as conn:
            await say_alive(conn, self.workers[slot].name)

    async def pass_time(self, seconds: int) -> None:
        """Leases end, and a new epoch's time for placing holds again is over."""
        await self.stage.links[0].command(("EVAL", PASS_TIME, 0, seconds * 1000))
        for sweeper in self.sweepers:  # they watch what is over by a clock of their own
            sweeper._lapsed = {
                name: (b"%d" % (int(score) - seconds * 1000), since - seconds)
                for name, (score, since) in sweeper._lapsed.items()
            }
        async with acquire(self.pool) as conn:
            await conn.execute(BOOK_TIME)
        self.has_waited = True

    async def grant(self, purse: Purse, nanos: int) -> AccountState:
        async with acquire(self.pool) as conn:
            return await grant(conn, purse.account_id, nanos, f"g_{new_id()}", "")

    async def sweep(self, slot: int) -> None:
        """One round of a sweeper, or as much of it as there is before a slow call."""
        assert self.rounds[slot] is None
        self.network.blocked.clear()
        task = asyncio.ensure_future(self.sweepers[slot].sweep())
        self.rounds[slot] = task
        blocked = asyncio.ensure_future(self.network.blocked.wait())
        await asyncio.wait({task, blocked}, return_when=asyncio.FIRST_COMPLETED)
        blocked.cancel()
        await self.end_rounds()

    async def end_rounds(self) -> None:
        """Take note of the rounds that can end, and wait until they did."""
        for slot, task in enumerate(self.rounds):
            if task is None or self._is_waiting(2 + slot):
                continue
            try:
                self.counts.update({f"sweep {what}": n for what, n in (await task).items()})
            except (TillUnavailable, BookUnavailable):
                self.counts["sweep failed"] += 1
            self.rounds[slot] = None

    def _is_waiting(self, link: int) -> bool:
        waiting = (m for messages in self.network.bag for m in messages if m.waiter is not None)
        return any(message.link is self.stage.links[link] for message in waiting)

    async def deliver(self, at: int, *, is_last: bool) -> None:
        """Let something of the bag arrive, now."""
        bag = self.network.bag
        messages = bag[at % len(bag)]
        is_shard = messages[0].script.name.startswith("shard")
        if is_last or is_shard or messages[0].waiter is not None:
            bag.remove(messages)
        for call in [message.deliver() for message in messages]:
            await call
        await self.end_rounds()
