"""The till's side of the audit: L6 and the ages of L7, while traffic runs.

A shard is first read in several steps. A scope that looks wrong is then read again at one moment,
and only a scope that stays wrong is reported. The till hears from the book after the commit, so
the till is read first and the book after it.
"""

import asyncio
from collections.abc import Collection, Iterable, Sequence
from typing import Any
from uuid import UUID

import msgspec

from billing.audit_budgets import Disagreement, Wrong, apart, budgets_against_book
from billing.audit_report import Draft, Invariant
from billing.book import Connection, translated
from billing.fleet import read_epoch
from billing.receipts import ChargeReceipt
from billing.till_entries import KINDS, Kind, Owner, Scope, Shard, owner_of
from billing.till_scan import TillScan
from config.clock import seconds
from config.ids import read_id

LOOKS = 3
LOOK_AGAIN_S = seconds(50)
HOLD_AGE_MAX_S, OUTBOX_AGE_MAX_S = 20 * 60, 60
# Names of what a scope counts in nanos.
MONEY = {"held", "uncommitted"}
OWNER_NAMES = {"a": "billing_account_id", "k": "app_key_id", "b": "virtual_key_id"}


class Totals(msgspec.Struct):
    """What a look at the till counted. Ages are those of the oldest."""

    holds: int = 0
    held_nanos: int = 0
    hold_age_s: int = 0
    entries: int = 0
    entry_age_s: int = 0


async def check_till(
    conn: Connection,
    till: TillScan,
    draft: Draft,
    *,
    at_rest: bool,
    patterns: Sequence[str] | None = None,
) -> Totals:
    """Every shard, one after the other. conn is outside of a transaction: it must see news.

    patterns: only some of `till.patterns()`.
    """
    audit = _TillAudit(conn, till, draft)
    async for shard in till.shards(await till.patterns() if patterns is None else patterns):
        await audit.look_at(shard, at_rest=at_rest)
    await audit.finish()
    return audit.totals


