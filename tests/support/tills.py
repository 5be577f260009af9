"""A till without a gateway: links, tills, receipts, and a look at what the server holds."""

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import msgspec
import redis.asyncio

from billing.errors import AccountUnknown, BookUnavailable
from billing.prices import CostSource
from billing.receipts import ChargeReceipt, Outcome, Provenance, encode_receipt
from billing.till import Confirmation, Scripts, Till
from billing.till_epoch import AccountState, Epoch, SpendState, TillBook
from billing.till_link import Script, TillLink
from billing.till_scopes import (
    BudgetScope,
    ScopeLimits,
    SpendScopes,
    account_scope_key,
    budget_name,
    key_scope_key,
    shard_prefix,
    spend_scopes,
)
from config.ids import id_text, new_id

SCRIPTS = Scripts()


class Said:
    """What the book would say: the source of every `posted` in a test without Postgres."""

    def __init__(self, epoch: int = 1) -> None:
        self.epoch = epoch
        self.server = ""
        self.others = 0
        self.began_at = 0.0
        self.accounts: dict[UUID, AccountState] = {}
        self.budgets: dict[str, SpendState] = {}
        self.reads = 0
        self.epoch_reads = 0
        self.is_away = False

    def account(self, nanos: int) -> SpendScopes:
        """A new account with a key, and that much credit in the book."""
        account_id = new_id()
        self.put(account_id, nanos, 1)
        return spend_scopes(account_id, new_id())

    def put(
        self, account_id: UUID, nanos: int, version: int, status: str = "active"
    ) -> AccountState:
        state = AccountState(
            account_id=account_id, balance_nanos=nanos, version=version, status=status
        )
        self.accounts[account_id] = state
        return state

    async def read_account(self, account_id: UUID) -> AccountState:
        self.reads += 1
        await asyncio.sleep(0)
        if self.is_away:
            raise BookUnavailable
        if account_id not in self.accounts:
            raise AccountUnknown
        return self.accounts[account_id]

    async def read_budget(self, budget: BudgetScope) -> SpendState:
        self.reads += 1
        await asyncio.sleep(0)
        if self.is_away:
            raise BookUnavailable
        return self.budgets.get(budget_name(budget), SpendState(spent_nanos=0, version=0))

    async def read_epoch(self) -> Epoch:
        self.epoch_reads += 1
        await asyncio.sleep(0)
        if self.is_away:
            raise BookUnavailable
        age_ms = int((time.monotonic() - self.began_at) * 1000)
        return Epoch(
            number=self.epoch, server_run_id=self.server, age_ms=age_ms, others=self.others
        )

    async def bump_epoch(self, known: Epoch, server_run_id: str) -> Epoch:
        await asyncio.sleep(0)
        if not self.is_away and (known.number, known.server_run_id) == (self.epoch, self.server):
            self.epoch += self.server != ""
            self.server = server_run_id
            self.began_at = time.monotonic()
        return await self.read_epoch()


@asynccontextmanager
async def running_link(
    url: str,
    scripts: Iterable[Script] = (),
    *,
    call_s: float = 2.0,
    stall_s: float = 10.0,
    pending_max: int = 10_000,
    wait: bool = True,
) -> AsyncIterator[TillLink]:
    """A connected link; closed at the end, whatever its state."""
    link = TillLink(
        url,
        scripts or SCRIPTS.all(),
        call_timeout_s=call_s,
        stall_timeout_s=stall_s,
        pending_max=pending_max,
    )
    link.start()
    try:
        if wait:
            assert await link.wait_up(5), link.last_error
        yield link
    finally:
        await link.close()


@asynccontextmanager
async def running_till(
    url: str, said: TillBook, *, call_s: float = 2.0, stall_s: float = 10.0, wait: bool = True
) -> AsyncIterator[Till]:
    async with running_link(url, call_s=call_s, stall_s=stall_s, wait=wait) as link:
        yield Till(link, SCRIPTS, said, worker="w_test", lease_ms=30_000)


class InTill(msgspec.Struct, frozen=True):
    """What the server holds for one account and one of its keys."""

    posted: int | None = None
    version: int | None = None
    uncommitted: int = 0
    held: int = 0
    open: int = 0
    key_open: int = 0
    status: str = ""
    holds: dict[str, int] = {}
    outbox: dict[str, int] = {}
    leases: int = 0

    @property
    def available(self) -> int:
        return (self.posted or 0) - self.uncommitted - self.held

    def check(self, accounts_in_shard: int = 1) -> None:
        """The invariants that hold after every step, as long as nothing was lost."""
        assert self.held == sum(self.holds.values())
        assert self.uncommitted == sum(self.outbox.values())
        assert self.open == len(self.holds) == self.leases
        assert min(self.held, self.uncommitted, self.open, self.key_open) >= 0


