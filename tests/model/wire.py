"""The way between a worker and the till, in the hands of a test.

Every call of a script can be lost, answered in vain, be late or come twice. What is late waits in
the network's bag, from which it can be delivered in any order and as often as one likes.
"""

import asyncio
from collections import deque
from enum import StrEnum
from typing import Any

from billing.errors import TillRefused, TillUnavailable
from billing.till_epoch import SHARDS
from billing.till_link import Arg, Script, TillLink
from billing.till_wire import Packed

BAG_MAX = 12
# What a till says that lost the growth of a hold; the receipt's confirm ends it.
TOO_DEAR = "PRICE above the hold"


class Fate(StrEnum):
    """What becomes of one call."""

    OK = "ok"
    LOST = "lost"
    """It never arrives."""
    MUTE = "mute"
    """It arrives; its answer does not."""
    LATE = "late"
    """The caller gives up; it can arrive at any time, and again."""
    TWICE = "twice"
    """It arrives, and can arrive again."""
    SLOW = "slow"
    """Its caller waits until it arrives."""


class Message:
    """A call on its way."""

    def __init__(self, link: "WireLink", script: Script, packed: Packed) -> None:
        self.link = link
        self.script = script
        self.packed = packed
        self.waiter: asyncio.Future[Any] | None = None

    async def deliver(self) -> None:
        """Arrive now; who still waits gets the answer."""
        try:
            reply = await self.link.pass_on(self.script, self.packed)
        except (TillRefused, TillUnavailable) as exc:
            if self.waiter is not None:
                self.waiter.set_exception(exc)
            elif TOO_DEAR not in str(getattr(exc, "reply", "")):
                raise
        else:
            if self.waiter is not None:
                self.waiter.set_result(reply)
        self.waiter = None


class Network:
    """All links of one world, and what is under way on them."""

    def __init__(self) -> None:
        self.links: list[WireLink] = []
        self.clear()

    def clear(self) -> None:
        """As new: nothing under way, the first server."""
        self.plan: deque[Fate] = deque()
        self.shard_fate = Fate.OK
        self.bag: list[list[Message]] = []
        self.server = 1
        self.blocked = asyncio.Event()
        self.calls: list[asyncio.Future[Any]] = []

    def fate_of(self, script: Script) -> Fate:
        if script.name.startswith("shard"):
            # Who begins an epoch closes the shards once, and no connection says a thing twice.
            return self.shard_fate
        return self.plan.popleft() if self.plan else Fate.OK

    def keep(self, message: Message) -> None:
        """Put a message into the bag; messages to the shards go together, as they were sent."""
        is_shard = message.script.name.startswith("shard")
        last = self.bag[-1] if self.bag else []
        if is_shard and 0 < len(last) < SHARDS and last[0].script is message.script:
            last.append(message)
            return
        self.bag.append([message])
        if len(self.bag) > BAG_MAX:
            self._drop(self.bag.pop(0))

    def drop_closes(self) -> None:
        """No `close` is under way for so long that the till is emptied twice meanwhile.

        Holds that were placed again between the two would be missed until they are renewed.
        """
        self.bag = [sent for sent in self.bag if b"close" not in sent[0].packed.words]

    def is_held_up(self, request_id: str) -> bool:
        """Whether a caller waits until its call about that request arrives."""
        waiting = (m for messages in self.bag for m in messages if m.waiter is not None)
        return any(request_id.encode() in message.packed.words for message in waiting)

    def restart(self) -> None:
        """The till's server is another one: every connection broke, with what was on it."""
        self.server += 1
        for messages in self.bag:
            self._drop(messages)
        self.bag = []
        for link in self.links:
            link.generation += 1

    def _drop(self, messages: list[Message]) -> None:
        for message in messages:
            if message.waiter is not None:
                message.waiter.set_exception(TillUnavailable())
                message.waiter = None

    async def settle_down(self) -> None:
        """Wait for the answers that nobody else waits for."""
        self.plan.clear()
        self.shard_fate = Fate.OK
        while self.calls:
            calls, self.calls = self.calls, []
            await asyncio.wait(calls)


class WireLink(TillLink):
    """The real link, with the network between it and the server."""

    def __init__(self, url: str, network: Network, scripts: list[Script]) -> None:
        super().__init__(url, scripts, call_timeout_s=10, stall_timeout_s=20, pending_max=100_000)
        self.network = network
        network.links.append(self)

    def send(self, script: Script, packed: Packed, *, tells: bool = False) -> asyncio.Future[Any]:
        fate, network = self.network.fate_of(script), self.network
        if fate in {Fate.LATE, Fate.TWICE, Fate.SLOW}:
            message = Message(self, script, packed)
            network.keep(message)
        if fate in {Fate.OK, Fate.TWICE}:
            return self.pass_on(script, packed)
        if fate is Fate.MUTE:
            self.pass_on(script, packed)
        future = asyncio.get_running_loop().create_future()
        if fate is Fate.SLOW:
            message.waiter = future
            network.blocked.set()
        else:
            future.set_exception(TillUnavailable())
            future.exception()
        return future

    def pass_on(self, script: Script, packed: Packed) -> asyncio.Future[Any]:
        call = super().send(script, packed)
        self.network.calls.append(call)
        return call

    def command(self, args: tuple[Arg, ...]) -> asyncio.Future[Any]:
        if args[0] != "INFO":
            return super().command(args)
        future = asyncio.get_running_loop().create_future()
        future.set_result(b"run_id:server%d" % self.network.server)
        return future