class _TillAudit:
    def __init__(self, conn: Connection, till: TillScan, draft: Draft) -> None:
        self._conn = conn
        self._till = till
        self._draft = draft
        self._check = draft[Invariant.TILL]
        self._epochs: dict[str, int] = {}
        # How many scopes were seeded last in which epoch, and one of them.
        self._scope_epochs: dict[int, tuple[int, Scope]] = {}
        self._behind = self._other_keys = self._set_aside = 0
        self.totals = Totals()

    async def look_at(self, shard: Shard, *, at_rest: bool) -> None:
        self._check_readable(shard)
        self._check_ages(shard, await self._till.now_ms())
        if shard.is_whole:
            await self._check_sums(shard)
            await self._check_leases(shard)
            await self._check_rest(shard, at_rest=at_rest)
        await self._check_against_book(shard)
        if shard.epoch is not None:
            self._epochs[shard.name] = shard.epoch
        for scope in (*shard.accounts.values(), *shard.budgets.values()):
            if scope.epoch is not None:
                count, first = self._scope_epochs.get(scope.epoch, (0, scope))
                self._scope_epochs[scope.epoch] = (count + 1, first)
        self.totals.holds += len(shard.holds)
        self.totals.held_nanos += sum(hold.nanos for hold in shard.holds.values())
        self.totals.entries += len(shard.outbox)
        self._other_keys += shard.other_keys
        self._set_aside += shard.set_aside

    async def finish(self) -> None:
        """What needs all shards. The book's epoch is read after the till's, so it is not older."""
        epoch = (await read_epoch(self._conn)).number
        for name, found in self._epochs.items():
            if abs(found) > epoch:
                self._check.add("epoch ahead of the book", f"<= {epoch}", found, shard=name)
        for found, (_, scope) in self._scope_epochs.items():
            if found > epoch:
                what = "scope of an epoch ahead of the book"
                self._check.add(what, f"<= {epoch}", found, **_ids(scope))
        stale = sum(found < epoch for found in self._epochs.values())
        # Nothing is admitted on them before they are seeded again; what they say is still true.
        cold = sum(count for found, (count, _) in self._scope_epochs.items() if found < epoch)
        note = self._draft.note
        note(Invariant.TILL, "open holds", self.totals.holds)
        note(Invariant.TILL, "outbox entries", self.totals.entries)
        note(Invariant.TILL, "scopes behind the book", self._behind)
        note(Invariant.TILL, "shards of an older epoch", stale)
        note(Invariant.TILL, "scopes of an older epoch", cold)
        note(Invariant.TILL, "keys set aside by a rebuild", self._set_aside)
        note(Invariant.TILL, "keys that this release does not know", self._other_keys)

    def _check_readable(self, shard: Shard) -> None:
        self._check.checked += sum(1 for kind in KINDS for _ in shard.scopes(kind))
        for bad in shard.garbage:
            what, expected = f"garbage: {bad.what}", "what the scripts write"
            self._check.add(what, expected, bad.found, key=bad.key)
        if shard.is_cut:
            self._check.add("too large to check", "sums of all", "a part", shard=shard.name)
        for place in shard.secrets:
            self._draft[Invariant.KEYS].add("plaintext key", "none", "one", till=place)

    def _check_ages(self, shard: Shard, now_ms: int) -> None:
        check = self._draft[Invariant.AGES]
        check.checked += len(shard.holds) + len(shard.outbox)
        for hold in shard.holds.values():
            age_s = (now_ms - begun_ms(hold.request_id, now_ms)) // 1000
            self.totals.hold_age_s = max(self.totals.hold_age_s, age_s)
            if age_s > HOLD_AGE_MAX_S:
                ids = {"request": hold.request_id, "worker": hold.worker}
                check.add("old hold", f"<= {HOLD_AGE_MAX_S} s", f"{age_s} s", **ids)
        for entry in shard.outbox.values():
            if entry.receipt is None:
                continue
            age_s = now_ms // 1000 - int(entry.receipt.finished_at.timestamp())
            self.totals.entry_age_s = max(self.totals.entry_age_s, age_s)
            if age_s > OUTBOX_AGE_MAX_S:
                expected, request_id = f"<= {OUTBOX_AGE_MAX_S} s", entry.receipt.request_id
                check.add("old outbox entry", expected, f"{age_s} s", request_id=request_id)

    async def _check_sums(self, shard: Shard) -> None:
        """L6: held and open are the sums of the holds, uncommitted that of the outbox."""
        for kind in KINDS:
            for parts in _by_owner(shard, kind):
                wrong = _compare(parts.scope, parts.holds.values(), parts.outbox)
                if wrong:
                    await self._check_scope(shard, parts.scope, list(parts.holds))

    async def _check_scope(self, shard: Shard, owner: Owner, known: list[str]) -> None:
        wrong: list[Wrong] = []
        for again in range(LOOKS):
            if again:
                await asyncio.sleep(LOOK_AGAIN_S)
            look = await self._till.look(shard, owner, known)
            wrong = _compare(look.scope, look.holds.values(), look.outbox.values())
            if not wrong:
                return
        for what, expected, found in wrong:
            drift = apart(expected, found) if what in MONEY else 0
            self._check.add_drift(drift, what, expected, found, **_ids(owner))

    async def _check_leases(self, shard: Shard) -> None:
        """A hold and its lease come and go together."""
        for request_id in shard.holds.keys() ^ shard.leases.keys():
            for again in range(LOOKS):
                if again:
                    await asyncio.sleep(LOOK_AGAIN_S)
                hold, lease, _ = await self._till.has(shard, request_id)
                if hold == lease:
                    break
            else:
                said = ("hold without a lease", "lease without a hold")
                self._check.add(said[lease], "both or none", "one", request=request_id)

    async def _check_rest(self, shard: Shard, *, at_rest: bool) -> None:
        if not at_rest:
            return
        for request_id in shard.holds.keys() | shard.outbox.keys():
            for again in range(LOOKS):
                if again:
                    await asyncio.sleep(LOOK_AGAIN_S)
                hold, _, entry = await self._till.has(shard, request_id)
                if not hold and not entry:
                    break
            else:
                found = "a hold" if hold else "an outbox entry"
                self._check.add("at rest", "no hold, no outbox", found, request=request_id)

    async def _check_against_book(self, shard: Shard) -> None:
        """L6: every state that the till was told is one that the book has, or had."""
        scopes = (*shard.accounts.values(), *shard.budgets.values())
        told = [scope for scope in scopes if scope.version is not None]
        wrong: list[Disagreement] = []
        for again in range(LOOKS):
            if again:
                await asyncio.sleep(LOOK_AGAIN_S)
                told = await self._read_again(shard, [scope for scope, *_ in wrong])
            wrong, behind = await _against_book(
                self._conn, [scope for scope in told if scope.budget is None]
            )
            of_budgets, behind_too = await budgets_against_book(
                self._conn, [scope for scope in told if scope.budget is not None]
            )
            wrong += of_budgets
            self._behind += 0 if again else behind + behind_too
            if not wrong:
                return
        for scope, said, drift in wrong:
            self._check.add_drift(drift, *said, **_ids(scope))

    async def _read_again(self, shard: Shard, owners: list[Scope]) -> list[Scope]:
        found = [await self._till.read_scope(shard.prefix, owner) for owner in owners]
        return [scope for scope in found if scope is not None and scope.version is not None]


