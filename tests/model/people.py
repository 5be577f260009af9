"""Those who spend and settle: accounts, requests, and a worker around the real till and settler.

The worker does what `gateway.holds` and the relay do, without a provider and without timers.
"""

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import msgspec
from msgspec.structs import replace

from billing.book import Pool, acquire
from billing.errors import Refusal, TillRefused, TillUnavailable
from billing.fleet import PoolBook
from billing.history import has_receipt
from billing.posting import post_receipts
from billing.prices import CostSource
from billing.receipts import ChargeReceipt, Outcome, Provenance, encode_receipt
from billing.settler import Settler
from billing.till import Scripts, Till
from billing.till_scopes import BudgetScope, SpendScopes, spend_scopes
from billing.till_wire import Renewal
from billing.windows import window_start
from config.ids import id_text
from tests.model.wire import WireLink

MARKUP_BPS = 20_000
TOKEN_NANOS = 2000
"""What an input token costs at the prices of these tests, with the markup."""
REBUILD_MS = 60_000
# No machine runs into the next day.
STARTED_AT = datetime(2026, 5, 20, 21, 30, tzinfo=UTC)
BATCH_MAX = 8


class Purse(msgspec.Struct, frozen=True):
    """An account and one of its keys, with or without a budget for the day of `STARTED_AT`."""

    account_id: UUID
    key_id: UUID
    limit: int | None = None

    @property
    def scopes(self) -> SpendScopes:
        budget = None
        if self.limit is not None:
            budget = BudgetScope(
                virtual_key_id=self.key_id,
                window="day",
                starts_at=window_start("day", STARTED_AT),
                limit_nanos=self.limit,
            )
        return spend_scopes(self.account_id, self.key_id, budget=budget)

    @property
    def money_keys(self) -> list[str]:
        """The keys of its scopes that count money: the account, and the budget if it has one."""
        scopes = self.scopes
        return [
            key for key, kind in zip(scopes.scope_keys, scopes.kinds, strict=True) if kind != "K"
        ]


class Request(msgspec.Struct, eq=False):
    """A request as its worker knows it."""

    uid: UUID
    purse: Purse
    hold: int
    """The most that it may cost, as far as the till ever granted."""
    asked: int
    """The most that was ever asked for: the answer of the till may have been lost."""
    draft: ChargeReceipt
    is_sent: bool = False
    price: int | None = None
    """What its worker said it costs; None while it is open."""
    is_lost: bool = False
    """Its worker died, so what the till and the book have of it is all there is."""

    @property
    def id(self) -> str:
        return self.draft.source_reference

    @property
    def liability(self) -> int:
        """What it may still cost at most."""
        return self.hold if self.price is None else self.price


def new_request(uid: UUID, purse: Purse, hold: int, price_version: int) -> Request:
    draft = ChargeReceipt(
        request_id=uid,
        source_reference=id_text(uid),
        billing_account_id=purse.account_id,
        virtual_key_id=purse.key_id,
        app_key_id=None,
        protocol="chat.completions",
        provider="test",
        requested_model="m",
        markup_bps=MARKUP_BPS,
        price_version=price_version,
        input_tokens=1,
        hold_nanos=hold,
        outcome=Outcome.RECOVERED,
        provenance=Provenance.STREAM,
        started_at=STARTED_AT,
        finished_at=STARTED_AT,
        budget_window="" if purse.limit is None else "day",
    )
    return Request(uid=uid, purse=purse, hold=hold, asked=hold, draft=draft)


