"""What the till holds, as values: scopes, holds, outbox entries. Pure; bytes in.

Parsed strictly: the scripts write plain integers and our own receipts, and anything else is
listed as garbage, never guessed and never raised.
"""

import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Literal, cast, get_args
from uuid import UUID

import msgspec

from billing.money import NANOS_MAX
from billing.receipt_scopes import budget_of
from billing.receipts import ChargeReceipt, decode_receipt
from billing.till_scopes import BudgetScope, budget_name, shard_prefix
from billing.windows import Window, window_start
from config.ids import id_text, read_id

INTEGER = re.compile(rb"0|-?[1-9][0-9]{0,15}")
STATES = {"H", "F"}
STATUSES = {"", "active", "frozen", "revoked"}
PLAINTEXT_KEY = re.compile(rb"fb_(?:live|test|op)_[0-9A-Za-z]{38}")
EXCERPT_BYTES = 40
WRONG_TYPE = "type"
Kind = Literal["a", "k", "b"]
KINDS: tuple[Kind, ...] = ("a", "k", "b")


class Owner(msgspec.Struct, frozen=True, kw_only=True):
    """Whose scope it is: an account's (`a`), a key's (`k`), a virtual key's budget's (`b`)."""

    kind: Kind
    owner_id: UUID
    budget: BudgetScope | None = None

    @property
    def name(self) -> str:
        """Its key in the till, without the prefix of the shard."""
        ident = id_text(self.owner_id) if self.budget is None else budget_name(self.budget)
        return f"{self.kind}:{ident}"

    @property
    def has_money(self) -> bool:
        """A key counts open requests and no money."""
        return self.kind != "k"


def owner_of(kind: Kind, receipt: ChargeReceipt) -> Owner | None:
    """Whose scope of that kind the request was held on; None when it was held on none."""
    if kind == "a":
        return Owner(kind=kind, owner_id=receipt.billing_account_id)
    if kind == "k":
        return Owner(kind=kind, owner_id=receipt.app_key_id or receipt.virtual_key_id)
    budget = budget_of(receipt)
    if budget is None:
        return None
    return Owner(kind=kind, owner_id=budget.virtual_key_id, budget=budget)


def owners_of(receipt: ChargeReceipt) -> list[Owner]:
    """Whose scopes the request was held on."""
    return [owner for kind in KINDS if (owner := owner_of(kind, receipt)) is not None]


class Scope(Owner, frozen=True, kw_only=True):
    """What the till says of one. None: it was not told yet."""

    posted: int | None = None
    version: int | None = None
    uncommitted: int = 0
    held: int = 0
    open: int = 0
    status: str = ""
    epoch: int | None = None
    """In which it was seeded last; nothing is admitted on it in another one."""


class Hold(msgspec.Struct, frozen=True, kw_only=True):
    """One admitted request. `draft` is None when it could not be read."""

    request_id: str
    state: str
    nanos: int
    worker: str
    draft: ChargeReceipt | None


class OutboxEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One settled request that the book may not have yet."""

    request_id: str
    price_nanos: int
    receipt: ChargeReceipt | None


class Garbage(msgspec.Struct, frozen=True, kw_only=True):
    """Something in our keys that is not what the scripts write. Never holds a secret."""

    key: str
    what: str
    found: str


class Shard(msgspec.Struct, kw_only=True):
    """All that one shard holds. `is_cut`: there was more than fits, so sums are not complete."""

    name: str
    prefix: str
    epoch: int | None = None
    accounts: dict[UUID, Scope] = {}
    keys: dict[UUID, Scope] = {}
    budgets: dict[str, Scope] = {}
    """By their names."""
    holds: dict[str, Hold] = {}
    outbox: dict[str, OutboxEntry] = {}
    leases: dict[str, int] = {}
    garbage: list[Garbage] = []
    secrets: list[str] = []
    other_keys: int = 0
    odd_keys: list[bytes] = []
    """What nobody can use as it is: a wrong type, nobody's id, a hold that cannot be read."""
    odd_entries: list[bytes] = []
    """The same of the outbox."""
    set_aside: int = 0
    """Keys that a rebuild could not read and kept for a person to look at."""
    is_cut: bool = False

    def scopes(self, kind: Kind) -> Iterable[Scope]:
        by_kind: dict[Kind, Iterable[Scope]] = {
            "a": self.accounts.values(),
            "k": self.keys.values(),
            "b": self.budgets.values(),
        }
        return by_kind[kind]

    @property
    def is_whole(self) -> bool:
        """Whether sums mean anything: all of it was read, and it has the types of the scripts."""
        return not self.is_cut and all(bad.what != WRONG_TYPE for bad in self.garbage)


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """One scope at one moment: its own numbers and what they must be the sums of."""

    scope: Scope
    holds: dict[str, int]
    outbox: dict[str, int]


