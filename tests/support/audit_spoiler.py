"""Ways to corrupt a copy of the till: name: (invariant, what the finding says, what to do)."""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from redis.asyncio import Redis

from billing.audit import Invariant
from billing.receipts import ChargeReceipt, encode_receipt
from billing.till_scopes import (
    account_scope_key,
    budget_scope_key,
    key_scope_key,
    shard_prefix,
)
from config.ids import id_text, new_id
from tests.support.audit_world import World

L6, L7, L8 = Invariant.TILL, Invariant.AGES, Invariant.KEYS
PLAIN_KEY = "fb_test_" + "Z9y8" * 9 + "aa"


class Spoiler:
    """A copy of the till with two holds and an outbox entry, and handles to spoil it by."""

    def __init__(self, world: World, client: Redis) -> None:
        self.world = world
        self.customer = world.customers[0]
        self.prefix = shard_prefix(self.customer.account_id)
        self.account = account_scope_key(self.customer.account_id)
        self.key = key_scope_key(self.customer.account_id, self.customer.app_key_id)
        self.budget = budget_scope_key(self.customer.account_id, self.customer.budget)
        self.hold = f"{self.prefix}h:{world.held.source_reference}"
        self.outbox, self.leases = f"{self.prefix}outbox", f"{self.prefix}leases"
        self._client = client

    async def __call__(self, *command: Any) -> Any:
        return await self._client.execute_command(*command)

    async def enter(self, receipt: ChargeReceipt, price_nanos: int | None = None) -> None:
        """Put this receipt into the outbox in the place of the one that waits there."""
        await self("HDEL", self.outbox, self.world.waiting.source_reference)
        price = receipt.price_nanos if price_nanos is None else price_nanos
        entry = b"%d %b" % (price, encode_receipt(receipt))
        await self("HSET", self.outbox, receipt.source_reference, entry)

    async def old_hold(self) -> None:
        """The same hold under the id of a request that came 21 minutes ago."""
        uid = new_id()
        old = type(uid)(int=uid.int - ((21 * 60_000) << 80))
        draft = msgspec.structs.replace(
            self.world.held, request_id=old, source_reference=id_text(old)
        )
        await self("RENAME", self.hold, f"{self.prefix}h:{id_text(old)}")
        await self("HSET", f"{self.prefix}h:{id_text(old)}", "draft", encode_receipt(draft))
        await self("ZREM", self.leases, self.world.held.source_reference)
        await self("ZADD", self.leases, 1, id_text(old))

    async def late_entry(self) -> None:
        late = datetime.now(UTC) - timedelta(seconds=62)
        await self.enter(msgspec.structs.replace(self.world.waiting, finished_at=late))

    async def foreign_draft(self) -> None:
        stranger = msgspec.structs.replace(self.world.held, billing_account_id=new_id())
        await self("HSET", self.hold, "draft", encode_receipt(stranger))

    async def secret_draft(self) -> None:
        leaky = msgspec.structs.replace(self.world.held, client_request_id=PLAIN_KEY)
        await self("HSET", self.hold, "draft", encode_receipt(leaky))

    async def bytes_for_id(self) -> None:
        await self("HSET", self.prefix.encode() + b"a:\xff", "held", 1)

    async def unknown_account(self) -> None:
        key = account_scope_key(new_id())
        await self("HSET", key, "posted", 5, "version", 1, "status", "active")

    async def budget_of_nobody(self) -> None:
        """A window that is none."""
        await self("HSET", self.budget.replace("total", "year"), "posted", 0, "version", 0)

    async def other_window(self) -> None:
        """A hold of a budget's window says that it is of another one."""
        other = msgspec.structs.replace(self.world.held, budget_window="day")
        await self("HSET", self.hold, "draft", encode_receipt(other))

    async def listed_epoch(self) -> None:
        await self("DEL", f"{self.prefix}epoch")
        await self("RPUSH", f"{self.prefix}epoch", "x")

    async def older_epoch(self) -> None:
        """What was true in one epoch is true in the next: it cannot hide a wrong balance."""
        await self("HSET", self.account, "epoch", 0)
        await self("HINCRBY", self.account, "posted", 1)

    async def older_version(self) -> None:
        await self("HINCRBY", self.account, "version", -1)


