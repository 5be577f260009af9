"""Group commit: every settled receipt of a worker reaches the book, in batches, in order.

A receipt handed to `submit` is owned here until Postgres has it: operational failures are retried
with the same ids for ever, bounded in memory by `pending_max`. One commit is in flight at a time;
while it is, and for `gather_s` after it began, the next batch gathers.
Failure: a receipt that the book refuses for good is logged in full as `receipt.refused`, counted,
and stays in the till's outbox, where `audit` finds it; the others of its batch are posted.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping
from itertools import takewhile
from typing import Any

import msgspec

from billing.book import BookRefused, Pool, acquire
from billing.budgets import read_budgets
from billing.errors import BookUnavailable, TillRefused, TillUnavailable
from billing.posting import post_receipts
from billing.receipts import ChargeReceipt, clean_texts, encode_receipt
from billing.till import Confirmation, Till
from billing.till_epoch import AccountState, SpendState
from billing.till_scopes import SpendScopes
from config.clock import Seconds, seconds

log = logging.getLogger("billing.settle")

RETRY_FIRST_S, RETRY_LAST_S = seconds(20), seconds(2000)
CONFIRMS_WAITING_MAX = 100_000
CONFIRMS_AT_ONCE = 64


class Settled(msgspec.Struct, eq=False):
    """One receipt on its way into the book."""

    receipt: ChargeReceipt
    request_id: str
    scopes: SpendScopes
    till_reply: asyncio.Future[Any]
    committed: asyncio.Future[None]
    submitted_at: Seconds


# Receipts of one account that one commit brought into the book, what it returned, and what the
# book said after it of every budget of the batch.
_Group = tuple[AccountState, list[Settled], Mapping[str, SpendState]]


class Settler:
    """The queue between requests and the book; `run_*` are supervised tasks of the worker."""

    def __init__(
        self,
        pool: Pool,
        till: Till,
        *,
        batch_max: int,
        pending_max: int,
        on_result: Callable[[str, int], None],
        gather_s: Seconds = 0,
    ) -> None:
        """on_result(result, count) is told of committed, retried and refused receipts.

        gather_s: the least time between the beginnings of two commits. A full batch does not wait
        for it, nor a receipt that the till did not take, nor anything after `stop`.
        """
        self._pool = pool
        self._till = till
        self._batch_max = batch_max
        self._pending_max = pending_max
        self._gather_s = gather_s
        self._on_result = on_result
        self._queue: deque[Settled] = deque()
        self._in_flight: list[Settled] = []
        self._unconfirmed: deque[_Group] = deque()
        self._confirming: list[_Group] = []
        self._wake = asyncio.Event()
        self._wake_confirms = asyncio.Event()
        self._pausing = False
        self._pause_timer: asyncio.TimerHandle | None = None
        self._stopping = False
        self._commits_ended = False

    @property
    def pending(self) -> int:
        """Receipts that the book does not have yet."""
        return len(self._queue) + len(self._in_flight)

    @property
    def is_idle(self) -> bool:
        """True when the book has everything and the till knows it."""
        return not self.pending and not self._unconfirmed and not self._confirming

    @property
    def accepts(self) -> bool:
        """False above 80 % of the bound: no new request may be admitted."""
        return (len(self._queue) + len(self._in_flight)) * 5 < self._pending_max * 4

    def oldest_age_s(self) -> Seconds:
        """Age of the oldest receipt that the book does not have yet."""
        first = self._in_flight or self._queue
        return asyncio.get_running_loop().time() - first[0].submitted_at if first else 0

    def untaken(self, age_s: Seconds) -> list[Settled]:
        """Receipts that neither till nor book took for at least that long, oldest first."""
        if not self.pending or self.oldest_age_s() < age_s:
            return []
        latest = asyncio.get_running_loop().time() - age_s
        old = takewhile(lambda one: one.submitted_at <= latest, (*self._in_flight, *self._queue))
        return [settled for settled in old if not _is_in_till(settled.till_reply)]

    def submit(self, scopes: SpendScopes, request_id: str, receipt: ChargeReceipt) -> Settled:
        """Settle in the till and queue for the book, both begun when this returns.

        Never awaits: nothing can come between a request's end and its receipt being owned here.
        """
        clean_texts(receipt)
        data = encode_receipt(receipt)
        reply = self._till.settle(scopes, request_id, receipt.price_nanos, data)
        # crash-point: settle.queued
        loop = asyncio.get_running_loop()
        committed = loop.create_future()
        settled = Settled(receipt, request_id, scopes, reply, committed, loop.time())
        self._queue.append(settled)
        if reply.done():
            # The till took nothing: the answer to the client waits for this very commit.
            self._end_pause()
        elif self._may_begin():
            self._wake.set()
        return settled

    def settle_again(self) -> int:
        """Tell a till that lost its content of all that the book does not have; returns how many.

        Idempotent; what is committed meanwhile is confirmed after it.
        """
        waiting = [*self._in_flight, *self._queue]
        for settled in waiting:
            receipt, request_id = settled.receipt, settled.request_id
            data = encode_receipt(receipt)
            settled.till_reply = self._till.settle(
                settled.scopes, request_id, receipt.price_nanos, data
            )
        return len(waiting)

    async def run_commits(self) -> None:
        """Commit batches until `stop`, then until nothing is left."""
        while self._queue or not self._stopping:
            if not self._may_begin():
                self._wake.clear()
                await self._wake.wait()
                continue
            size = min(len(self._queue), self._batch_max)
            self._in_flight = [self._queue.popleft() for _ in range(size)]
            self._begin_pause()
            await self._commit(self._in_flight)
            self._in_flight = []
        self._commits_ended = True
        self._wake_confirms.set()

    def _may_begin(self) -> bool:
        return len(self._queue) >= (self._batch_max if self._pausing else 1)

    def _begin_pause(self) -> None:
        """Let the batch after this one gather: a commit costs the same for one receipt or ten."""
        if self._pause_timer is not None:
            self._pause_timer.cancel()
            self._pause_timer = None
        if self._gather_s and not self._stopping:
            self._pausing = True
            loop = asyncio.get_running_loop()
            self._pause_timer = loop.call_later(self._gather_s, self._end_pause)

    def _end_pause(self) -> None:
        self._pausing = False
        self._wake.set()

    async def run_confirms(self) -> None:
        """Tell the till what was committed until `run_commits` ended, then what is left, once.

        What the till never hears stays in its outbox and is confirmed by whoever finds it.
        """
        delay_s = RETRY_FIRST_S
        while True:
            if not self._unconfirmed:
                if self._commits_ended:
                    return
                self._wake_confirms.clear()
                await self._wake_confirms.wait()
                continue
            failed = await self._confirm_some()
            if not failed:
                delay_s = RETRY_FIRST_S
            elif not self._commits_ended:
                self._unconfirmed.extendleft(reversed(failed))
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, RETRY_LAST_S)

    async def _confirm_some(self) -> list[_Group]:
        """Confirm what waits, in one pipeline; returns the groups that the till did not hear of."""
        size = min(len(self._unconfirmed), CONFIRMS_AT_ONCE)
        groups = self._confirming = [self._unconfirmed.popleft() for _ in range(size)]
        # A settle still on its way must arrive first, or it would bring the outbox entry back.
        await _ended([settled.till_reply for _, group, _ in groups for settled in group])
        replies = [self._till.confirm(_confirmation(*group)) for group in groups]
        # crash-point: confirm.queued
        await _ended(replies)
        # crash-point: confirm.answered
        self._confirming = []
        return [group for group, reply in zip(groups, replies, strict=True) if not _is_heard(reply)]

    def stop(self) -> None:
        """Let `run_commits` end once everything is committed."""
        self._stopping = True
        self._end_pause()

    async def _commit(self, batch: list[Settled]) -> None:
        delay_s = RETRY_FIRST_S
        while True:
            try:
                # crash-point: commit.begin
                async with acquire(self._pool) as conn:
                    states = await post_receipts(conn, [settled.receipt for settled in batch])
                    budgets = await read_budgets(conn, (settled.scopes for settled in batch))
            except BookUnavailable as exc:
                self._on_result("retried", len(batch))
                cause = f"{type(exc.__cause__).__name__}: {exc.__cause__}"
                log.warning("commit.retried", extra={"receipts": len(batch), "error": cause})
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, RETRY_LAST_S)
            except BookRefused as exc:
                if len(batch) == 1:
                    self._refuse(batch[0], exc)
                    return
                # One row of the batch is at fault: find it, so that it holds up nobody else.
                for settled in batch:
                    await self._commit([settled])
                return
            else:
                break
        # crash-point: commit.done
        self._on_result("committed", len(batch))
        by_account: dict[Any, list[Settled]] = {}
        for settled in batch:
            by_account.setdefault(settled.receipt.billing_account_id, []).append(settled)
            if not settled.committed.done():
                settled.committed.set_result(None)
        for state in states:
            self._unconfirmed.append((state, by_account[state.account_id], budgets))
        while len(self._unconfirmed) > CONFIRMS_WAITING_MAX:
            self._unconfirmed.popleft()
        self._wake_confirms.set()

    def _refuse(self, settled: Settled, exc: BookRefused) -> None:
        self._on_result("refused", 1)
        record = encode_receipt(settled.receipt).decode()
        log.error("receipt.refused", extra={"reason": exc.reason, "receipt": record})
        if not settled.committed.done():
            settled.committed.set_exception(exc)
            settled.committed.exception()  # the edge may have left; this is not its failure


async def _ended(futures: list[asyncio.Future[Any]]) -> None:
    waiting = [future for future in futures if not future.done()]
    if waiting:
        await asyncio.wait(waiting)


def _is_in_till(reply: asyncio.Future[Any]) -> bool:
    return reply.done() and reply.exception() is None


def _confirmation(
    state: AccountState, group: list[Settled], budgets: Mapping[str, SpendState]
) -> Confirmation:
    receipts = [(settled.scopes, settled.request_id) for settled in group]
    return Confirmation(state=state, receipts=receipts, budgets=budgets)


def _is_heard(reply: asyncio.Future[Any]) -> bool:
    """False when the till did not answer; what it refuses once it will refuse again."""
    exc = reply.exception()
    if isinstance(exc, TillRefused):
        log.error("confirm.refused", extra={"reply": exc.reply})
    elif exc is not None and not isinstance(exc, TillUnavailable):
        raise exc
    return not isinstance(exc, TillUnavailable)
