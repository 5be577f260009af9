"""The till: what may be spent right now, kept in Valkey/Redis by the scripts in `lua/`.

It can be lost at any moment: scopes are seeded from the book on first use, and nothing that
somebody pays for is only here.
Failure: TillUnavailable when it does not answer within two tries; the request is then refused.
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from importlib import resources
from typing import Any, NoReturn
from uuid import UUID

import msgspec

from billing.errors import (
    AccountFrozen,
    BookUnavailable,
    InsufficientCredit,
    KeyLimitReached,
    KeyRevoked,
    TillRebuilding,
    TillRefused,
    TillUnavailable,
    TooManyOpenRequests,
)
from billing.money import NANOS_MAX
from billing.receipts import ChargeReceipt, encode_receipt
from billing.single_flight import SingleFlight
from billing.standing import Standings, read_standings
from billing.till_epoch import AccountState, SpendState, TillBook, TillEpoch
from billing.till_link import Arg, Script, TillLink
from billing.till_rates import OVER_RATE, over_rate, rate_script
from billing.till_scopes import BudgetScope, SpendScopes, account_scope_key, shard_prefix
from billing.till_wire import Packed, Renewal, words
from config.clock import Seconds

log = logging.getLogger("billing.till")
# A refusal for want of credit asks the book first, but not more often than this for an account.
REFRESH_EVERY_MS = 1000
REFRESH_REMEMBERED_MAX = 10_000
# The first answer may be lost, then cold, also of a budget, then short: each is mended once.
ADMIT_TRIES = 6
_PLACED = frozenset((b"admitted", b"exists"))
_OF_NO_EPOCH = frozenset((b"epoch", b"lost"))


def _script(name: str) -> Script:
    source = resources.files("billing").joinpath("lua", f"{name}.lua").read_text("utf-8")
    return Script(name, source)


class Scripts:
    """All scripts, read once."""

    def __init__(self) -> None:
        self.admit = _script("admit_v3")
        self.forwarded = _script("forwarded_v1")
        self.settle = _script("settle_v2")
        self.confirm = _script("confirm_v1")
        self.seed = _script("seed_v3")
        self.renew = _script("renew_v1")
        self.sweep = _script("sweep_v1")
        self.shard = _script("shard_v2")
        self.rate = rate_script()

    def all(self) -> list[Script]:
        return list(vars(self).values())


class Confirmation(msgspec.Struct, frozen=True, kw_only=True):
    """What a commit returned for one account: its new state and the receipts that are in."""

    state: AccountState
    receipts: list[tuple[SpendScopes, str]]
    budgets: Mapping[str, SpendState] = {}
    """Of the budgets among their scopes, and maybe of others, by their keys."""


class Till:
    """The scripts as functions. One for each worker."""

    def __init__(
        self,
        link: TillLink,
        scripts: Scripts,
        book: TillBook,
        *,
        worker: str,
        lease_ms: int,
        rebuild_ms: int = 2000,
    ) -> None:
        self.link = link
        self.worker = worker
        self.epoch = TillEpoch(link, scripts.shard, book, rebuild_ms=rebuild_ms)
        self._scripts = scripts
        self._lease_ms = lease_ms
        self._lease_and_worker = words((lease_ms, worker)).encode()
        self._book = book
        self._reading = SingleFlight(_look_at)
        self._refreshed_ms: dict[UUID, int] = {}

    async def admit(
        self, scopes: SpendScopes, request_id: str, hold_nanos: int, draft: bytes, tokens: int = 0
    ) -> Standings | None:
        """Place hold_nanos on every scope of the request, or on none.

        tokens: what it takes of limits per minute until it is settled; returns how these stand, if
        there are any. The same request id again gives the same answer. Raises InsufficientCredit,
        RateLimited, TooManyOpenRequests, AccountFrozen or KeyRevoked; TillUnavailable when there
        was no answer (the hold may exist: settle the request with price 0).
        """
        assert 0 <= hold_nanos <= NANOS_MAX
        hold = (hold_nanos, tokens)
        for _ in range(ADMIT_TRIES):
            epoch = self.epoch.number if self.epoch.is_known else await self._epoch_for_hold()
            packed = scopes.wire.admit(request_id, epoch, hold, self._lease_and_worker, draft)
            asked_at = time.monotonic()
            try:
                reply = await self.link.send(self._scripts.admit, packed)
            except TillUnavailable as exc:
                reply = await self._ask_again(packed, asked_at, exc)
            if reply[0] in _PLACED:
                return read_standings(reply[3]) if scopes.wire.is_rated else None
            if reply[0] in _OF_NO_EPOCH:
                self.epoch.doubt(epoch, is_lost=reply[0] == b"lost")
            elif reply[0] in OVER_RATE:
                raise over_rate(scopes, reply)
            else:
                await self._mend(scopes, hold_nanos, reply)
        # Every answer was a plain no: nothing is held.
        raise TillUnavailable(asked=False)

    async def _epoch_for_hold(self) -> int:
        try:
            return await self.learn_epoch()
        except TillUnavailable as exc:
            exc.asked = False  # about a hold nothing was asked yet
            raise

    async def _ask_again(self, packed: Packed, asked_at: Seconds, first: TillUnavailable) -> Any:
        """Admit once more when there was no answer: two call timeouts in all."""
        if not await self.link.wait_up(asked_at + self.link.call_timeout_s - time.monotonic()):
            raise first
        try:
            return await self.link.send(self._scripts.admit, packed)
        except TillUnavailable as exc:
            exc.asked |= first.asked
            raise

    async def _mend(self, scopes: SpendScopes, hold_nanos: int, reply: list[Any]) -> None:
        """Mend what kept a hold from being placed; raise when it is a refusal that stands."""
        status, index, nanos = reply[0].decode(), reply[1], reply[2]
        if status == "cold":
            await (
                self.seed_from_book(scopes.account_id) if index == 1 else self.seed_budget(scopes)
            )
        elif index > 1 or not await self._refreshed(status, scopes.account_id):
            _refuse(status, scopes, index, hold_nanos, nanos)

    async def trace(self, scopes: SpendScopes, request_id: str) -> tuple[int, bool]:
        """The epoch of the content (0: there is none), and whether a request is in it.

        Raises TillUnavailable or TillRefused.
        """
        # In this order: what is settled in between is found in the outbox, unless it is confirmed,
        # and then the book has it.
        epoch, hold, entry = await asyncio.gather(
            self.link.command(("GET", scopes.epoch_key)),
            self.link.command(("EXISTS", scopes.hold_prefix + request_id)),
            self.link.command(("HEXISTS", scopes.outbox_key, request_id)),
        )
        return int(epoch or 0), bool(hold or entry)

    def forwarded(self, scopes: SpendScopes, request_id: str) -> None:
        """Mark the hold as forwarded, on the wire when this returns; the reply is not awaited."""
        self._send_forwarded(scopes, request_id)
        self.link.flush()

    def forwarded_soon(self, scopes: SpendScopes, request_id: str) -> asyncio.Future[None]:
        """Mark the hold as forwarded with the other calls of this tick; the reply is not awaited.

        The future is the caller's own. It is done when the mark was handed to the connection, or
        when there is none: it never fails.
        """
        self._send_forwarded(scopes, request_id)
        return self.link.flushed()

    def _send_forwarded(self, scopes: SpendScopes, request_id: str) -> None:
        self.link.send(self._scripts.forwarded, scopes.wire.forwarded(request_id), tells=True)

    def settle(
        self, scopes: SpendScopes, request_id: str, price_nanos: int, receipt: bytes
    ) -> asyncio.Future[Any]:
        """End the hold with its price; the receipt waits in the outbox for the book.

        Returns at once; the future gives [status, available nanos] or fails with
        TillUnavailable / TillRefused. Safe to repeat until the receipt is confirmed.
        """
        assert 0 <= price_nanos <= NANOS_MAX
        packed = scopes.wire.settle(request_id, price_nanos, receipt)
        return self.link.send(self._scripts.settle, packed, tells=True)

    def renew(self, scopes: SpendScopes, renewal: Renewal) -> asyncio.Future[Any]:
        """Say that a request goes on. Begun when this returns; safe to repeat.

        The future gives [status, nanos held, nanos available]: see renew_v1.lua. It fails with
        TillUnavailable or TillRefused.
        """
        assert 0 <= renewal.hold_nanos <= NANOS_MAX
        keys = (scopes.epoch_key, scopes.outbox_key, scopes.leases_key)
        holds = (scopes.hold_prefix + renewal.request_id, *scopes.scope_keys)
        most = scopes.budget.limit_nanos if scopes.budget is not None else 0
        limits: list[Arg] = [
            part for kind in scopes.kinds for part in (kind, most if kind == "B" else 0)
        ]
        state = "F" if renewal.is_forwarded else "H"
        worker = self.worker if renewal.is_new else ""
        request: list[Arg] = [self.epoch.number, renewal.request_id, self._lease_ms, state]
        wanted: list[Arg] = [renewal.draft, renewal.hold_nanos, worker]
        args = (*request, *wanted, *limits)
        return self.link.run(self._scripts.renew, (*keys, *holds), args)

    def sweep(
        self, scopes: SpendScopes, receipt: ChargeReceipt, state: str, over_ms: int
    ) -> asyncio.Future[Any]:
        """End the hold of a worker that died, with the receipt made from what it wrote down.

        state: the hold's, as it was seen; over_ms: how long its lease must be over. The future
        gives a word: see sweep_v1.lua. It fails with TillUnavailable or TillRefused.
        """
        request_id, price = receipt.source_reference, receipt.price_nanos
        keys = (scopes.outbox_key, scopes.hold_prefix + request_id, scopes.leases_key)
        entry = b"%d %b" % (price, encode_receipt(receipt))
        args: list[Arg] = [request_id, over_ms, state, price, entry, *scopes.kinds]
        return self.link.run(self._scripts.sweep, (*keys, *scopes.scope_keys), args)

    def drop_lease(self, prefix: str, request_id: str) -> asyncio.Future[Any]:
        """Forget the lease of a hold that is gone, unless it is placed again meanwhile.

        prefix: of the shard. The future gives the word of a `sweep` that ends no state of a hold.
        """
        keys = (f"{prefix}outbox", f"{prefix}h:{request_id}", f"{prefix}leases")
        return self.link.run(self._scripts.sweep, keys, (request_id, 0, "", 0, ""))

    def confirm(self, confirmation: Confirmation) -> asyncio.Future[Any]:
        """Drop committed receipts from the outbox and take over the account's new state.

        Begun when this returns; the future fails with TillUnavailable or TillRefused.
        """
        first = confirmation.receipts[0][0]
        places: dict[str, int] = {first.scope_keys[0]: 1}
        news: list[Arg] = ["A", confirmation.state.balance_nanos, confirmation.state.version]
        holds: list[Arg] = []
        entries: list[Arg] = []
        for scopes, request_id in confirmation.receipts:
            for key, kind in zip(scopes.scope_keys, scopes.kinds, strict=True):
                if key not in places:
                    places[key] = len(places) + 1
                    told = confirmation.budgets.get(key)
                    news += [kind, "", ""] if told is None else [kind, *_said(told)]
            holds.append(scopes.hold_prefix + request_id)
            entries += [request_id, ",".join(str(places[key]) for key in scopes.scope_keys)]
        keys = (first.outbox_key, first.leases_key, *places, *holds)
        return self.link.run(self._scripts.confirm, keys, (len(places), *news, *entries))

    async def seed_from_book(self, account_id: UUID) -> None:
        """Tell the till what the book says of an account; many callers share one reading."""

        async def read_and_seed() -> None:
            # Older than the reading: what was confirmed in between to a till that was lost is
            # in no other place than the book.
            epoch = await self._known_epoch()
            await self._seed(await self._book.read_account(account_id), epoch)
            # crash-point: seed.done

        await self._reading.run(account_id, read_and_seed)

    async def seed_all(self, scopes: SpendScopes) -> None:
        """The same for every scope of a request that has money."""
        await self.seed_from_book(scopes.account_id)
        if scopes.budget is not None:
            await self.seed_budget(scopes)

    async def seed_budget(self, scopes: SpendScopes) -> None:
        """Tell the till what the book says of a budget, once for all who ask for it."""
        budget = scopes.budget
        assert budget is not None

        async def read_and_seed() -> None:
            epoch = await self._known_epoch()  # older than the reading, as for accounts
            state = await self._book.read_budget(budget)
            keys = (scopes.epoch_key, scopes.scope_keys[-1])
            args = (epoch, *_said(state), "", _ends_s(budget))
            if await self.link.run(self._scripts.seed, keys, args) == b"epoch":
                self.epoch.doubt(epoch)

        await self._reading.run(scopes.scope_keys[-1], read_and_seed)

    async def seed(self, state: AccountState) -> None:
        """Write the book's state of an account unless the till's is as new. Idempotent."""
        await self._seed(state, await self._known_epoch())

    async def _known_epoch(self) -> int:
        return self.epoch.number if self.epoch.is_known else await self.learn_epoch()

    async def _seed(self, state: AccountState, epoch: int) -> None:
        keys = (f"{shard_prefix(state.account_id)}epoch", account_scope_key(state.account_id))
        args = (epoch, state.balance_nanos, state.version, state.status, "")
        if await self.link.run(self._scripts.seed, keys, args) == b"epoch":
            self.epoch.doubt(epoch)

    async def learn_epoch(self) -> int:
        """The epoch that is valid now. Raises TillRebuilding while the till is being rebuilt."""
        asked_at = time.monotonic()
        try:
            return await self._reading.run("epoch", self.epoch.learn)
        except TillRebuilding:
            raise
        except TillUnavailable:
            if not await self.link.wait_up(asked_at + self.link.call_timeout_s - time.monotonic()):
                raise
        return await self._reading.run("epoch", self.epoch.learn)

    async def _refreshed(self, status: str, account_id: UUID) -> bool:
        """Ask the book whether a refusal still holds; False when it was asked or is away.

        Credit may have come in, or the account been thawed, without the till being told.
        """
        return status in {"short", "frozen"} and await self.refresh(account_id)

    async def refresh(self, account_id: UUID) -> bool:
        """Tell the till what the book says now; False when it was just asked, or is away.

        While it is being asked, whoever else wants to know waits for the same answer.
        """
        if not self._reading.is_running(account_id) and not self._may_refresh(account_id):
            return False
        try:
            await self.seed_from_book(account_id)
        except BookUnavailable:
            return False
        return True

    def _may_refresh(self, account_id: UUID) -> bool:
        now_ms = int(asyncio.get_running_loop().time() * 1000)
        if now_ms - self._refreshed_ms.get(account_id, -REFRESH_EVERY_MS) < REFRESH_EVERY_MS:
            return False
        if len(self._refreshed_ms) >= REFRESH_REMEMBERED_MAX:
            self._refreshed_ms.clear()
        self._refreshed_ms[account_id] = now_ms
        return True


def _refuse(status: str, scopes: SpendScopes, index: int, needed: int, nanos: int) -> NoReturn:
    if status == "short":
        _refuse_short(scopes, index, needed, nanos)
    if status == "busy":
        scope = "account" if index == 1 else "key"
        raise TooManyOpenRequests(scope=scope, limit=scopes.limits[index - 1].open_requests)
    if status == "frozen":
        raise AccountFrozen
    if status == "revoked":
        raise KeyRevoked
    raise TillRefused(status)


def _refuse_short(scopes: SpendScopes, index: int, needed: int, nanos: int) -> NoReturn:
    budget = scopes.budget
    if index == 1 or budget is None:
        raise InsufficientCredit(needed_nanos=needed, available_nanos=nanos)
    raise KeyLimitReached(
        needed_nanos=needed,
        available_nanos=nanos,
        limit_nanos=budget.limit_nanos,
        resets_at=budget.ends_at,
    )


def _said(state: SpendState) -> tuple[int, int]:
    return state.spent_nanos, state.version


def _ends_s(budget: BudgetScope) -> int:
    """When its window ends, in seconds since 1970; 0: never."""
    ends_at = budget.ends_at
    return 0 if ends_at is None else int(ends_at.timestamp())


def _look_at(future: asyncio.Future[Any]) -> None:
    """Take note of a failure that nobody may await."""
    if not future.cancelled() and isinstance(future.exception(), TillRefused):
        log.error("till.refused", extra={"reply": getattr(future.exception(), "reply", "")})
