"""Between two commits receipts gather; what somebody waits for does not."""

import asyncio

from tests.support.books import make_account
from tests.support.faultproxy import running_proxy
from tests.support.gateway import eventually
from tests.support.settlers import commits, running_settler


async def test_a_pause_after_each_commit_gathers_receipts(book_url: str, till_url: str) -> None:
    async with running_settler(book_url, till_url, gather_s=0.2) as rig:
        account = await make_account(rig.pool)
        first = await rig.end(account, 1)
        await first.committed
        more = [await rig.end(account, 1) for _ in range(20)]
        assert not any(settled.committed.done() for settled in more)
        await rig.at_rest()
        used = await commits(rig.pool)

    assert used == 2
    assert rig.results == {"committed": 21}


async def test_neither_a_full_batch_nor_a_stop_waits_for_the_pause(
    book_url: str, till_url: str
) -> None:
    async with running_settler(book_url, till_url, gather_s=60, batch_max=5) as rig:
        account = await make_account(rig.pool)
        await (await rig.end(account, 1)).committed
        batch = [await rig.end(account, 1) for _ in range(5)]
        await asyncio.gather(*(settled.committed for settled in batch))
        last = await rig.end(account, 1)
        assert not last.committed.done()
        rig.settler.stop()
        await last.committed


async def test_a_receipt_that_the_till_did_not_take_does_not_wait_for_the_pause(
    book_url: str, till_url: str
) -> None:
    async with (
        running_proxy(till_url) as (proxy, url),
        running_settler(book_url, till_url, till_at=url, gather_s=60) as rig,
    ):
        account = await make_account(rig.pool)
        await (await rig.end(account, 1)).committed
        proxy.refuse()

        async def down() -> bool | None:
            return None if rig.till.link.is_up else True

        await eventually(down)
        await rig.submit(account, account.receipt(1)).committed