SELECT_STATES_TOLD = """
SELECT t.account_id, t.version AS told, a.version, a.balance_nanos, l.balance_after_nanos
FROM unnest($1::uuid[], $2::bigint[]) AS t (account_id, version)
LEFT JOIN billing_accounts AS a ON a.id = t.account_id
LEFT JOIN credit_ledger AS l ON l.billing_account_id = t.account_id AND l.seq = t.version
"""


async def _against_book(conn: Connection, told: list[Scope]) -> tuple[list[Disagreement], int]:
    """What is wrong of which account and by how many nanos; how many are behind the book.

    To be behind is allowed.
    """
    scopes = {scope.owner_id: scope for scope in told}
    versions = [scope.version for scope in scopes.values()]
    async with translated():
        rows = await conn.fetch(SELECT_STATES_TOLD, list(scopes), versions)
    wrong: list[Disagreement] = []
    behind = 0
    for row in rows:
        scope = scopes[row["account_id"]]
        posted = scope.posted
        said = _disagrees(row, posted)
        if said is not None:
            there = row["balance_after_nanos"]
            drift = apart(row["balance_nanos"] if there is None else there, posted)
            wrong.append((scope, said, max(drift, 1)))
        else:
            behind += row["told"] < row["version"]
    return wrong, behind


def _disagrees(row: Any, posted: int | None) -> Wrong | None:
    if row["version"] is None:
        return "account", "one of the book", "unknown to the book"
    if not 0 <= row["told"] <= row["version"]:
        return "version ahead of the book", f"<= {row['version']}", row["told"]
    expected = row["balance_after_nanos"] if row["told"] else 0
    if expected is None and row["told"] == row["version"]:
        expected = row["balance_nanos"]
    # A row missing in the middle is a finding of L1.
    if expected is not None and posted != expected:
        return f"posted at version {row['told']}", expected, posted
    return None


class _Parts(msgspec.Struct):
    """A scope and what it must be the sum of, as a shard was read: not of one moment."""

    scope: Scope
    holds: dict[str, int] = {}
    outbox: list[int] = []


def _by_owner(shard: Shard, kind: Kind) -> Iterable[_Parts]:
    parts = {scope.name: _Parts(scope) for scope in shard.scopes(kind)}

    def of(receipt: ChargeReceipt | None) -> _Parts | None:
        owner = None if receipt is None else owner_of(kind, receipt)
        if owner is None:
            return None
        blank = Scope(kind=kind, owner_id=owner.owner_id, budget=owner.budget)
        return parts.setdefault(owner.name, _Parts(blank))

    for hold in shard.holds.values():
        if (found := of(hold.draft)) is not None:
            found.holds[hold.request_id] = hold.nanos
    for entry in shard.outbox.values():
        if (found := of(entry.receipt)) is not None:
            found.outbox.append(entry.price_nanos)
    return parts.values()


def _compare(scope: Scope, holds: Collection[int], outbox: Iterable[int]) -> list[Wrong]:
    expected = {
        "held": sum(holds) if scope.has_money else 0,
        "uncommitted": sum(outbox) if scope.has_money else 0,
        "open": len(holds),
    }
    found = {"held": scope.held, "uncommitted": scope.uncommitted, "open": scope.open}
    wrong: list[Wrong] = [
        (name, expected[name], found[name]) for name in found if found[name] != expected[name]
    ]
    return wrong + [(f"negative {name}", ">= 0", n) for name, n in found.items() if n < 0]


def _ids(owner: Owner) -> dict[str, UUID | str]:
    """As a finding shows them."""
    ids: dict[str, UUID | str] = {OWNER_NAMES[owner.kind]: owner.owner_id}
    if owner.budget is not None:
        ids["budget"] = f"{owner.budget.window} from {owner.budget.starts_at:%Y-%m-%d}"
    return ids


def begun_ms(request_id: str, otherwise_ms: int) -> int:
    """A request id is a UUIDv7 (RFC 9562): its first 48 bits are when the request came."""
    try:
        return read_id(request_id).int >> 80
    except ValueError:
        return otherwise_ms
