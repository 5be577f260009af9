"""Is this worker ready, and who may read its metrics."""

import asyncio
import hmac

from billing.book import acquire
from billing.errors import BillingError
from billing.fleet import read_epoch
from gateway.services import Services
from gateway.shedding import Reason

PROBE_S = 2.0


async def failing_parts(services: Services) -> list[str]:
    """What keeps this worker from serving requests right now: nothing, when it is ready."""
    till, book = await asyncio.gather(_till(services), _book(services))
    reason = services.shedding.reason
    is_behind = reason == Reason.PENDING_AGE or not services.settler.accepts
    parts = {
        "till": till,
        "book": book,
        "receipts_pending": not is_behind,
        "overloaded": reason not in {Reason.LOOP_LAG, Reason.MEMORY},
        "draining": not services.is_draining,
    }
    return [name for name, works in parts.items() if not works]


async def _till(services: Services) -> bool:
    try:
        async with asyncio.timeout(PROBE_S):
            await services.link.command(("PING",))
    except (BillingError, TimeoutError):
        return False
    return True


async def _book(services: Services) -> bool:
    try:
        async with asyncio.timeout(PROBE_S), acquire(services.pool) as conn:
            await read_epoch(conn)
    except (BillingError, TimeoutError):
        return False
    return True


async def may_read_metrics(services: Services, authorization: str) -> bool:
    """True for the metrics token, an operator key, or everybody when metrics are open.

    Raises KeysUnavailable when an operator key cannot be looked up.
    """
    settings = services.settings
    if settings.metrics.open:
        return True
    scheme, _, given = authorization.partition(" ")
    if scheme.lower() != "bearer":
        return False
    key = given.strip().encode()
    token = settings.metrics.token.reveal().encode()
    if token and hmac.compare_digest(token, key):
        return True
    return await services.operators.find(key) is not None
