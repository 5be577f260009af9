"""A settler between a real till and a real book."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from billing.book import Pool
from billing.fleet import PoolBook
from billing.receipts import ChargeReceipt
from billing.settler import Settled, Settler
from billing.till import Till
from config.ids import id_text
from gateway.supervise import Tasks
from tests.support.books import Account, open_pool
from tests.support.gateway import eventually
from tests.support.tills import InTill, look, nothing_unseen, running_till


class Rig:
    """A settler between a real till and a real book."""

    def __init__(self, pool: Pool, till: Till, till_url: str, settler: Settler) -> None:
        self.pool = pool
        self.till = till
        self.till_url = till_url
        self.settler = settler
        self.results: Counter[str] = Counter()
        self.tasks: list[asyncio.Task[Any]] = []

    async def end(self, account: Account, price: int, *, hold: int = 1000) -> Settled:
        """Admit a request and settle it."""
        receipt = account.receipt(price, hold_nanos=hold)
        await self.till.admit(account.scopes, id_text(receipt.request_id), hold, b"{}")
        return self.submit(account, receipt)

    def submit(self, account: Account, receipt: ChargeReceipt) -> Settled:
        return self.settler.submit(account.scopes, id_text(receipt.request_id), receipt)

    async def look(self, account: Account) -> InTill:
        return await look(self.till_url, account.scopes)

    async def at_rest(self) -> None:
        async def idle() -> bool | None:
            return self.settler.is_idle or None

        await eventually(idle)


@asynccontextmanager
async def running_settler(
    book_url: str,
    till_url: str,
    *,
    till_at: str = "",
    batch_max: int = 256,
    pending_max: int = 50_000,
    gather_s: float = 0,
) -> AsyncIterator[Rig]:
    """till_at: where the settler finds the till, if not where the test looks at it."""
    results: Counter[str] = Counter()
    tasks = Tasks()
    async with (
        nothing_unseen(),
        open_pool(book_url) as pool,
        open_pool(book_url, 2) as own,
        running_till(till_at or till_url, PoolBook(own, "w_test"), call_s=0.5, stall_s=0.5) as till,
    ):
        settler = Settler(
            pool,
            till,
            batch_max=batch_max,
            pending_max=pending_max,
            on_result=lambda result, count: results.update({result: count}),
            gather_s=gather_s,
        )
        rig = Rig(own, till, till_url, settler)
        rig.results = results
        rig.tasks = [
            tasks.start(settler.run_commits(), "commits"),
            tasks.start(settler.run_confirms(), "confirms"),
        ]
        try:
            yield rig
            settler.stop()
            async with asyncio.timeout(10):
                await asyncio.gather(*rig.tasks)
        finally:
            await tasks.close()


async def commits(pool: Pool) -> int:
    """Transactions that wrote receipts, by the transaction that made each row."""
    return int(await pool.fetchval("SELECT count(DISTINCT xmin::text) FROM charge_receipts"))
