"""Is this worker ready, and who may read its metrics."""

import asyncio
import hmac

from billing.book import acquire, read_epoch
from billing.errors import BillingError
from gateway.services import Services
from keys.api_key import digest, is_well_formed
from keys.errors import KeysError
from keys.store import is_operator

PROBE_S = 2.0


async def is_ready(services: Services) -> dict[str, bool]:
    """Each part and whether it works right now."""
    till, book = await asyncio.gather(_till(services), _book(services))
    return {
        "till": till,
        "book": book,
        "accepting": not services.is_draining and services.settler.accepts,
    }


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
    """True for the metrics token, an operator key, or everybody when metrics are open."""
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
    if not (is_well_formed(key) and key.startswith(b"fb_op_")):
        return False
    try:
        sealed = digest(key, settings.keys.pepper.reveal().encode())
        return await is_operator(services.pool, [sealed])
    except KeysError:
        return False
