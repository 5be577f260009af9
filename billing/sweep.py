"""The sweeper: ends what dead workers left open, and posts what nobody posted.

Any instance can do it, several at once too: every step is a script or a commit that meets what
another did in the same key. It works through the till shard by shard.
Failure: TillUnavailable and BookUnavailable end a round; the next one does it all again. What
cannot be read is logged and left for an operator.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec

from billing.book import BookRefused, Pool, acquire
from billing.budgets import read_budgets
from billing.errors import TillRefused
from billing.fleet import living
from billing.posting import post_receipts
from billing.prices import Rates
from billing.prices_store import find_rates
from billing.receipt_scopes import scopes_of
from billing.receipts import ChargeReceipt, decode_receipt
from billing.recover import recovered_receipt
from billing.till import Confirmation, Till
from billing.till_epoch import SHARDS
from billing.till_scopes import SpendScopes, shard_prefix
from config.clock import Seconds, utc_now

log = logging.getLogger("billing.sweep")

# Leases and outbox entries looked at in one round of one shard; the rest waits for the next.
PER_SHARD_MAX = 2000
BATCH_MAX = 256
CALLS_AT_ONCE = 256
# A live worker renews all that it has open: what it does not renew for this long it forgot.
FORGOTTEN_FACTOR = 4
# Outbox entries whose age is known. Those beyond it wait until some of these are posted.
SEEN_MAX = 200_000
STATES = {b"H", b"F"}
_PREFIXES = [f"fb:{{s{shard:02x}}}:" for shard in range(SHARDS)]


class Held(msgspec.Struct, frozen=True):
    """A hold as the sweeper saw it."""

    request_id: str
    state: str
    nanos: int
    worker: str
    draft: ChargeReceipt
    is_old: bool


class Sweeper:
    """One sweeper and what it remembers between rounds."""

    def __init__(self, pool: Pool, till: Till, *, grace_s: Seconds, takeover_s: Seconds) -> None:
        """grace_s: how long a lease must be over under our eyes; takeover_s: how old an outbox
        entry must be."""
        self._pool = pool
        self._till = till
        self._grace_s = grace_s
        self._grace_ms = int(grace_s * 1000)
        # Leases that are over: what they say, and since when we know.
        self._lapsed: dict[bytes, tuple[bytes, Seconds]] = {}
        self._lapsed_now: dict[bytes, tuple[bytes, Seconds]] = {}
        self._takeover_s = takeover_s
        self._seen: dict[str, Seconds] = {}
        self._rates: dict[int, Rates | None] = {}
        self._garbage: set[str] = set()

    async def sweep(self) -> Counter[str]:
        """One round; returns how many holds and outbox entries were ended, by what was done."""
        done: Counter[str] = Counter()
        now_ms = await self._now_ms()
        limit = ("WITHSCORES", "LIMIT", 0, PER_SHARD_MAX)
        key = "{}leases".format
        calls = [("ZRANGEBYSCORE", key(name), "-inf", now_ms, *limit) for name in _PREFIXES]
        for prefix, leases in zip(_PREFIXES, await self._calls(calls), strict=True):
            if leases:
                done += await self._sweep_holds(prefix, leases)
        self._lapsed, self._lapsed_now = self._lapsed_now, {}
        done += await self._take_over()
        return done

    async def _now_ms(self) -> int:
        second, micros = await self._till.link.command(("TIME",))
        return int(second) * 1000 + int(micros) // 1000

    async def _sweep_holds(self, prefix: str, leases: Sequence[bytes]) -> Counter[str]:
        done: Counter[str] = Counter()
        watched = {
            name: self._watched_s(name, score)
            for name, score in zip(leases[::2], leases[1::2], strict=True)
        }
        forgotten_s = FORGOTTEN_FACTOR * self._grace_s
        ends = {name: s >= forgotten_s for name, s in watched.items() if s >= self._grace_s}
        held = await self._read_holds(prefix, ends)
        if not held:
            return done
        async with acquire(self._pool) as conn:
            alive = await living(conn, [hold.worker for hold in held])
        # crash-point: sweep.read
        for hold in held:
            if hold.worker not in alive or hold.is_old:
                done[await self._end(hold)] += 1
        return done

    def _watched_s(self, name: bytes, score: bytes) -> Seconds:
        """For how long we have watched this lease being over, by our own clock.

        A till, or till and book, that were away come back with leases that nobody could renew and
        workers that could not say that they live: that time must not count.
        """
        now = time.monotonic()
        known, since = self._lapsed.get(name, (b"", now))
        if known != score:
            since = now
        self._lapsed_now[name] = (score, since)
        return now - since

    async def _read_holds(self, prefix: str, ends: dict[bytes, bool]) -> list[Held]:
        held = []
        fields = ("state", "nanos", "worker", "draft")
        calls = [("HMGET", f"{prefix}h:".encode() + name, *fields) for name in ends]
        for name, found in zip(ends, await self._calls(calls), strict=True):
            if found is None:
                continue
            if not any(found):
                # It ended just now, unless this is a lease without a hold, which holds nothing.
                await self._drop_lease(prefix, name.decode("utf-8", "replace"))
                continue
            state, nanos, worker, raw = found
            request_id = name.decode("utf-8", "replace")
            draft = self._receipt(prefix, request_id, raw)
            if draft is None:
                continue
            if state not in STATES or not (nanos or b"").isdigit():
                self._say_once(request_id, "a hold without a state or a size")
                continue
            holder = (worker or b"").decode("utf-8", "replace")
            held.append(Held(request_id, state.decode(), int(nanos), holder, draft, ends[name]))
        return held

    async def _drop_lease(self, prefix: str, request_id: str) -> None:
        try:
            await self._till.drop_lease(prefix, request_id)
        except TillRefused as exc:
            # Another key of the shard is broken: that must not end the round for all the others.
            self._say_once(request_id, exc.reply)

    async def _calls(self, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The replies; None for a key that is nothing that the scripts make: it is said, once."""
        found: list[Any] = []
        for start in range(0, len(calls), CALLS_AT_ONCE):
            part = calls[start : start + CALLS_AT_ONCE]
            replies = await asyncio.gather(
                *map(self._till.link.command, part), return_exceptions=True
            )
            for (_, key, *_), reply in zip(part, replies, strict=True):
                if isinstance(reply, TillRefused):
                    self._say_once(str(key), reply.reply)
                    found.append(None)
                elif isinstance(reply, BaseException):
                    raise reply
                else:
                    found.append(reply)
        return found

    async def _end(self, hold: Held) -> str:
        """Move the hold into the outbox with its receipt; returns what the till said."""
        receipt = recovered_receipt(
            hold.draft,
            is_forwarded=hold.state == "F",
            held_nanos=hold.nanos,
            rates=await self._rates_of(hold.draft.price_version),
            now=utc_now(),
        )
        try:
            reply = await self._till.sweep(scopes_of(receipt), receipt, hold.state, self._grace_ms)
        except TillRefused as exc:
            log.error(
                "hold.sweep_refused", extra={"request_id": hold.request_id, "reply": exc.reply}
            )
            return "refused"
        # crash-point: sweep.ended
        word = str(reply, "ascii")
        if word == "swept":
            # Posted in this very round.
            self._seen[hold.request_id] = time.monotonic() - self._takeover_s
            facts = {"request_id": f"req_{hold.request_id}", "worker": hold.worker}
            log.warning("hold.swept", extra={**facts, "outcome": receipt.outcome})
            return str(receipt.outcome)
        return word

    async def _rates_of(self, version: int | None) -> Rates | None:
        if version is None:
            return None
        if version not in self._rates:
            async with acquire(self._pool) as conn:
                self._rates[version] = await find_rates(conn, version)
        return self._rates[version]

    async def _take_over(self) -> Counter[str]:
        """Post every outbox entry that is there for too long, whoever settled it."""
        done: Counter[str] = Counter()
        present: set[str] = set()
        calls = [("HSCAN", f"{prefix}outbox", b"0", "COUNT", 500) for prefix in _PREFIXES]
        for prefix, first in zip(_PREFIXES, await self._calls(calls), strict=True):
            if first is None:
                continue
            entries = await self._read_outbox(f"{prefix}outbox", first)
            present.update(entries)
            receipts = [
                receipt
                for name, value in entries.items()
                if self._is_due(name)
                and (receipt := self._receipt(prefix, name, value.partition(b" ")[2])) is not None
            ]
            for start in range(0, len(receipts), BATCH_MAX):
                done["posted"] += await self._post(receipts[start : start + BATCH_MAX])
        self._seen = {name: at for name, at in self._seen.items() if name in present}
        return done

    async def _read_outbox(self, key: str, first: Sequence[Any]) -> dict[str, bytes]:
        entries: dict[str, bytes] = {}
        cursor, found = first
        while True:
            entries |= {
                name.decode("utf-8", "replace"): value
                for name, value in zip(found[::2], found[1::2], strict=True)
            }
            if cursor == b"0" or len(entries) > PER_SHARD_MAX:
                return entries
            cursor, found = await self._till.link.command(("HSCAN", key, cursor, "COUNT", 500))

    def _is_due(self, request_id: str) -> bool:
        """Ages are ours, from the first time we saw it: no two clocks are compared."""
        now = time.monotonic()
        if len(self._seen) >= SEEN_MAX and request_id not in self._seen:
            return False
        return now - self._seen.setdefault(request_id, now) >= self._takeover_s

    async def _post(self, receipts: Sequence[ChargeReceipt]) -> int:
        # crash-point: takeover.begin
        try:
            await self.post(receipts)
        except BookRefused as exc:
            if len(receipts) == 1:
                self._say_once(receipts[0].source_reference, exc.reason)
                return 0
            return sum([await self._post([receipt]) for receipt in receipts])
        return len(receipts)

    async def post(self, receipts: Sequence[ChargeReceipt]) -> None:
        """Post receipts that are not this process's own, and tell the till what the book says now.

        Raises what the book raises, and TillUnavailable: to do it again is right in any case.
        """
        async with acquire(self._pool) as conn:
            states = await post_receipts(conn, receipts)
            scopes = [scopes_of(receipt) for receipt in receipts]
            budgets = await read_budgets(conn, scopes)
        # crash-point: takeover.done
        by_account: dict[Any, list[tuple[SpendScopes, str]]] = {}
        for receipt, held_on in zip(receipts, scopes, strict=True):
            entry = (held_on, receipt.source_reference)
            by_account.setdefault(receipt.billing_account_id, []).append(entry)
        for state in states:
            entries = by_account[state.account_id]
            try:
                confirmation = Confirmation(state=state, receipts=entries, budgets=budgets)
                await self._till.confirm(confirmation)
            except TillRefused as exc:
                # They are in the book; the till keeps its entries until somebody mends it.
                self._say_once(entries[0][0].scope_keys[0], exc.reply)
            # crash-point: takeover.confirmed

    def _receipt(self, prefix: str, request_id: str, raw: bytes | None) -> ChargeReceipt | None:
        """The receipt of this very request, or None: then it is said, once."""
        try:
            receipt = decode_receipt(raw or b"")
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            self._say_once(request_id, str(exc))
            return None
        if receipt.source_reference != request_id:
            self._say_once(request_id, f"of request {receipt.source_reference}")
            return None
        if shard_prefix(receipt.billing_account_id) != prefix:
            self._say_once(request_id, "of an account of another shard")
            return None
        return receipt

    def _say_once(self, request_id: str, reason: str) -> None:
        if request_id not in self._garbage and len(self._garbage) < SEEN_MAX:
            self._garbage.add(request_id)
            log.error("sweep.unreadable", extra={"request_id": request_id, "reason": reason})