@asynccontextmanager
async def nothing_unseen() -> AsyncIterator[None]:
    """Inside, nothing may fail without being looked at, and no task may be left running."""
    found: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: found.append(context))
    before = asyncio.all_tasks()
    yield
    gc.collect()
    await asyncio.sleep(0)
    current = asyncio.current_task()
    left = [task for task in asyncio.all_tasks() - before if task is not current]
    assert (found, left) == ([], [])


async def look(url: str, scopes: SpendScopes) -> InTill:
    """The account's part of its shard; holds and outbox are those of the whole shard."""
    client = redis.asyncio.from_url(url, decode_responses=True)
    try:
        return await look_with(client, scopes)
    finally:
        await client.aclose()


async def look_with(client: Any, scopes: SpendScopes) -> InTill:
    account_key, key_key = scopes.scope_keys[:2]
    names = [n async for n in client.scan_iter(f"{scopes.hold_prefix}*", count=1000)]
    pipe = client.pipeline(transaction=False)
    pipe.hgetall(account_key).hgetall(key_key).hgetall(scopes.outbox_key).zcard(scopes.leases_key)
    for name in names:
        pipe.hget(name, "nanos")
    account, key, outbox, leases, *nanos = await pipe.execute()
    prefix = scopes.hold_prefix
    holds = {n.removeprefix(prefix): int(held) for n, held in zip(names, nanos, strict=True)}
    posted, version = account.get("posted"), account.get("version")
    return InTill(
        posted=None if posted is None else int(posted),
        version=None if version is None else int(version),
        uncommitted=int(account.get("uncommitted", 0)),
        held=int(account.get("held", 0)),
        open=int(account.get("open", 0)),
        key_open=int(key.get("open", 0)),
        status=account.get("status", ""),
        holds=holds,
        outbox={name: int(value.partition(" ")[0]) for name, value in outbox.items()},
        leases=leases,
    )


def make_receipt(
    scopes: SpendScopes,
    price: int = 0,
    *,
    hold: int | None = None,
    uid: UUID | None = None,
    **fields: Any,
) -> ChargeReceipt:
    """A receipt that the book's constraints accept, of that price; unpriced as `provider` cost."""
    uid = uid or new_id()
    now = datetime.now(UTC)
    values: dict[str, Any] = {
        "request_id": uid,
        "source_reference": id_text(uid),
        "billing_account_id": scopes.account_id,
        "virtual_key_id": scopes.account_id,
        "app_key_id": None,
        "protocol": "chat.completions",
        "provider": "test",
        "requested_model": "m",
        "price_nanos": price,
        "provider_cost_nanos": price,
        "markup_bps": 10_000,
        "hold_nanos": price if hold is None else hold,
        "reported_cost_usd": Decimal(0),
        "cost_source": CostSource.PROVIDER,
        "outcome": Outcome.COMPLETE,
        "provenance": Provenance.RESPONSE,
        "started_at": now,
        "finished_at": now,
    }
    return ChargeReceipt(**{**values, **fields})


def limited(scopes: SpendScopes, *, account: int = 0, key: int = 0) -> SpendScopes:
    """A new key of the same account, with limits of open requests."""
    return spend_scopes(
        scopes.account_id, new_id(), account=ScopeLimits(account), key=ScopeLimits(key)
    )


async def admit(till: Till, scopes: SpendScopes, nanos: int, request_id: str = "") -> str:
    """A new hold; returns its request id."""
    request_id = request_id or id_text(new_id())
    await till.admit(scopes, request_id, nanos, b"{}")
    return request_id


async def settle(till: Till, scopes: SpendScopes, request_id: str, price: int) -> list[Any]:
    receipt = encode_receipt(make_receipt(scopes, price))
    reply: list[Any] = await till.settle(scopes, request_id, price, receipt)
    return reply


def confirmation(state: AccountState, scopes: SpendScopes, *request_ids: str) -> Confirmation:
    return Confirmation(state=state, receipts=[(scopes, name) for name in request_ids])


__all__ = [
    "SCRIPTS",
    "InTill",
    "Said",
    "account_scope_key",
    "admit",
    "confirmation",
    "key_scope_key",
    "limited",
    "look",
    "look_with",
    "make_receipt",
    "nothing_unseen",
    "running_link",
    "running_till",
    "settle",
    "shard_prefix",
]
