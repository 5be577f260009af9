"""Rebuild a till that an operator does not trust: from its holds, its outbox and the book.

A new epoch begins, the shards close for new holds, live workers place what they have open again,
and each shard's scopes become what its holds and outbox say; what the book says is read anew on
first use. Requests under way go on. What cannot be read is set aside, never dropped.
Failure: RebuildRefused; TillUnavailable, TillRefused, BookUnavailable. It may be begun again at any
time; when it ends half way, the workers open the shards by themselves.
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from importlib import resources
from typing import Any

import msgspec

from billing.book import Connection
from billing.errors import BillingError
from billing.fleet import REBUILD_LOCK, begin_epoch, is_leader, move_epoch, say_alive, say_gone
from billing.till_entries import KINDS, Shard, owners_of
from billing.till_epoch import SHARDS, epoch_key
from billing.till_scan import TillScan, open_till
from billing.till_status import epochs_of, run_id_of
from config.clock import seconds
from config.ids import id_text, new_id

# Longer than one shard takes, and shorter than anybody wants to wait after a kill.
KEEP_CLOSED_MS = 30_000
# Shards change while requests end; no new ones come, so soon they do not.
TRIES = 50
TRY_AGAIN_S = seconds(20)


class RebuildRefused(BillingError):
    """The till cannot be rebuilt now."""

    def __init__(self, *, reason: str) -> None:
        super().__init__()
        self.reason = reason


class Rebuilt(msgspec.Struct, kw_only=True):
    """What was done."""

    epoch: int
    shards: int = 0
    holds: int = 0
    outbox: int = 0
    wrong_scopes: int = 0
    set_aside: list[str] = []


async def rebuild(
    conn: Connection, till_url: str, *, wait_ms: int, say: Callable[[str], None]
) -> Rebuilt:
    """Do it; conn is the caller's own. wait_ms: for live workers to place their holds again."""
    if not await is_leader(conn, REBUILD_LOCK):
        raise RebuildRefused(reason="somebody else rebuilds it")
    async with open_till(till_url) as till:
        rebuilding = _Rebuilding(conn, till, wait_ms, say)
        return await rebuilding.run()


class _Rebuilding:
    def __init__(
        self, conn: Connection, till: TillScan, wait_ms: int, say: Callable[[str], None]
    ) -> None:
        self._conn = conn
        self._till = till
        self._wait_ms = wait_ms
        self._say = say
        self._name = f"rebuild_{id_text(new_id())}"
        self._source = (
            resources.files("billing").joinpath("lua", "rebuild_v1.lua").read_text("utf-8")
        )
        self._done = Rebuilt(epoch=0)
        self._began_at = time.monotonic()

    async def run(self) -> Rebuilt:
        # Workers wait as long as they see another one live in an epoch that is young.
        await say_alive(self._conn, self._name)
        try:
            others = await self._begin()
            if others:
                self._say(f"{others} workers place their holds again")
                await asyncio.sleep(seconds(self._wait_ms))
            async for shard in self._till.shards(await self._till.patterns()):
                await self._mend(shard)
            await self._open()
        except BaseException:
            # Nobody needs to wait for us any more.
            await move_epoch(self._conn, self._done.epoch, 0)
            raise
        finally:
            await say_gone(self._conn, self._name)
        return self._done

    async def _begin(self) -> int:
        """Close everything; returns how many workers live."""
        epochs = await self._till.run_all([("GET", epoch_key(n)) for n in range(SHARDS)])
        newest = max(map(abs, epochs_of(epochs)), default=0)
        (told,) = await self._till.run_all([("INFO", "server")])
        server = run_id_of(told)
        self._began_at = time.monotonic()
        epoch = await begin_epoch(self._conn, newest, server, KEEP_CLOSED_MS, self._name)
        self._done.epoch = epoch.number
        self._say(f"epoch {epoch.number} begins: new requests are refused")
        # Closed for it, as shard_v2.lua would: a shard without a number was emptied.
        await self._till.run_all([("SET", epoch_key(n), -epoch.number) for n in range(SHARDS)])
        return epoch.others

    async def _open(self) -> None:
        # When it really began: whoever asks what the till may have lost since goes by that.
        await self._let_begin(-int((time.monotonic() - self._began_at) * 1000))
        number = self._done.epoch
        answers = await self._till.run_all([("SET", epoch_key(n), number) for n in range(SHARDS)])
        for answer in answers:
            if isinstance(answer, Exception):
                raise RebuildRefused(reason=f"a shard cannot be opened: {answer}")

    async def _let_begin(self, from_now_ms: int) -> None:
        await say_alive(self._conn, self._name)
        if not await move_epoch(self._conn, self._done.epoch, from_now_ms):
            raise RebuildRefused(reason="the till was lost meanwhile: begin again")

    async def _mend(self, shard: Shard) -> None:
        for _ in range(TRIES):
            await self._let_begin(KEEP_CLOSED_MS)
            if shard.is_cut:
                raise RebuildRefused(
                    reason=f"too much waits in shard {shard.name}: is Postgres up?"
                )
            keys, args, aside = _words(shard, self._done.epoch)
            reply = await self._till.run("EVAL", self._source, len(keys), *keys, *args)
            if reply[0] == b"mended":
                self._done.shards += 1
                self._done.wrong_scopes += reply[1]
                self._done.holds += len(_readable(shard))
                self._done.outbox += len(shard.outbox) - len(shard.odd_entries)
                self._done.set_aside += aside
                return
            await asyncio.sleep(TRY_AGAIN_S)
            shard = await self._till.shard(shard.name)
        raise RebuildRefused(reason=f"shard {shard.name} keeps changing")


