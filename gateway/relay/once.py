"""`Idempotency-Key`: of all requests with one key and body, one runs. Costs others nothing.

The claim is durable in the book before the request is admitted. Answers are not stored: a
repetition is told that the first is under way, or its receipt.
Failure: 503 when the book does not answer, because then nobody can promise anything. A claim that
cannot be released stays until it counts as abandoned.
"""

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from billing.book import BookRefused, Connection, Pool, acquire
from billing.errors import (
    BookUnavailable,
    IdempotencyCompleted,
    IdempotencyInFlight,
    IdempotencyMismatch,
    TillRefused,
    TillUnavailable,
)
from billing.idempotency import (
    ABANDONED_AFTER_S,
    Claim,
    Holder,
    claim_of,
    claim_request,
    release_claim,
)
from billing.till import SpendScopes, Till
from config.clock import Seconds
from config.ids import id_text
from gateway.errors import invalid, unavailable
from gateway.relay.aside import LARGE_BYTES, Aside
from gateway.relay.call import Call

log = logging.getLogger("gateway.once")

HEADER = b"idempotency-key"
KEY = re.compile(rb"[\x20-\x7e]{1,255}")
# The settler needs the pool's connections more than these do.
CLAIMS_AT_ONCE = 2
CLAIMS_WAITING_MAX = 500
BOOK_WAIT_S = 3.0
# A claim counts as abandoned later than this, whatever the scheduler does to a worker.
ADMITTED_WITHIN_S = ABANDONED_AFTER_S / 2
# Beyond a request's longest time: its way to the book.
SETTLED_WITHIN_S = 120.0
HELD_BY_ANOTHER = (IdempotencyMismatch, IdempotencyInFlight, IdempotencyCompleted)


def check_key(key: bytes) -> None:
    """Raises ApiError 400."""
    if not KEY.fullmatch(key):
        raise invalid("Idempotency-Key must be 1 to 255 printable ASCII characters.")


async def make_claim(aside: Aside, call: Call, key: bytes) -> Claim:
    """The claim of a call to its key."""
    virtual_key_id, body = call.caller.principal.virtual_key_id, call.facts.body
    request_id = call.arrival.request_uid
    if len(body) < LARGE_BYTES:
        return claim_of(virtual_key_id, key, body, request_id)
    return await aside.run(lambda: claim_of(virtual_key_id, key, body, request_id))


class Claims:
    """The claims of one worker's requests."""

    def __init__(self, pool: Pool, till: Till, request_total_s: Seconds) -> None:
        self._pool = pool
        self._till = till
        self._longest_s = request_total_s + SETTLED_WITHIN_S
        self._slots = asyncio.Semaphore(CLAIMS_AT_ONCE)
        self._waiting = 0

    async def take(self, scopes: SpendScopes, claim: Claim) -> None:
        """Claim the key; raises one of HELD_BY_ANOTHER, or ApiError 503: it may be claimed then."""

        async def is_abandoned(holder: Holder) -> bool:
            return await self._is_abandoned(scopes, holder)

        if self._waiting >= CLAIMS_WAITING_MAX:
            raise unavailable("The gateway is busy.")
        try:
            async with self._connection() as conn:
                holder_id = await claim_request(conn, claim, is_abandoned)
        except (BookUnavailable, BookRefused, TimeoutError) as exc:
            raise unavailable("Idempotency-Key cannot be honoured right now.") from exc
        if holder_id is not None:
            facts = {"request_id": id_text(claim.request_id), "from": id_text(holder_id)}
            log.info("idempotency.taken_over", extra=facts)

    async def release(self, claim: Claim) -> None:
        """Leave the key to others: the request was refused. Never raises."""
        try:
            async with self._connection() as conn:
                await release_claim(conn, claim)
        except (BookUnavailable, BookRefused, TimeoutError):
            facts = {"request_id": id_text(claim.request_id)}
            log.warning("idempotency.release_failed", extra=facts)

    async def _is_abandoned(self, scopes: SpendScopes, holder: Holder) -> bool:
        """Whether the request that has the claim never was admitted, or nothing is left of it.

        That the till does not know it says something only when the till has lost nothing since.
        """
        try:
            epoch, is_known = await self._till.trace(scopes, id_text(holder.request_id))
        except (TillUnavailable, TillRefused):
            return False
        if is_known:
            return False
        is_whole = epoch == holder.epoch and holder.epoch_age_s > holder.age_s
        return is_whole or holder.age_s > self._longest_s

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Connection]:
        self._waiting += 1
        try:
            async with asyncio.timeout(BOOK_WAIT_S), self._slots, acquire(self._pool) as conn:
                yield conn
        finally:
            self._waiting -= 1
