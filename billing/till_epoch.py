"""The epoch: which generation of the till's content this worker works with, and how it is learnt.

A till that was emptied, restarted or replaced has lost something, so its epoch ends: one worker
ends it in the book, every worker places its open holds again, then the shards open for new holds
and scopes are seeded anew. Until then nothing new is admitted; open requests go on.
Failure: TillUnavailable while the till is away, TillRebuilding; what the book raises.
"""

import asyncio
import logging
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol
from uuid import UUID

import msgspec

from billing.errors import TillRebuilding, TillRefused
from billing.till_link import Script, TillLink

if TYPE_CHECKING:
    from billing.till_scopes import BudgetScope

log = logging.getLogger("billing.till")

SHARDS = 256
RUN_ID = re.compile(rb"^run_id:(\w+)", re.MULTILINE)
# Of a server that does not say who it is. An emptied till is still found out.
NAMELESS = "unknown"


class AccountState(msgspec.Struct, frozen=True, kw_only=True):
    """What the book says of an account: the only source of `posted` in the till."""

    account_id: UUID
    balance_nanos: int
    version: int
    status: str


class SpendState(msgspec.Struct, frozen=True, kw_only=True):
    """What the book says of one window of a budget: `posted` of its scope in the till."""

    spent_nanos: int
    version: int
    """Only grows, with everything that is posted for a request of the window."""


class Epoch(msgspec.Struct, frozen=True, kw_only=True):
    """What the book says of the epoch that is valid now."""

    number: int
    server_run_id: str
    """The till's server when it began; '' before any till was ever opened."""
    age_ms: int
    others: int
    """Workers that live besides the one that asks: they have holds to place again, too."""


class TillBook(Protocol):
    """What the till asks of the book. Raises what the book raises."""

    async def read_account(self, account_id: UUID) -> AccountState: ...

    async def read_budget(self, budget: "BudgetScope") -> SpendState: ...

    async def read_epoch(self) -> Epoch: ...

    async def bump_epoch(self, known: Epoch, server_run_id: str) -> Epoch: ...


class TillEpoch:
    """What one worker knows of the epoch. `number` is 0 while it is not known."""

    def __init__(self, link: TillLink, script: Script, book: TillBook, *, rebuild_ms: int) -> None:
        """rebuild_ms: how long a new epoch waits for all workers to place their holds again."""
        self._link = link
        self._script = script
        self._book = book
        self._rebuild_ms = rebuild_ms
        self.number = 0
        self.announced = 0
        self.on_new: Callable[[], None] = lambda: None
        """Called once for each epoch, before anything new is held: place what is open again."""
        self._generation = 0
        self._kept = 0
        self._server = ""
        self._is_doubted = True
        self._is_lost = False

    @property
    def is_known(self) -> bool:
        """Whether this very connection was found to lead to a till of the epoch."""
        return self.number > 0 and self._generation == self._link.generation

    def doubt(self, number: int, *, is_lost: bool = False) -> None:
        """The till is not open in that epoch. is_lost: in none, so what was in it is gone."""
        if number == self.number:  # a late answer says nothing of a newer one
            self._is_lost = self._is_lost or (is_lost and number > 0)
            self._is_doubted = True
            self.number = 0

    async def learn(self) -> int:
        """Find out what is valid; begin a new epoch when the till lost its content.

        Safe to run in many workers at once.
        """
        generation = self._link.generation
        server = await self._run_id()
        if server == self._server and not self._is_doubted:
            # The same server as before a short break: the book may even be away.
            self.number, self._generation = self._kept, generation
            return self.number
        epoch = await self._book.read_epoch()
        if self._has_ended(epoch, server):
            epoch = await self._book.bump_epoch(epoch, server)
            log.warning("till.epoch_began", extra={"epoch": epoch.number})
            # crash-point: epoch.begun
            await self.set_shards(epoch.number, "close")
        if epoch.number != self.announced:
            self.announced = epoch.number
            self.on_new()
        if epoch.number > 1 and epoch.others and epoch.age_ms < self._rebuild_ms:
            raise TillRebuilding
        if b"lost" in await self.set_shards(epoch.number, "open"):
            return await self._learn_again(epoch)
        # crash-point: epoch.opened
        self._kept = self.number = epoch.number
        self._server, self._generation = server, generation
        self._is_doubted = self._is_lost = False
        return self.number

    async def _learn_again(self, epoch: Epoch) -> int:
        """The till was emptied after its shards were closed for this epoch, and nobody saw it.

        Unless the epoch is young: then whoever began it may not have closed them yet.
        """
        self._is_doubted = True
        if epoch.age_ms < self._rebuild_ms:
            raise TillRebuilding
        self._kept, self._is_lost = epoch.number, True
        return await self.learn()

    def _has_ended(self, epoch: Epoch, server: str) -> bool:
        if self._is_lost and epoch.number <= self._kept:
            return True
        return epoch.server_run_id != server

    async def has(self, number: int) -> bool:
        """Whether the till's first shard is open in that epoch. Raises TillUnavailable."""
        found = await self._link.command(("GET", epoch_key(0)))
        return bool(found == b"%d" % number)

    async def set_shards(self, number: int, to: str) -> set[bytes]:
        """Open or close all shards for an epoch, idempotent; returns what they said."""
        replies = [
            self._link.run(self._script, (epoch_key(shard),), (number, to))
            for shard in range(SHARDS)
        ]
        return set(await asyncio.gather(*replies))

    async def _run_id(self) -> str:
        try:
            told = await self._link.command(("INFO", "server"))
        except TillRefused:
            return NAMELESS  # not everybody may ask
        found = RUN_ID.search(told)
        return found[1].decode() if found else NAMELESS


def epoch_key(shard: int) -> str:
    return f"fb:{{s{shard:02x}}}:epoch"