def _readable(shard: Shard) -> list[str]:
    odd = {key.decode("utf-8", "backslashreplace") for key in shard.odd_keys}
    return [name for name in shard.holds if f"{shard.prefix}h:{name}" not in odd]


def _words(shard: Shard, epoch: int) -> tuple[list[Any], list[Any], list[str]]:
    """Keys and arguments of the script, and what is set aside under which name."""
    aside = f"{shard.prefix}odd:{epoch}:"
    odd_entries = {field.decode("utf-8", "backslashreplace") for field in shard.odd_entries}
    holds = _readable(shard)
    entries: list[str | bytes] = [name for name in shard.outbox if name not in odd_entries]
    sums = _sums(shard, holds, (name for name in shard.outbox if name not in odd_entries))
    moved = [part for key in shard.odd_keys for part in (key, aside.encode() + _last(shard, key))]
    keys: list[Any] = [f"{shard.prefix}outbox", f"{shard.prefix}leases", f"{aside}outbox"]
    keys += [f"{shard.prefix}{name}" for name in sums]
    keys += [f"{shard.prefix}h:{name}" for name in holds]
    keys += moved
    every_entry = [*entries, *shard.odd_entries]
    counts = (len(sums), len(holds), len(shard.odd_keys), len(every_entry), len(shard.odd_entries))
    args: list[Any] = [*counts, f"{shard.prefix}h:"]
    args += [word for name, scope in sums.items() for word in (name[0].upper(), *scope)]
    args += [word for name in holds for word in (name, shard.holds[name].nanos)]
    args += every_entry
    names = [new.decode("utf-8", "backslashreplace") for new in moved[1::2]]
    names += [f"{aside}outbox {name}" for name in sorted(odd_entries)]
    return keys, args, names


def _last(shard: Shard, key: bytes) -> bytes:
    return key[len(shard.prefix) :]


def _sums(shard: Shard, holds: Iterable[str], entries: Iterable[str]) -> dict[str, list[int]]:
    """For each scope of the shard, by its name, what it must be: held, uncommitted, open."""
    sums = {scope.name: [0, 0, 0] for kind in KINDS for scope in shard.scopes(kind)}
    for name in holds:
        hold = shard.holds[name]
        assert hold.draft is not None  # else it is odd
        for owner in owners_of(hold.draft):
            amounts = sums.setdefault(owner.name, [0, 0, 0])
            amounts[0] += hold.nanos if owner.has_money else 0
            amounts[2] += 1
    for name in entries:
        entry = shard.outbox[name]
        assert entry.receipt is not None  # else it is odd
        for owner in owners_of(entry.receipt):
            amounts = sums.setdefault(owner.name, [0, 0, 0])
            amounts[1] += entry.price_nanos if owner.has_money else 0
    return sums