class Worker:
    """One worker. `requests` are those it has open."""

    def __init__(self, name: str, link: WireLink, scripts: Scripts, pool: Pool) -> None:
        self.name = name
        self.link = link
        self.pool = pool
        self.till = Till(
            link,
            scripts,
            PoolBook(pool, name),
            worker=name,
            lease_ms=30_000,
            rebuild_ms=REBUILD_MS,
        )
        self.till.epoch.on_new = self._place_again
        self.settler = Settler(
            pool, self.till, batch_max=BATCH_MAX, pending_max=10_000, on_result=self._on_result
        )
        self.requests: dict[str, Request] = {}
        self.is_paused = False
        self.refused = 0

    def _on_result(self, result: str, count: int) -> None:
        self.refused += count * (result != "committed")

    @property
    def unposted(self) -> list[ChargeReceipt]:
        """Receipts that it settled and does not know to be in the book."""
        settler = self.settler
        return [settled.receipt for settled in (*settler._in_flight, *settler._queue)]

    async def admit(self, request: Request, *, asks_book: bool) -> str:
        """Returns what became of it: admitted, refused, or void when there was no answer."""
        # The till asks the book again once in a second; here the test says when.
        fresh = {} if asks_book else {request.purse.account_id: 1 << 60}
        self.till._refreshed_ms = fresh
        draft = encode_receipt(request.draft)
        try:
            await self.till.admit(request.purse.scopes, request.id, request.hold, draft)
        except Refusal:
            return "refused"
        except TillUnavailable as exc:
            if not exc.asked:
                return "rebuilding"
            await self.end(request, 0)
            return "void"
        self.requests[request.id] = request
        return "admitted"

    def forward(self, request: Request) -> None:
        request.is_sent = True
        self.till.forwarded(request.purse.scopes, request.id)

    async def renew(self, request: Request, more: int, tokens: int) -> str:
        """Renew, write down how far it came, ask for more hold; returns what was found."""
        request.draft = replace(
            request.draft, input_tokens=request.draft.input_tokens + tokens, hold_nanos=request.hold
        )
        request.asked = max(request.asked, request.hold + more)
        try:
            status, held, _ = await self._renew(request, request.hold + more)
        except TillUnavailable:
            return "unavailable"
        word = bytes(status).decode()
        if word == "ok":
            request.hold = max(request.hold, int(held))
        if word not in {"gone", "settled"}:
            return word
        async with acquire(self.pool) as conn:
            if await has_receipt(conn, request.uid):
                return "taken"
        self.till.renew(request.purse.scopes, self._renewal(request, request.hold, is_new=True))
        return "placed"

    async def _renew(self, request: Request, hold: int) -> Any:
        return await self.till.renew(request.purse.scopes, self._renewal(request, hold))

    def _renewal(self, request: Request, hold: int, *, is_new: bool = False) -> Renewal:
        return Renewal(
            request_id=request.id,
            hold_nanos=hold,
            is_forwarded=request.is_sent,
            draft=encode_receipt(request.draft),
            is_new=is_new,
        )

    async def end(self, request: Request, price: int) -> str:
        """Settle with that price; returns what the till said."""
        self.requests.pop(request.id, None)
        request.price = price
        receipt = replace(
            request.draft,
            price_nanos=price,
            provider_cost_nanos=price,
            markup_bps=10_000,
            reported_cost_usd=Decimal(price).scaleb(-9),
            hold_nanos=request.hold,
            cost_source=CostSource.PROVIDER,
            outcome=Outcome.COMPLETE,
            finished_at=datetime.now(UTC),
        )
        settled = self.settler.submit(request.purse.scopes, request.id, receipt)
        try:
            return bytes((await settled.till_reply)[0]).decode()
        except (TillUnavailable, TillRefused) as exc:
            return type(exc).__name__

    def begin_commit(self, size: int) -> None:
        """Take a batch from the queue, as `run_commits` does."""
        settler = self.settler
        count = min(size, len(settler._queue))
        settler._in_flight = [settler._queue.popleft() for _ in range(count)]

    async def commit(self, *, is_answered: bool) -> None:
        """Commit the batch. Without an answer it is in the book, and committed again later."""
        settler = self.settler
        if is_answered:
            await settler._commit(settler._in_flight)
            settler._in_flight = []
            return
        async with acquire(self.pool) as conn:
            await post_receipts(conn, [settled.receipt for settled in settler._in_flight])

    async def confirm(self) -> None:
        settler = self.settler
        settler._unconfirmed.extendleft(reversed(await settler._confirm_some()))

    async def look_at_epoch(self) -> None:
        """As `gateway.holds` does every second. Raises what the till and the book raise."""
        epoch = self.till.epoch
        if epoch.is_known and not await epoch.has(epoch.number):
            epoch.doubt(epoch.number, is_lost=True)
        if not epoch.is_known:
            await self.till.learn_epoch()

    def _place_again(self) -> None:
        for request in self.requests.values():
            self.till.renew(request.purse.scopes, self._renewal(request, request.hold, is_new=True))
        self.settler.settle_again()