Spoil = Callable[[Spoiler], Awaitable[Any]]
TILL: dict[str, tuple[Invariant, str, Spoil]] = {
    "held too high": (L6, "held", lambda s: s("HINCRBY", s.account, "held", 1)),
    "held negative": (L6, "negative held", lambda s: s("HSET", s.account, "held", -5)),
    "held forgotten": (L6, "held", lambda s: s("HDEL", s.account, "held")),
    "a scope is gone": (L6, "held", lambda s: s("DEL", s.account)),
    "uncommitted too low": (
        L6,
        "uncommitted",
        lambda s: s("HINCRBY", s.account, "uncommitted", -1),
    ),
    "a budget with too much held": (L6, "held", lambda s: s("HINCRBY", s.budget, "held", 1)),
    "a budget that owes too little": (
        L6,
        "uncommitted",
        lambda s: s("HINCRBY", s.budget, "uncommitted", -1),
    ),
    "a budget with one open too few": (L6, "open", lambda s: s("HINCRBY", s.budget, "open", -1)),
    "a budget is gone": (L6, "held", lambda s: s("DEL", s.budget)),
    "a hold of another window": (L6, "held", Spoiler.other_window),
    "a budget that spent a nano less": (
        L6,
        "spent at version 7",
        lambda s: s("HINCRBY", s.budget, "posted", -1),
    ),
    "a budget ahead of the book": (
        L6,
        "version ahead of the book",
        lambda s: s("HINCRBY", s.budget, "version", 1),
    ),
    "a budget of tomorrow's epoch": (
        L6,
        "scope of an epoch ahead of the book",
        lambda s: s("HSET", s.budget, "epoch", 2),
    ),
    "a budget of a window that is none": (L6, "garbage: id", Spoiler.budget_of_nobody),
    "a key that owes": (L6, "uncommitted", lambda s: s("HSET", s.key, "uncommitted", 1)),
    "one open too many": (L6, "open", lambda s: s("HINCRBY", s.account, "open", 1)),
    "one open too few of a key": (L6, "open", lambda s: s("HINCRBY", s.key, "open", -1)),
    "a hold is gone": (L6, "lease without a hold", lambda s: s("DEL", s.hold)),
    "a hold of another size": (L6, "held", lambda s: s("HINCRBY", s.hold, "nanos", 1)),
    "a negative hold": (L6, "garbage: nanos", lambda s: s("HSET", s.hold, "nanos", -1)),
    "a lease is gone": (
        L6,
        "hold without a lease",
        lambda s: s("ZREM", s.leases, s.world.held.source_reference),
    ),
    "a lease too many": (
        L6,
        "lease without a hold",
        lambda s: s("ZADD", s.leases, 1, id_text(new_id())),
    ),
    "the outbox is gone": (L6, "uncommitted", lambda s: s("DEL", s.outbox)),
    "an outbox entry of another price": (
        L6,
        "uncommitted",
        lambda s: s.enter(msgspec.structs.replace(s.world.waiting, price_nanos=1)),
    ),
    "an outbox entry and its receipt disagree": (
        L6,
        "garbage: {waiting}",
        lambda s: s.enter(s.world.waiting, 7),
    ),
    "an outbox entry without a price": (
        L6,
        "garbage: {waiting}",
        lambda s: s("HSET", s.outbox, s.world.waiting.source_reference, "1.5 {}"),
    ),
    "a draft of another shard": (L6, "garbage: draft", Spoiler.foreign_draft),
    "a draft that is none": (L6, "garbage: draft", lambda s: s("HSET", s.hold, "draft", "{")),
    "posted off by a nano": (
        L6,
        "posted at version 9",
        lambda s: s("HINCRBY", s.account, "posted", 1),
    ),
    "posted of another version": (L6, "posted at version 8", Spoiler.older_version),
    "a version ahead of the book": (
        L6,
        "version ahead of the book",
        lambda s: s("HINCRBY", s.account, "version", 1),
    ),
    "a negative version": (
        L6,
        "version ahead of the book",
        lambda s: s("HSET", s.account, "version", -1),
    ),
    "an account that the book does not know": (L6, "account", Spoiler.unknown_account),
    "an epoch of tomorrow": (
        L6,
        "epoch ahead of the book",
        lambda s: s("SET", f"{s.prefix}epoch", 2),
    ),
    "a scope of tomorrow's epoch": (
        L6,
        "scope of an epoch ahead of the book",
        lambda s: s("HSET", s.account, "epoch", 2),
    ),
    "a scope of no epoch that there is": (
        L6,
        "garbage: epoch",
        lambda s: s("HSET", s.account, "epoch", "x"),
    ),
    "posted of an older epoch off by a nano": (
        L6,
        "posted at version 9",
        Spoiler.older_epoch,
    ),
    "words for posted": (L6, "garbage: posted", lambda s: s("HSET", s.account, "posted", "12a")),
    "a float": (L6, "garbage: held", lambda s: s("HSET", s.account, "held", "1e8")),
    "minus zero": (L6, "garbage: held", lambda s: s("HSET", s.account, "held", "-0")),
    "too many digits": (L6, "garbage: posted", lambda s: s("HSET", s.account, "posted", "9" * 99)),
    "posted without version": (
        L6,
        "garbage: posted and version",
        lambda s: s("HDEL", s.account, "version"),
    ),
    "a status that is none": (L6, "garbage: status", lambda s: s("HSET", s.key, "status", "ok")),
    "a string for a scope": (L6, "garbage: type", lambda s: s("SET", s.account, "x")),
    "a string for the outbox": (L6, "garbage: type", lambda s: s("SET", s.outbox, "x")),
    "a list for the leases": (L6, "garbage: type", lambda s: s("SET", s.leases, "x")),
    "a list for the epoch": (L6, "garbage: value", Spoiler.listed_epoch),
    "bytes for an id": (
        L6,
        "garbage: id",
        Spoiler.bytes_for_id,
    ),
    "an old hold": (L7, "old hold", Spoiler.old_hold),
    "an old outbox entry": (L7, "old outbox entry", Spoiler.late_entry),
    "a key in a draft": (L8, "plaintext key", Spoiler.secret_draft),
}