class Parser:
    """Turns replies into values and collects what is wrong with them."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.garbage: list[Garbage] = []
        self.secrets: list[str] = []

    def put_epoch(self, shard: Shard, raw: object) -> None:
        if raw is not None:
            shard.epoch = self.integer(f"{self._prefix}epoch", "", raw)

    def put_leases(self, shard: Shard, raw: Any) -> None:
        key = f"{self._prefix}leases"
        if isinstance(raw, Exception):
            self._bad(key, WRONG_TYPE, str(raw))
            shard.odd_keys.append(key.encode())
            return
        for request_id, score in zip(raw[::2], raw[1::2], strict=True):
            name = self._request_id(key, request_id)
            shard.leases[name] = self.integer(key, name, score)

    def put_outbox(self, shard: Shard, raw: Any) -> None:
        key = f"{self._prefix}outbox"
        if isinstance(raw, Exception):
            self._bad(key, WRONG_TYPE, str(raw))
            shard.odd_keys.append(key.encode())
            return
        for field, value in raw.items():
            known = len(self.garbage)
            name = self._request_id(key, field)
            price, _, receipt = value.partition(b" ")
            entry = OutboxEntry(
                request_id=name,
                price_nanos=self.integer(key, name, price),
                receipt=self._receipt(key, name, receipt),
            )
            self._compare(key, name, entry)
            if len(self.garbage) > known:
                shard.odd_entries.append(field)
            shard.outbox[name] = entry

    def put(self, shard: Shard, raw_key: bytes, fields: Any) -> None:
        """One hash of the shard: an account's scope, a key's, or a hold."""
        key = raw_key.decode("utf-8", "backslashreplace")
        kind, _, ident = key.removeprefix(self._prefix).partition(":")
        known, owner = len(self.garbage), None
        if not fields:
            return  # gone since the scan
        if isinstance(fields, Exception):
            self._bad(key, WRONG_TYPE, str(fields))
        elif kind == "h":
            shard.holds[ident] = self._hold(key, ident, fields)
        else:
            owner = self._owner(key, kind, ident)
        if len(self.garbage) > known:
            shard.odd_keys.append(raw_key)
        elif owner is not None:
            # A wrong number in it is not odd: it can be computed.
            scope = self.scope(owner, key, fields)
            if owner.kind == "b":
                shard.budgets[owner.name] = scope
            else:
                scopes = shard.accounts if owner.kind == "a" else shard.keys
                scopes[owner.owner_id] = scope

    def scope(self, owner: Owner, key: str, fields: Mapping[bytes, Any]) -> Scope:
        posted, version = fields.get(b"posted"), fields.get(b"version")
        if (posted is None) != (version is None):
            self._bad(key, "posted and version", "only one of them is there")
        status = fields.get(b"status", b"").decode("utf-8", "backslashreplace")
        if status not in STATUSES:
            self._bad(key, "status", status)
        return Scope(
            kind=owner.kind,
            owner_id=owner.owner_id,
            budget=owner.budget,
            posted=None if posted is None else self.integer(key, "posted", posted),
            version=None if version is None else self.integer(key, "version", version),
            uncommitted=self.integer(key, "uncommitted", fields.get(b"uncommitted", b"0")),
            held=self.integer(key, "held", fields.get(b"held", b"0")),
            open=self.integer(key, "open", fields.get(b"open", b"0")),
            status=status,
            epoch=self.integer(key, "epoch", fields[b"epoch"]) if b"epoch" in fields else None,
        )

    def integer(self, key: str, field: str, raw: Any) -> int:
        """A plain integer as the scripts write them; 0 and a line of garbage for anything else."""
        if isinstance(raw, int) and not isinstance(raw, bool):
            return raw
        if isinstance(raw, bytes) and INTEGER.fullmatch(raw) and abs(int(raw)) <= NANOS_MAX:
            return int(raw)
        self._bad(key, field or "value", raw)
        return 0

    def _hold(self, key: str, request_id: str, fields: Mapping[bytes, bytes]) -> Hold:
        self._request_id(key, request_id.encode())
        state = fields.get(b"state", b"").decode("utf-8", "backslashreplace")
        if state not in STATES:
            self._bad(key, "state", state)
        nanos = self.integer(key, "nanos", fields.get(b"nanos", b""))
        if nanos < 0:
            self._bad(key, "nanos", nanos)
        hold = Hold(
            request_id=request_id,
            state=state,
            nanos=nanos,
            worker=fields.get(b"worker", b"").decode("utf-8", "backslashreplace"),
            draft=self._receipt(key, "draft", fields.get(b"draft", b"")),
        )
        if hold.draft is not None and hold.draft.source_reference != request_id:
            self._bad(key, "draft", f"of request {hold.draft.source_reference}")
        return hold

    def _receipt(self, key: str, field: str, raw: bytes) -> ChargeReceipt | None:
        if PLAINTEXT_KEY.search(raw):
            self.secrets.append(f"{key} {field}")
        try:
            receipt = decode_receipt(raw)
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            self._bad(key, field, f"no receipt: {exc}")
            return None
        if shard_prefix(receipt.billing_account_id) != self._prefix:
            self._bad(key, field, "a receipt of an account of another shard")
        return receipt

    def _compare(self, key: str, name: str, entry: OutboxEntry) -> None:
        if entry.receipt is None:
            return
        if entry.receipt.price_nanos != entry.price_nanos:
            said = f"price {entry.price_nanos}, receipt says {entry.receipt.price_nanos}"
            self._bad(key, name, said)
        if entry.receipt.source_reference != name:
            self._bad(key, name, f"receipt of request {entry.receipt.source_reference}")

    def _owner(self, key: str, kind: str, ident: str) -> Owner | None:
        try:
            if kind == "b":
                budget = _read_budget(ident)
                return Owner(kind="b", owner_id=budget.virtual_key_id, budget=budget)
            owner_id = read_id(ident)
        except ValueError:
            self._bad(key, "id", ident)
            return None
        if kind == "a" and shard_prefix(owner_id) != self._prefix:
            self._bad(key, "shard", "an account of another shard")
        return Owner(kind="a" if kind == "a" else "k", owner_id=owner_id)

    def _request_id(self, key: str, raw: bytes) -> str:
        name = raw.decode("utf-8", "backslashreplace")
        try:
            read_id(name)
        except ValueError:
            self._bad(key, "request id", name)
        return name

    def _bad(self, key: str, what: str, found: object) -> None:
        raw = found if isinstance(found, bytes) else str(found).encode()
        safe = PLAINTEXT_KEY.sub(b"fb_***", raw)[:EXCERPT_BYTES]
        text = safe.decode("utf-8", "backslashreplace")
        self.garbage.append(Garbage(key=key, what=what, found=text))


def _read_budget(ident: str) -> BudgetScope:
    """Raises ValueError unless it is what `budget_name` makes."""
    owner, window, day = ident.split(":")
    starts_at = datetime.strptime(day, "%Y%m%d").replace(tzinfo=UTC)
    if window not in get_args(Window) or window_start(cast(Window, window), starts_at) != starts_at:
        raise ValueError(ident)
    budget = BudgetScope(
        virtual_key_id=read_id(owner), window=cast(Window, window), starts_at=starts_at
    )
    if budget_name(budget) != ident:
        raise ValueError(ident)
    return budget
