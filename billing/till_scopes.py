"""What a request spends from: the till's keys of its scopes, and their limits."""

from datetime import datetime
from typing import NamedTuple
from uuid import UUID
from zlib import crc32

import msgspec

from billing.till_epoch import SHARDS
from billing.till_wire import ScopesWire
from billing.windows import Window, window_end
from config.ids import id_text


class ScopeLimits(NamedTuple):
    """0: no limit."""

    open_requests: int = 0
    requests_per_minute: int = 0
    tokens_per_minute: int = 0


UNLIMITED = ScopeLimits()


class BudgetScope(msgspec.Struct, frozen=True, kw_only=True):
    """One window of a virtual key's budget. What nobody has to be admitted on needs no limit."""

    virtual_key_id: UUID
    window: Window
    starts_at: datetime
    limit_nanos: int = 0

    @property
    def ends_at(self) -> datetime | None:
        return window_end(self.window, self.starts_at)


class SpendScopes(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a principal spends from, as the keys and arguments that the scripts want.

    Made once for each principal and budget window. Scope 1 is the account, scope 2 the key (no
    money), scope 3 a budget, if there is one.
    """

    account_id: UUID
    epoch_key: str
    outbox_key: str
    leases_key: str
    hold_prefix: str
    scope_keys: tuple[str, ...]
    kinds: tuple[str, ...]
    limits: tuple[ScopeLimits, ...]
    wire: ScopesWire
    budget: BudgetScope | None = None


def shard_prefix(account_id: UUID) -> str:
    """`fb:{sNN}:`; the braces put all keys of an account into one cluster slot."""
    return f"fb:{{s{crc32(id_text(account_id).encode()) % SHARDS:02x}}}:"


def account_scope_key(account_id: UUID) -> str:
    return f"{shard_prefix(account_id)}a:{id_text(account_id)}"


def key_scope_key(account_id: UUID, key_id: UUID) -> str:
    return f"{shard_prefix(account_id)}k:{id_text(key_id)}"


def budget_name(budget: BudgetScope) -> str:
    """`<virtual key>:<window>:<first day>`"""
    return f"{id_text(budget.virtual_key_id)}:{budget.window}:{budget.starts_at:%Y%m%d}"


def budget_scope_key(account_id: UUID, budget: BudgetScope) -> str:
    return f"{shard_prefix(account_id)}b:{budget_name(budget)}"


def spend_scopes(
    account_id: UUID,
    key_id: UUID,
    *,
    account: ScopeLimits = UNLIMITED,
    key: ScopeLimits = UNLIMITED,
    budget: BudgetScope | None = None,
) -> SpendScopes:
    """The scopes of one key of one account, and of a window of its budget."""
    prefix = shard_prefix(account_id)
    epoch_key, outbox_key, leases_key = f"{prefix}epoch", f"{prefix}outbox", f"{prefix}leases"
    scope_keys: tuple[str, ...] = (
        account_scope_key(account_id),
        key_scope_key(account_id, key_id),
    )
    kinds: tuple[str, ...] = ("A", "K")
    limits: tuple[ScopeLimits, ...] = (account, key)
    if budget is not None:
        scope_keys += (budget_scope_key(account_id, budget),)
        kinds, limits = (*kinds, "B"), (*limits, UNLIMITED)
    nanos = budget.limit_nanos if budget is not None else 0
    words = [
        word
        for kind, most in zip(kinds, limits, strict=True)
        for word in (kind, most.open_requests, nanos if kind == "B" else 0)
    ]
    rates = [n for most in limits for n in (most.requests_per_minute, most.tokens_per_minute)]
    return SpendScopes(
        account_id=account_id,
        epoch_key=epoch_key,
        outbox_key=outbox_key,
        leases_key=leases_key,
        hold_prefix=f"{prefix}h:",
        scope_keys=scope_keys,
        kinds=kinds,
        limits=limits,
        wire=ScopesWire(
            shard_keys=(epoch_key, outbox_key, leases_key),
            hold_prefix=f"{prefix}h:",
            scope_keys=scope_keys,
            kinds=kinds,
            limits=words,
            rates=rates if any(rates) else (),
        ),
        budget=budget,
    )
