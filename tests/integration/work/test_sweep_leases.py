"""What a sweeper does with a lease whose hold it does not find."""

import asyncio
from typing import Any

from billing.receipts import encode_receipt
from billing.sweep import Sweeper
from billing.till import Till
from billing.till_link import Arg, TillLink
from billing.till_wire import Renewal
from tests.support.books import Account, make_account, open_pool
from tests.support.tills import SCRIPTS, Said, look, running_till


class Interrupted(TillLink):
    """Something happens between this connection's look at the leases and at the holds."""

    meanwhile: Any = None

    def command(self, args: tuple[Arg, ...]) -> asyncio.Future[Any]:
        if args[0] != "HMGET" or self.meanwhile is None:
            return super().command(args)
        meanwhile, self.meanwhile = self.meanwhile, None
        return asyncio.ensure_future(self._after(meanwhile, args))

    async def _after(self, meanwhile: Any, args: tuple[Arg, ...]) -> Any:
        found = await super().command(args)
        await meanwhile()
        return found


async def place_again(till: Till, account: Account, request_id: str) -> None:
    draft = encode_receipt(account.receipt(0))
    renewal = Renewal(
        request_id=request_id, hold_nanos=5, is_forwarded=True, draft=draft, is_new=True
    )
    await till.renew(account.scopes, renewal)


async def test_a_hold_that_is_placed_again_while_a_sweeper_looks_keeps_its_lease(
    book_url: str, till_url: str
) -> None:
    """Without it nobody would ever end the hold."""
    link = Interrupted(
        till_url, SCRIPTS.all(), call_timeout_s=2, stall_timeout_s=5, pending_max=1000
    )
    link.start()
    await link.wait_up(5)
    async with open_pool(book_url) as pool, running_till(till_url, Said()) as till:
        account = await make_account(pool)
        lease = ("ZADD", account.scopes.leases_key, 1)
        await till.link.command((*lease, "placed"))
        await till.link.command((*lease, "ended"))
        link.meanwhile = lambda: place_again(till, account, "placed")
        sweeper = Sweeper(
            pool, Till(link, SCRIPTS, Said(), worker="", lease_ms=0), grace_s=0, takeover_s=0
        )
        await sweeper.sweep()
        seen = await look(till_url, account.scopes)
        left = await till.link.command(("ZRANGE", account.scopes.leases_key, 0, -1))
        await link.close()

    assert (seen.holds, left) == ({"placed": 5}, [b"placed"])
