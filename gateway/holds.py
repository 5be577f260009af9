"""What keeps a worker's holds alive while its requests run, and brings them into a new till.

Every open request is renewed every few seconds with what it cost so far at least, so that whoever
finds the hold after our death charges for that. A till that lost its content is told of
everything that is open, before anything new is admitted.
Failure: a renewal without an answer is sent again at the next turn; leases outlive several of them.
"""

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from billing.book import acquire
from billing.errors import BillingError, TillRefused
from billing.fleet import say_alive, say_gone
from billing.receipts import encode_receipt
from billing.till_wire import Renewal
from billing.tokens import count_tokens
from config.clock import seconds
from gateway.protocols.chat import prompt_text
from gateway.protocols.facts import CallFacts

if TYPE_CHECKING:
    from gateway.relay.reply import Reply
    from gateway.services import Services

log = logging.getLogger("gateway.holds")

TURN_S = seconds(1000)
ALIVE_EVERY_S = seconds(5000)
# So many are looked at between two turns of the event loop.
AT_ONCE = 16
# A longer prompt keeps the estimate of its admission: counting it would hold up the others.
PROMPT_BYTES_MAX = 1024 * 1024


class HoldKeeper:
    """The supervised tasks of one worker that keep its holds."""

    def __init__(self, services: "Services") -> None:
        self._services = services
        self._till = services.till
        self._every_s = services.settings.till.renew_every_s
        self._till.epoch.on_new = self._place_again
        self._is_failing = False

    async def run_alive(self) -> None:
        """For ever: tell the book that this worker lives."""
        while True:
            with contextlib.suppress(BillingError):
                async with acquire(self._services.pool) as conn:
                    await say_alive(conn, self._till.worker)
            await asyncio.sleep(ALIVE_EVERY_S)

    async def say_gone(self) -> None:
        """Everything that this worker had open has ended."""
        with contextlib.suppress(BillingError):
            async with acquire(self._services.pool) as conn:
                await say_gone(conn, self._till.worker)

    async def run_renewals(self) -> None:
        """For ever: look after the epoch, renew what is due."""
        while True:
            await asyncio.sleep(min(TURN_S, self._every_s))
            with contextlib.suppress(BillingError):
                await self._look_at_epoch()
            await self._renew_due()

    async def _look_at_epoch(self) -> None:
        epoch = self._till.epoch
        number = epoch.number
        if epoch.is_known and not await epoch.has(number):
            epoch.doubt(number, is_lost=True)
        if not epoch.is_known:
            await self._till.learn_epoch()

    async def _renew_due(self) -> None:
        now = asyncio.get_running_loop().time()
        due = [r for r in self._services.replies if now - r.renewed_at >= self._every_s]
        try:
            for part in _parts(due):
                await self._renew_some(part)
        except BillingError as exc:
            if not self._is_failing:  # once for each time that the till is away
                log.warning("holds.renew_failed", extra={"error": repr(exc), "holds": len(due)})
            self._is_failing = True
        else:
            self._is_failing = self._is_failing and not due

    async def _renew_some(self, replies: Sequence["Reply"]) -> None:
        try:
            await self._renew(replies)
        except BillingError:
            raise
        except Exception:
            # All other streams of this worker would lose their holds with these.
            log.exception("holds.renew_crashed", extra={"holds": len(replies)})

    async def _renew(self, replies: Sequence["Reply"]) -> None:
        """Write down how far these came and renew their leases."""
        await self._count(replies)
        still_open = [reply for reply in replies if reply.call.is_open]
        answers = [self._send(reply) for reply in still_open]
        # crash-point: renew.queued
        for reply, answer in zip(still_open, answers, strict=True):
            try:
                status, held, _ = await answer
            except TillRefused as exc:
                log.error("holds.renew_refused", extra={"reply": exc.reply})
                continue
            # crash-point: renew.answered
            reply.call.take_over(held)
            reply.renewed_at = asyncio.get_running_loop().time()
            if status in {b"gone", b"settled"} and reply.call.is_open:
                await self._look_for(reply)

    async def _count(self, replies: Sequence["Reply"]) -> None:
        """Bring the token counts of their receipts up to date, all of them in one thread."""
        work = [(reply, reply.progress.uncounted(reply.seen)) for reply in replies]
        await asyncio.sleep(0)

        def count() -> list[tuple[int | None, int]]:
            return [
                (
                    _prompt_tokens(reply.call.facts) if part.with_prompt else None,
                    count_tokens(part.text),
                )
                for reply, part in work
            ]

        for (reply, part), counts in zip(work, await asyncio.to_thread(count), strict=True):
            reply.progress.write_down(part, *counts)

    def _send(self, reply: "Reply", *, is_new: bool = False) -> asyncio.Future[Any]:
        call = reply.call
        assert call.receipt is not None
        renewal = Renewal(
            request_id=call.request_id,
            # What is placed again is what was held: growth is asked for after it.
            hold_nanos=call.hold_nanos if is_new else max(call.hold_nanos, call.wanted_nanos),
            is_forwarded=call.is_sent,
            draft=encode_receipt(call.receipt),
            is_new=is_new,
        )
        return self._till.renew(call.scopes, renewal)

    async def _look_for(self, reply: "Reply") -> None:
        """The till does not have this hold: it lost it, or somebody took us for dead."""
        if await self._services.is_in_book(reply.call.arrival.request_uid):
            facts = {"request_id": f"req_{reply.call.request_id}"}
            log.error("hold.taken", extra=facts)
            # crash-point: taken.noticed
            reply.lose_hold()
        elif reply.call.is_open:
            await self._send(reply, is_new=True)

    def _place_again(self) -> None:
        """Before anything new is held in a new epoch: all that is open, and all that is settled.

        Nobody waits for the answers: they arrive in order, and renewals come soon.
        """
        open_now = [reply for reply in self._services.replies if reply.call.is_open]
        for reply in open_now:
            self._send(reply, is_new=True)
        settled = self._services.settler.settle_again()
        # crash-point: epoch.placed
        if open_now or settled:
            facts = {"epoch": self._till.epoch.announced, "holds": len(open_now)}
            log.warning("holds.placed_again", extra={**facts, "receipts": settled})


def _prompt_tokens(facts: CallFacts) -> int:
    return count_tokens(prompt_text(facts)) if facts.text_bytes <= PROMPT_BYTES_MAX else 0


def _parts(replies: Iterable["Reply"]) -> Iterator[list["Reply"]]:
    rest = iter(replies)
    while part := list(islice(rest, AT_ONCE)):
        yield part
