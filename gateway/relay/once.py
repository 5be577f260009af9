"""`Idempotency-Key`: of all requests with one key and body, one runs. Costs others nothing.

The claim is durable in the book before the request is admitted. Answers are not stored: a
repetition is told that the first is under way, or its receipt.
Failure: 503 when the book does not answer, because then nobody can promise anything. A claim that
cannot be released stays until it counts as abandoned.
"""

import asyncio
import logging
import re
import time
from typing import Any
from uuid import UUID

from billing.book import BookRefused, Pool, acquire
from billing.errors import (
    BillingError,
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
from billing.till import Till
from billing.till_scopes import SpendScopes
from config.clock import Seconds
from config.ids import id_text
from gateway.errors import invalid, unavailable
from gateway.relay.aside import LARGE_BYTES, Aside
from gateway.relay.call import Call
from gateway.supervise import Tasks

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
    """The claims of one worker's requests.

    They run in the background: a book that stalls keeps no request waiting longer than
    `BOOK_WAIT_S`, and what it does late is taken back.
    """

    def __init__(self, pool: Pool, till: Till, tasks: Tasks, request_total_s: Seconds) -> None:
        self._pool = pool
        self._till = till
        self._tasks = tasks
        self._longest_s = request_total_s + SETTLED_WITHIN_S
        self._slots = asyncio.Semaphore(CLAIMS_AT_ONCE)
        self._claiming: dict[UUID, asyncio.Task[BillingError | None]] = {}
        # Requests whose claim cannot be in the book, so that there is nothing to release.
        self._unasked: set[UUID] = set()

    async def take(self, scopes: SpendScopes, claim: Claim) -> None:
        """Claim the key. Raises one of HELD_BY_ANOTHER, or ApiError 503: then it may be claimed."""
        self._unasked.add(claim.request_id)
        if len(self._claiming) >= CLAIMS_WAITING_MAX:
            raise unavailable("The gateway is busy.")
        task = self._tasks.start(self._claim(scopes, claim), "idempotency.claim")
        self._claiming[claim.request_id] = task
        task.add_done_callback(lambda _: self._claiming.pop(claim.request_id))
        await asyncio.wait([task], timeout=BOOK_WAIT_S)
        refusal = task.result() if task.done() else BookUnavailable()
        if isinstance(refusal, BookUnavailable):
            raise unavailable("Idempotency-Key cannot be honoured right now.") from refusal
        if refusal is not None:
            raise refusal

    async def release(self, claim: Claim) -> None:
        """Leave the key to others: the request was refused. Never raises."""
        claiming = self._claiming.get(claim.request_id)
        if claiming is None and self._is_unasked(claim):
            return
        task = self._tasks.start(self._release(claim, claiming), "idempotency.release")
        if claiming is None:
            await asyncio.wait([task], timeout=BOOK_WAIT_S)

    async def _claim(self, scopes: SpendScopes, claim: Claim) -> BillingError | None:
        """Why the claim cannot be had, or None: it is there."""
        due = time.monotonic() + BOOK_WAIT_S

        async def is_abandoned(holder: Holder) -> bool:
            return await self._is_abandoned(scopes, holder)

        try:
            async with self._slots:
                if time.monotonic() > due:
                    return BookUnavailable()  # nobody waits for it any more
                async with acquire(self._pool) as conn:
                    self._unasked.discard(claim.request_id)
                    holder_id = await claim_request(conn, claim, is_abandoned)
        except HELD_BY_ANOTHER as exc:
            return exc
        except (BookUnavailable, BookRefused) as exc:
            return exc if isinstance(exc, BookUnavailable) else BookUnavailable()
        if holder_id is not None:
            facts = {"request_id": id_text(claim.request_id), "from": id_text(holder_id)}
            log.info("idempotency.taken_over", extra=facts)
        return None

    async def _release(self, claim: Claim, claiming: asyncio.Task[Any] | None) -> None:
        if claiming is not None:
            await asyncio.wait([claiming])  # a claim that came after its release would stay
            if self._is_unasked(claim):
                return
        try:
            async with self._slots, acquire(self._pool) as conn:
                await release_claim(conn, claim)
        except (BookUnavailable, BookRefused):
            facts = {"request_id": id_text(claim.request_id)}
            log.warning("idempotency.release_failed", extra=facts)

    def _is_unasked(self, claim: Claim) -> bool:
        """Asked once, when the request was refused: it is forgotten then."""
        is_unasked = claim.request_id in self._unasked
        self._unasked.discard(claim.request_id)
        return is_unasked

    async def _is_abandoned(self, scopes: SpendScopes, holder: Holder) -> bool:
        """Whether the request that has the claim never was admitted, or nothing is left of it.

        That the till does not know it says something only when the till has lost nothing since.
        """
        if holder.is_guessed:
            return holder.age_s > self._longest_s
        try:
            epoch, is_known = await self._till.trace(scopes, id_text(holder.request_id))
        except (TillUnavailable, TillRefused):
            return False
        if is_known:
            return False
        # A server that this worker has not made sure of may be a restarted one: its content may be
        # of before the request, and its epoch still the old one.
        is_same = self._till.epoch.is_known and epoch == holder.epoch
        is_whole = is_same and holder.epoch_age_s > holder.age_s
        return is_whole or holder.age_s > self._longest_s
