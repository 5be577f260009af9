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
from billing.errors import TillRefused
from billing.fleet import living
from billing.posting import post_receipts
from billing.prices import Rates
from billing.prices_store import find_rates
from billing.receipts import ChargeReceipt, decode_receipt
from billing.recover import recovered_receipt
from billing.till import Confirmation, SpendScopes, Till, spend_scopes
from billing.till_epoch import SHARDS
from config.clock import Seconds, utc_now

log = logging.getLogger("billing.sweep")

# Leases and outbox entries looked at in one round of one shard; the rest waits for the next.
PER_SHARD_MAX = 2000
BATCH_MAX = 256
CALLS_AT_ONCE = 256
# A live worker renews all that it has open: what it does not renew for this long it forgot.
FORGOTTEN_FACTOR = 4
# Outbox entries whose age is known; beyond it ages begin anew, which only delays.
SEEN_MAX = 200_000
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
        """grace_s: how long a lease must be over; takeover_s: how old an outbox entry must be."""
        self._pool = pool
        self._till = till
        self._grace_ms = int(grace_s * 1000)
        self._takeover_s = takeover_s
        self._seen: dict[str, Seconds] = {}
        self._rates: dict[int, Rates | None] = {}
        self._garbage: set[str] = set()

    async def sweep(self) -> Counter[str]:
        """One round; returns how many holds and outbox entries were ended, by what was done."""
        done: Counter[str] = Counter()
        now_ms = await self._now_ms()
        over, limit = now_ms - self._grace_ms, ("WITHSCORES", "LIMIT", 0, PER_SHARD_MAX)
        calls = [("ZRANGEBYSCORE", f"{prefix}leases", "-inf", over, *limit) for prefix in _PREFIXES]
        for prefix, leases in zip(_PREFIXES, await self._calls(calls), strict=True):
            if leases:
                done += await self._sweep_holds(prefix, leases, now_ms)
        done += await self._take_over()
        return done

    async def _now_ms(self) -> int:
        second, micros = await self._till.link.command(("TIME",))
        return int(second) * 1000 + int(micros) // 1000

    async def _sweep_holds(self, prefix: str, leases: Sequence[bytes], now_ms: int) -> Counter[str]:
        done: Counter[str] = Counter()
        forgotten = now_ms - FORGOTTEN_FACTOR * self._grace_ms
        ends = {
            request_id.decode(): int(score) <= forgotten
            for request_id, score in zip(leases[::2], leases[1::2], strict=True)
        }
        held = await self._read_holds(prefix, ends)
        async with acquire(self._pool) as conn:
            alive = await living(conn, [hold.worker for hold in held])
        for hold in held:
            if hold.worker not in alive or hold.is_old:
                done[await self._end(hold)] += 1
        return done

    async def _read_holds(self, prefix: str, ends: dict[str, bool]) -> list[Held]:
        held = []
        names = list(ends)
        fields = ("state", "nanos", "worker", "draft")
        calls = [("HMGET", f"{prefix}h:{request_id}", *fields) for request_id in names]
        for request_id, found in zip(names, await self._calls(calls), strict=True):
            if found[1] is None:
                # It ended just now, unless this is a lease without a hold, which holds nothing.
                await self._till.drop_lease(prefix, request_id)
                continue
            draft = self._receipt(request_id, found[3])
            if draft is not None:
                state, nanos, worker = found[0].decode(), int(found[1]), found[2].decode()
                is_old = ends[request_id]
                held.append(Held(request_id, state, nanos, worker, draft, is_old))
        return held

    async def _calls(self, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        found: list[Any] = []
        for start in range(0, len(calls), CALLS_AT_ONCE):
            part = calls[start : start + CALLS_AT_ONCE]
            found += await asyncio.gather(*map(self._till.link.command, part))
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
        keys = [f"{prefix}outbox" for prefix in _PREFIXES]
        calls = [("HSCAN", key, b"0", "COUNT", 500) for key in keys]
        for key, first in zip(keys, await self._calls(calls), strict=True):
            entries = await self._read_outbox(key, first)
            present.update(entries)
            receipts = [
                receipt
                for request_id, value in entries.items()
                if self._is_due(request_id)
                and (receipt := self._receipt(request_id, value.partition(b" ")[2])) is not None
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
        if len(self._seen) > SEEN_MAX:
            self._seen.clear()
        return now - self._seen.setdefault(request_id, now) >= self._takeover_s

    async def _post(self, receipts: Sequence[ChargeReceipt]) -> int:
        try:
            async with acquire(self._pool) as conn:
                states = await post_receipts(conn, receipts)
        except BookRefused as exc:
            if len(receipts) == 1:
                self._say_once(receipts[0].source_reference, exc.reason)
                return 0
            return sum([await self._post([receipt]) for receipt in receipts])
        by_account: dict[Any, list[tuple[SpendScopes, str]]] = {}
        for receipt in receipts:
            entry = (scopes_of(receipt), receipt.source_reference)
            by_account.setdefault(receipt.billing_account_id, []).append(entry)
        for state in states:
            entries = by_account[state.account_id]
            await self._till.confirm(Confirmation(state=state, receipts=entries))
        return len(receipts)

    def _receipt(self, request_id: str, raw: bytes | None) -> ChargeReceipt | None:
        try:
            return decode_receipt(raw or b"")
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            self._say_once(request_id, str(exc))
            return None

    def _say_once(self, request_id: str, reason: str) -> None:
        if request_id not in self._garbage and len(self._garbage) < SEEN_MAX:
            self._garbage.add(request_id)
            log.error("sweep.unreadable", extra={"request_id": request_id, "reason": reason})


def scopes_of(receipt: ChargeReceipt) -> SpendScopes:
    """The scopes that a request was held on: its receipt names their owners."""
    key_id = receipt.app_key_id or receipt.virtual_key_id
    return spend_scopes(receipt.billing_account_id, key_id, account_open_max=0, key_open_max=0)
